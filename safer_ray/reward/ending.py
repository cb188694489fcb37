"""SIGTERM in a training: it is noted, and obeyed once a checkpoint is saved; a second one is obeyed at once."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class _Ending:
    """The handler of SIGTERM in this process."""

    def __init__(self) -> None:
        self.saving = 0  # trainings that save first
        self.asked = False  # whether one came since
        self.before: Any = signal.SIG_DFL  # whoever was told of it

    def install(self) -> bool:
        """Become the handler; whether it was none before. Only the main thread may."""
        current = signal.getsignal(signal.SIGTERM)
        if not _in_main_thread() or current == self.note:
            return False
        self.before = current
        signal.signal(signal.SIGTERM, self.note)
        return True

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.saving and not self.asked:
            self.asked = True
        elif callable(self.before):
            self.before(number, frame)
        elif self.before != signal.SIG_IGN:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)

    def leave(self, installed: bool) -> bool:
        """End a training; whether SIGTERM came and was not obeyed."""
        self.saving -= 1
        asked, self.asked = self.asked, False
        if installed:
            signal.signal(signal.SIGTERM, self.before)
        return asked


_ending = _Ending()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def note_sigterm() -> None:
    """Have SIGTERM noted while a training saves first, and otherwise told to whoever was told before. Handlers are set
    by the main thread alone: where another one trains, this is to be called before."""
    _ending.install()


@contextmanager
def saves_first() -> Iterator[None]:
    """Inside, SIGTERM is noted: `asked_to_end` tells of it between two steps, and `end` obeys it."""
    installed = _ending.install()
    _ending.saving += 1
    try:
        yield
    except BaseException:
        _ending.leave(installed)
        raise
    if _ending.leave(installed):  # it came behind the last checkpoint
        os.kill(os.getpid(), signal.SIGTERM)


def asked_to_end() -> bool:
    """Return whether SIGTERM came, and waits for a checkpoint."""
    return _ending.asked


def end() -> None:
    """Do what SIGTERM did before it was noted: it ends a command, and a worker of Ray as a process."""
    if _in_main_thread():
        _ending.note(signal.SIGTERM, None)
    else:
        os.kill(os.getpid(), signal.SIGTERM)
