"""Problem details as pages, for people: whatever refuses a request of a browser, it is told in HTML."""

import json
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safer_ray.service.problems import PROBLEM_JSON
from safer_ray.service.render import error_page
from safer_ray.service.scope import path_of

PROGRAMS = ("/v1/", "/healthz", "/readyz", "/openapi")  # paths that no browser's page is at


class ProblemPages:
    """ASGI middleware, outside all that answers problem details."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope).startswith(PROGRAMS) or not _wants_page(scope):
            await self.app(scope, receive, send)
            return
        held: list[Message] = []  # the start of a problem, and its body so far

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and _is_problem(message):
                held.append(message)
            elif not held:
                await send(message)
            else:
                held.append(message)
                if not message.get("more_body", False):
                    await _page_of(held)(scope, receive, send)

        await self.app(scope, receive, answer)


def _wants_page(scope: Scope) -> bool:
    return any(name == b"accept" and b"text/html" in value for name, value in scope["headers"])


def _is_problem(start: Message) -> bool:
    kinds = [value for name, value in start["headers"] if name.lower() == b"content-type"]
    return kinds == [PROBLEM_JSON.encode()]


def _page_of(held: list[Message]) -> Any:
    """The page that says what a problem says, with the headers that came along."""
    start, *parts = held
    problem = json.loads(b"".join(part.get("body", b"") for part in parts))
    page = error_page(start["status"], problem["detail"])
    page.raw_headers += [
        (name, value) for name, value in start["headers"] if name.lower() not in (b"content-type", b"content-length")
    ]
    return page
