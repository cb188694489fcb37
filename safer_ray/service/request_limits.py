"""Limits of what a request may cost: checked while it arrives, and before anything is made of it."""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safer_ray.config.sections import Frozen
from safer_ray.service.problems import Problem, overloaded, respond_with
from safer_ray.service.scope import path_of

# Up to the next bracket or comma outside strings, or to the end; a string that nothing ends goes on to there. Nothing
# is given back or looked at twice, since a body of quotes and backslashes would cost its length squared.
SIGN = re.compile(rb'(?:[^"\[\]{},]++|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))*+([\[\]{},]|\Z)', re.DOTALL)
OPENING = (b"[", b"{")

Count = Annotated[int, Field(gt=0)]


class Limits(Frozen):
    """Limits of a request; those of a text are told pair by pair, all others refuse the request."""

    body_bytes: Count = 4 * 2**20
    upload_bytes: Count = 16 * 2**20  # of a file that the page takes
    form_bytes: Count = 2**20  # of the page's form of one pair, whose texts are escaped in it
    sign_in_bytes: Count = 4 * 2**10  # of the form that strangers may send
    held_bytes: Count = 64 * 2**20  # of all bodies that a process holds at once; what would be more is answered 429
    pairs: Count = 100
    chars: Count = 500_000  # of all texts
    text_chars: Count = 20_000  # of a prompt or response: of its contents, where it is messages
    depth: Count = 12  # of JSON; a request has 5 levels, and tool calls with their arguments 4 more
    values: Count = 50_000  # lists and objects
    members: Count = 100_000  # items and keys of these; each that is wrong costs an error of its own
    receive_s: Annotated[float, Field(gt=0)] = 20.0  # a body must have come by then
    answer_s: Annotated[float, Field(gt=0)] = 60.0  # and an answer

    def of_body(self, path: str) -> int:
        """Bytes that a body sent to this path may have."""
        own = {"/": self.form_bytes, "/upload": self.upload_bytes, "/sign-in": self.sign_in_bytes}
        return own.get(path, self.body_bytes)


LimitsOf = Callable[[], Limits]  # those of now


class TooLarge(Problem):
    """A body over its limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body has more than {limit:,} bytes; send fewer pairs a request")


class Room:
    """The bytes of bodies that a process holds at once."""

    def __init__(self) -> None:
        self.held = 0

    @contextlib.contextmanager
    def part(self, most: int) -> Iterator[Callable[[int], None]]:
        """Hold what the function yielded is called with, until the body ends; it raises Problem 429 where all bodies
        together would be more than `most`, and none is held alone."""
        own = 0

        def take(size: int) -> None:
            nonlocal own
            # One body may always come in, or a limit below a single large body would refuse it for ever.
            if self.held > own and self.held + size > most:
                raise overloaded()
            self.held += size
            own += size

        try:
            yield take
        finally:
            self.held -= own


class LimitBodies:
    """ASGI middleware: a body is read whole before the application runs, refused by what it declares or by what has
    come, given up when it comes too slowly, and refused for now where others hold too much."""

    def __init__(self, app: ASGIApp, limits: LimitsOf) -> None:
        self.app = app
        self.limits = limits
        self.room = Room()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        limits = self.limits()
        limit = limits.of_body(path_of(scope))
        with self.room.part(limits.held_bytes) as take:
            try:
                _check_declared(scope, limit)
                async with asyncio.timeout(limits.receive_s):
                    replay = await _read(receive, limit, take)
            except Problem as problem:
                await respond_with(problem)(scope, receive, send)
                return
            except TimeoutError:
                slow = Problem(408, f"the body did not come within {limits.receive_s:g} s; send it again")
                await respond_with(slow)(scope, receive, send)
                return
            if replay is not None:
                await self.app(scope, replay, send)


def _check_declared(scope: Scope, limit: int) -> None:
    """Raises Problem where the Content-Length is too large or no number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise Problem(400, "Content-Length is no number")
            # By length first: Python refuses integers of thousands of digits with an error of its own.
            if len(value) > 15 or int(value) > limit:
                raise TooLarge(limit)


async def _read(receive: Receive, limit: int, take: Callable[[int], None]) -> Receive | None:
    """Return what an application receives in place of `receive` when the body has come; None: the client went away."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise TooLarge(limit)
        take(len(chunk))
        chunks.append(chunk)
        if not message.get("more_body", False):
            break

    async def again() -> Message:
        # Asked again, an application wants to hear that the client went away.
        if not chunks:
            return await receive()
        body = b"".join(chunks)
        chunks.clear()  # it is not held twice
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def check_nesting(body: bytes, limits: Limits) -> tuple[int, int]:
    """Count the lists and objects, and the commas between their items, of what claims to be JSON.

    Raises:
        Problem: it nests too deep, or holds too many of them.
    """
    depth = count = members = 0
    for found in SIGN.finditer(body):
        if found[1] == b",":
            members += 1
            if members >= limits.members:
                raise Problem(413, f"the JSON has more than {limits.members:,} items and keys; send fewer pairs")
        elif found[1] in OPENING:
            depth, count = depth + 1, count + 1
            if depth > limits.depth:
                raise Problem(422, f"the JSON is nested deeper than {limits.depth} levels")
            if count > limits.values:
                raise Problem(413, f"the JSON has more than {limits.values:,} lists and objects; send fewer pairs")
        else:
            depth -= 1
            if depth < 0:
                break  # a bracket too many, or the end: no JSON goes on from here
    return count, members


def read_json(body: bytes, limits: Limits) -> Any:
    """A body as JSON, its nesting counted before anything is made of it.

    Raises:
        Problem: nested too deep, too many values, or no JSON; no text of it is told.
    """
    check_nesting(body, limits)
    try:
        return json.loads(body, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Problem(422, "the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Problem(422, f"the body is no JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError):
        raise Problem(422, "the body is no JSON that is understood here") from None


def _no_constant(name: str) -> None:
    raise json.JSONDecodeError(f"{name} is no JSON", "", 0)


def check_sizes(tree: Any, limits: Limits) -> None:
    """Raises Problem where a request holds too many pairs or characters; what it is otherwise is not looked at."""
    pairs = tree.get("pairs") if isinstance(tree, dict) else None
    if not isinstance(pairs, list):
        return
    if len(pairs) > limits.pairs:
        raise Problem(413, f"{len(pairs):,} pairs, at most {limits.pairs:,} a request are taken; send fewer")
    chars = chars_of(pairs)
    if chars > limits.chars:
        raise Problem(413, f"{chars:,} characters in all, at most {limits.chars:,} are taken; send fewer pairs")


def chars_of(value: Any) -> int:
    """Return the characters of all texts in a value of JSON, however deep they lie."""
    return sum(map(len, texts_in(value)))


def texts_in(value: Any) -> Iterator[str]:
    """Yield all texts in a value of JSON, the keys of objects left out."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
