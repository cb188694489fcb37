"""The door: which hosts and callers are answered, and how people sign in to the page."""

import time
from typing import Any
from urllib.parse import parse_qs, quote

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from safer_ray.service.auth import COOKIE, SESSION_S, Keys, bearer_of, is_own
from safer_ray.service.keys import Key
from safer_ray.service.problems import Problem, respond_with
from safer_ray.service.rate_limits import Caller, Rates
from safer_ray.service.render import sign_in_page
from safer_ray.service.scope import path_of

OPEN = ("/healthz", "/readyz", "/sign-in")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class Access:
    """ASGI middleware: /v1 wants a key where there are keys, the page a session, and forms must be the page's own.

    Without keys only `hosts` are answered, so that no page of another site reaches a service on loopback by a name that
    it made lead there.
    """

    def __init__(self, app: ASGIApp, keys: Keys, hosts: tuple[str, ...], rates: Rates) -> None:
        self.app = app
        self.keys = keys
        self.hosts = hosts
        self.rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(HTTPConnection(scope))
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, asked: HTTPConnection) -> Response | None:
        """Return what is answered in place of what was asked for; None: nothing stands against it."""
        path, method = path_of(asked.scope), asked.scope["method"]
        if self.hosts and host_of(asked.headers.get("host", "")) not in self.hosts:
            return respond_with(Problem(403, f"this service answers to {', '.join(self.hosts[:2])} only"))
        if path == "/v1" or path.startswith("/v1/"):
            return self._without_key(asked)
        if method not in SAFE_METHODS and not is_own(asked.headers, asked.scope.get("scheme", "http")):
            return respond_with(Problem(403, "this form was sent by another site"))
        if not self.keys or path in OPEN or path.startswith("/static/"):
            return None
        if key := self.keys.session_key(asked.cookies.get(COOKIE, "")):
            return self._admitted(asked, key)
        if method != "GET":
            return respond_with(Problem(401, "the session is over; sign in again"))
        return RedirectResponse(f"/sign-in?next={quote(path)}", 303)

    def _without_key(self, asked: HTTPConnection) -> Response | None:
        if not self.keys:
            return None
        token = bearer_of(asked.headers.get("authorization"))
        key = None if token is None else self.keys.key_of(token)
        if key is not None and key.is_open(time.time()):
            return self._admitted(asked, key)
        detail = (
            "no key" if token is None else "this key is none of the service's" if key is None else "this key expired"
        )
        wanted = {"WWW-Authenticate": "Bearer"}
        return respond_with(Problem(401, f"{detail}; send Authorization: Bearer TOKEN", wanted))

    def _admitted(self, asked: HTTPConnection, key: Key) -> Response | None:
        """A refusal where the key has asked enough for now; else the request bears who sent it."""
        try:
            self.rates.take_request(key)
        except Problem as problem:
            return respond_with(problem)
        asked.scope.setdefault("state", {})["caller"] = Caller(key, self.rates)
        return None


def host_of(header: str) -> str:
    """The name in a Host header, without its port."""
    name, _, port = header.rpartition(":")
    whole = name.endswith("]") or (name and ":" not in name)
    return (name if whole and port.isdigit() else header).lower()


def sign_in_routes(keys: Keys) -> APIRouter:
    """The form that takes a key for a session, and the way out."""
    router = APIRouter(include_in_schema=False)

    @router.get("/sign-in")
    async def form(next: str = "/") -> Response:
        return sign_in_page(next_path=own_path(next)) if keys else RedirectResponse("/", 303)

    @router.post("/sign-in")
    async def sign_in(request: Request) -> Response:
        sent = parse_qs((await request.body()).decode("utf-8", "replace"))
        token, path = (sent.get(name, [default])[0] for name, default in (("key", ""), ("next", "/")))
        name = keys.name_of(token.strip())
        if name is None:
            return sign_in_page(failed=True, next_path=own_path(path))
        answer = RedirectResponse(own_path(path), 303)
        answer.set_cookie(COOKIE, keys.open_session(name), **cookie_of(request))
        return answer

    @router.post("/sign-out")
    async def sign_out(request: Request) -> Response:
        answer = RedirectResponse("/sign-in", 303)
        answer.delete_cookie(COOKIE, **{k: v for k, v in cookie_of(request).items() if k != "max_age"})
        return answer

    return router


def cookie_of(request: Request) -> dict[str, Any]:
    """No script reads it, no other site sends it, and off loopback it travels encrypted only."""
    here = host_of(request.headers.get("host", "")) in LOOPBACK
    return {"max_age": SESSION_S, "httponly": True, "samesite": "strict", "secure": not here, "path": "/"}


def own_path(path: str) -> str:
    """A path of this service to go to; the front page in place of anything else."""
    plain = path.startswith("/") and not path.startswith("//") and "\\" not in path
    return path if plain and path.isascii() and path.isprintable() else "/"
