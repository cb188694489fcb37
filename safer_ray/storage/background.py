"""Threads: work that is repeated while something else goes on, and work that waits side by side."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


@contextlib.contextmanager
def heartbeat(seconds: float, work: Callable[[], None]) -> Iterator[None]:
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
        # A beat that is under way may write: nothing of it comes after the body.
        thread.join()


@contextlib.contextmanager
def prefetch(items: Iterable[Item], count: int) -> Iterator[Iterator[Item]]:
    """Inside, `items` are made in a thread, up to `count` of them before they are taken; what making one raises is
    raised where it is taken."""
    made: deque[Item | BaseException | None] = deque()  # None: there are no more
    room, there, stop = threading.Semaphore(count), threading.Semaphore(0), threading.Event()

    def tell(item: Item | BaseException | None) -> None:
        made.append(item)
        there.release()

    def make() -> None:
        iterator = iter(items)
        try:
            while True:
                room.acquire()
                if stop.is_set():
                    return
                tell(next(iterator))
        except StopIteration:
            tell(None)
        except BaseException as error:  # noqa: BLE001  # raised again where it is taken
            tell(error)
        finally:
            # Here, in the thread that ran it: a generator cannot be closed from another while it runs.
            if isinstance(iterator, Generator):
                iterator.close()

    def taken() -> Iterator[Item]:
        while True:
            there.acquire()
            item = made.popleft()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            # Only when the next one is asked for: until then the one taken is in memory, too.
            room.release()

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        # In this order: what waits for room sees that it is to end, and does not make one more.
        stop.set()
        room.release()
        thread.join()


def map_ordered(
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
