"""Headers that every answer carries, and the end of every error."""

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import internal_error, respond_with

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


class Headers:
    """ASGI middleware, the outermost: security headers on every answer; nothing but what is static may be kept by a
    cache; an error that nobody caught becomes a problem without a trace."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in ALWAYS.items():
                    headers[name] = value
                kept = "no-cache" if scope["path"].startswith("/static/") else "no-store"
                headers["Cache-Control"] = kept
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except Exception as error:  # noqa: BLE001  # whatever fails, no trace leaves this process
            problem = internal_error(error)
            if not begun:
                await respond_with(problem)(scope, receive, with_headers)
