"""SIGINT and SIGTERM: they end the service at whatever moment they come, with what was begun taken back.

Imports next to nothing, since it is there from the first moment on.
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Ended(BaseException):
    """Raised where the main thread is, as KeyboardInterrupt is; what stands above it takes back what it began."""


class Ending:
    """The end that a signal asked for. A second one changes nothing: the first is being followed."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.ready = False
        self._told = threading.Event()
        self._held = False

    def listen(self) -> None:
        """Take the signals, from whatever took them before."""
        for number in SIGNALS:
            signal.signal(number, self._tell)

    def ignore(self) -> None:
        """Let nothing disturb what is left of the process's end."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    @property
    def status(self) -> int:
        """Return what the process ends with: 0 where it was ready before the signal came."""
        return 0 if self.ready or self.number is None else 128 + self.number

    def tell(self) -> None:
        """Print what the signal came too early for."""
        if self.status:
            print("ended before the service was ready", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raises Ended where a signal came, also one whose exception somebody else caught."""
        if self.number is not None:
            raise Ended

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold a signal back until the body ends, which could not be left half done.

        Raises:
            Ended: one came.
        """
        self._held = True
        try:
            yield
        finally:
            self._held = False
            self.listen()
        self.check()

    def wait(self) -> None:
        """Return when a signal comes to the service, which is ready."""
        # Held from now on: the signal is the ordinary end, and nothing has to be thrown out of the middle of anything.
        self._held = self.ready = True
        self._told.wait()

    def _tell(self, number: int, _frame: object) -> None:
        if self.number is not None:
            return
        # Before it is raised: libraries catch BaseException here and there, and `check` finds it afterwards.
        self.number = number
        self._told.set()
        if not self._held:
            raise Ended
