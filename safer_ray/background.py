"""Threads: work that is repeated while something else goes on, and work that waits side by side."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


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


def side_by_side(
    function: Callable[[Item], Made], items: Iterable[Item], threads: int, begin: Callable[[], None] | None = None
) -> Iterator[Made]:
    """As `map`, with so many calls at once; no more than twice as many are ahead of the one that is taken. Where there
    are several threads, each does `begin` first."""
    if threads == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads, initializer=begin) as pool:
        ahead: deque[Future[Made]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) > 2 * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
