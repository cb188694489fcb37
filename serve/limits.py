"""What a request may cost: checked while it arrives, and before anything is made of it."""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safer_ray.config import Frozen
from serve.problems import Problem, respond_with
from serve.scope import path_of

# Up to the next bracket or comma outside strings, or to the end; a string that nothing ends goes on to there. Nothing
# is given back or looked at twice, since a body of quotes and backslashes would cost its length squared.
SIGN = re.compile(rb'(?:[^"\[\]{},]++|"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z))*+([\[\]{},]|\Z)', re.DOTALL)
OPENING = (b"[", b"{")

Count = Annotated[int, Field(gt=0)]


class Limits(Frozen):
    """Of a request; those of a text are told pair by pair, all others refuse the request."""

    body_bytes: Count = 4 * 2**20
    upload_bytes: Count = 16 * 2**20  # of a file that the page takes
    sign_in_bytes: Count = 4 * 2**10  # of the form that strangers may send
    pairs: Count = 100
    chars: Count = 500_000  # of all texts
    text_chars: Count = 20_000  # of a prompt or response
    depth: Count = 8  # of JSON; a request has 5 levels
    values: Count = 50_000  # lists and objects
    members: Count = 100_000  # items and keys of these; each that is wrong costs an error of its own
    receive_s: Annotated[float, Field(gt=0)] = 20.0  # a body must have come by then
    answer_s: Annotated[float, Field(gt=0)] = 60.0  # and an answer

    def of_body(self, path: str) -> int:
        """Bytes that a body sent to this path may have."""
        return {"/upload": self.upload_bytes, "/sign-in": self.sign_in_bytes}.get(path, self.body_bytes)


LimitsOf = Callable[[], Limits]  # those of now


class TooLarge(Problem):
    """A body over its limit."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body has more than {limit:,} bytes; send fewer pairs a request")


class LimitBodies:
    """ASGI middleware: a body is read whole before the application runs, refused by what it declares or by what has
    come, and given up when it comes too slowly."""

    def __init__(self, app: ASGIApp, limits: LimitsOf) -> None:
        self.app = app
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        limits = self.limits()
        limit = limits.of_body(path_of(scope))
        try:
            _check_declared(scope, limit)
            async with asyncio.timeout(limits.receive_s):
                body = await _read(receive, limit)
        except Problem as problem:
            await respond_with(problem)(scope, receive, send)
            return
        except TimeoutError:
            slow = Problem(408, f"the body did not come within {limits.receive_s:g} s; send it again")
            await respond_with(slow)(scope, receive, send)
            return
        if body is None:
            return
        await self.app(scope, _replay(body, receive), send)


def _check_declared(scope: Scope, limit: int) -> None:
    """Raises Problem where the Content-Length is too large or no number."""
    for name, value in scope["headers"]:
        if name == b"content-length":
            if not value.isdigit():
                raise Problem(400, "Content-Length is no number")
            if len(value) > 15 or int(value) > limit:
                raise TooLarge(limit)


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The body; None where the client went away."""
    chunks, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise TooLarge(limit)
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(body: bytes, receive: Receive) -> Receive:
    """What an application receives when the body is there already."""
    told = False

    async def again() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
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
    chars = sum(chars_of(text) for pair in pairs if isinstance(pair, dict) for text in pair.values())
    if chars > limits.chars:
        raise Problem(413, f"{chars:,} characters in all, at most {limits.chars:,} are taken; send fewer pairs")


def chars_of(text: Any) -> int:
    """Characters of a text, or of all roles and contents of its messages; 0 of what is neither."""
    if isinstance(text, str):
        return len(text)
    if not isinstance(text, list):
        return 0
    return sum(len(said) for m in text if isinstance(m, dict) for said in m.values() if isinstance(said, str))
