"""A proxy between a client and an object store that fails, cuts and delays the requests that a test chooses."""

import contextlib
import http.client
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"
INTERNAL = b"<Error><Code>InternalError</Code><Message>We encountered an error.</Message></Error>"
HOP = {"connection", "transfer-encoding", "keep-alive", "expect"}


class Request(NamedTuple):
    """What a client asks."""

    method: str
    path: str  # with the query
    number: int  # of requests of this method, from 1


class Fault(NamedTuple):
    """What happens to a request: after `delay` seconds a status, or a connection that is cut; else it is passed on."""

    delay: float = 0.0
    status: int = 0
    cut: str = ""  # "upload": before anything is passed on; "reply": in the middle of the answer; "answer": behind it


Rule = Callable[[Request], Fault | None]


class Proxy:
    """Passes requests on to `port`; `rule` decides the faults, `seen` lists the requests."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.rule: Rule = lambda request: None
        self.seen: list[Request] = []
        self.faults: list[Request] = []
        self.fetched: Counter[str] = Counter()  # bytes of answers to GET, by path
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def log_message(self, format: str, *args: object) -> None:
                """Says nothing."""

            def do_GET(self) -> None:
                proxy.pass_on(self)

            do_PUT = do_POST = do_DELETE = do_HEAD = do_GET  # noqa: N815

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]

    def count(self, method: str, part: str = "") -> int:
        return sum(request.method == method and part in request.path for request in self.seen)

    def reset(self) -> None:
        self.rule = lambda request: None
        self.seen, self.faults, self.fetched = [], [], Counter()

    def fault_of(self, method: str, path: str) -> Fault:
        with self._lock:
            request = Request(method, path, self.count(method) + 1)
            self.seen.append(request)
            fault = self.rule(request)
            if fault is not None:
                self.faults.append(request)
        return fault or Fault()

    def pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        fault = self.fault_of(handler.command, handler.path)
        if fault.cut == "upload":
            handler.rfile.read(min(100, int(handler.headers.get("Content-Length") or 100)))
            _cut(handler)
            return
        body = _body(handler)
        time.sleep(fault.delay)
        if fault.status:
            _answer(handler, fault.status, [], SLOW_DOWN if fault.status == 503 else INTERNAL)
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.target, timeout=60)
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in HOP}
        connection.request(handler.command, handler.path, body, headers)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        if handler.command == "GET":
            with self._lock:
                self.fetched[handler.path.partition("?")[0]] += len(content)
        if fault.cut == "answer":
            _cut(handler)
        elif fault.cut == "reply":
            _answer(handler, reply.status, reply.getheaders(), content, content[: len(content) // 2])
            _cut(handler)
        else:
            _answer(handler, reply.status, reply.getheaders(), content)


def _body(handler: BaseHTTPRequestHandler) -> bytes:
    """What a client sends, which may come in chunks."""
    if "chunked" not in (handler.headers.get("Transfer-Encoding") or ""):
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    pieces = []
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        pieces.append(handler.rfile.read(size))
        handler.rfile.readline()
    while handler.rfile.readline().strip():
        pass
    return b"".join(pieces)


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: list[tuple[str, str]],
    content: bytes,
    sent: bytes | None = None,
) -> None:
    handler.send_response_only(status)
    length = str(len(content))
    for name, value in headers:
        if name.lower() == "content-length":
            length = value  # of HEAD: that of the object
        elif name.lower() not in HOP:
            handler.send_header(name, value)
    handler.send_header("Content-Length", length)
    handler.end_headers()
    handler.wfile.write(content if sent is None else sent)
    handler.wfile.flush()


def _cut(handler: BaseHTTPRequestHandler) -> None:
    """End the connection as a broken network does: with a reset."""
    handler.close_connection = True
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


@contextlib.contextmanager
def proxied(port: int) -> Iterator[Proxy]:
    """A proxy in front of `port`, on a port of its own."""
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.server.shutdown()
        proxy.server.server_close()
        thread.join()
