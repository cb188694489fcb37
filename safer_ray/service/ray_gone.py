"""End a service whose Ray is gone: nothing may wait for it."""

import contextlib
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import psutil

from safer_ray.distributed.ray_internals import own_processes
from safer_ray.service.shutdown import Ending

LOOK_S = 0.2
PATIENCE_S = 5.0  # for the ways out that do without Ray, and for Ray's own end


class RayGone:
    """Ends this process where a part of Ray that it started has ended before it, which Ray itself waits for a minute
    or for ever: as when a signal goes to all processes of a group, or something kills one of them."""

    def __init__(self, ending: Ending, folder: Path) -> None:
        self.parts = own_processes()
        self.ending = ending
        self.folder = folder
        self.children: set[psutil.Process] = set()
        self.closing = False  # Ray is being stopped
        threading.Thread(target=self._look, daemon=True).start()

    def close(self) -> None:
        """Take the end of Ray for wanted, from now on."""
        self.closing = True

    def _look(self) -> None:
        gone_s = 0.0
        while gone_s < PATIENCE_S:
            time.sleep(LOOK_S)
            if self.ending.number is not None and not self.children:
                self._note_children()
            if any(part.poll() is not None for part in self.parts):
                gone_s += LOOK_S
        if self.ending.number is None and self.closing:
            return
        if self.ending.number is None:
            print("error: Ray, on which this service runs, has ended; its logs say why", file=sys.stderr, flush=True)
        self.ending.tell()
        self._leave(1 if self.ending.number is None else self.ending.status)

    def _note_children(self) -> None:
        self.children.update(psutil.Process().children(recursive=True))

    def _leave(self, status: int) -> None:
        self._note_children()
        for child in self.children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(status)
