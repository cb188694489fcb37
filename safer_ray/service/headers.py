"""Headers that every answer carries, and the end of every error."""

import time
from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from safer_ray.service.problems import internal_error, respond_with
from safer_ray.service.scope import path_of

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'; connect-src 'self'"
)
ALWAYS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}


OnAnswer = Callable[[str, int, float], None]  # route, status, seconds


class Headers:
    """ASGI middleware, the outermost: security headers on every answer; nothing but what is static may be kept by a
    cache; an error that nobody caught becomes a problem without a trace."""

    def __init__(self, app: ASGIApp, on_answer: OnAnswer | None = None) -> None:
        self.app = app
        self.on_answer = on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.perf_counter(), 0
        kept = "no-cache" if path_of(scope).startswith("/static/") else "no-store"  # before mounts change the scope

        async def with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in ALWAYS.items():
                    headers[name] = value
                headers["Cache-Control"] = kept
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception as error:  # noqa: BLE001  # whatever fails, no trace leaves this process
            problem = internal_error(error)
            if not status:
                await respond_with(problem)(scope, receive, with_headers)
        finally:
            if self.on_answer is not None:
                route = getattr(scope.get("route"), "path", "other")  # never what somebody thought of
                self.on_answer(route, status, time.perf_counter() - began)
