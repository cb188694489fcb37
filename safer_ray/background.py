"""Work that is repeated in a thread while something else goes on."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def repeated(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    """While the body runs, `work` does every so many seconds, first after as many."""
    stop = threading.Event()

    def repeat() -> None:
        while not stop.wait(seconds):
            work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
