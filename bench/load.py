"""Bounded load on an HTTP service, from a process of its own: `python -m bench.load < ASKED > FOUND`, both JSON.

Requests are made before the clock starts and sent over plain sockets, so that the client costs little of the machine.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

HEAD = "POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
GIVE_UP_S = 60.0
LAST_CHUNK = b"0\r\n\r\n"  # of an answer that does not tell its length


class Answer(NamedTuple):
    status: int  # 0: none
    seconds: float
    at: float  # of the answer, since the start
    body: bytes


class Connection:
    """One request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body."""
        if self.streams is None:
            self.streams = await asyncio.open_connection(self.host, self.port)
        reader, writer = self.streams
        try:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").lower().split("\r\n")
            length = next((int(line.split(":")[1]) for line in lines if line.startswith("content-length:")), None)
            body = await (reader.readuntil(LAST_CHUNK) if length is None else reader.readexactly(length))
        except BaseException:
            self.close()
            raise
        if "connection: close" in lines:
            self.close()
        return int(lines[0].split()[1]), body

    def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
        self.streams = None


async def ask(connection: Connection, request: bytes, start: float) -> Answer:
    began = time.perf_counter()
    try:
        status, body = await asyncio.wait_for(connection.ask(request), GIVE_UP_S)
    except (OSError, asyncio.IncompleteReadError, TimeoutError):
        status, body = 0, b""
    now = time.perf_counter()
    return Answer(status, now - began, now - start, body)


async def closed_loop(
    requests: list[bytes], concurrency: int, seconds: float, address: tuple[str, int]
) -> list[Answer]:
    """So many clients, each sends its next request when it has its answer; all requests once, then again until the time
    is over."""
    answers: list[Answer] = []
    numbers = iter(range(10**9))
    start = time.perf_counter()

    async def client() -> None:
        connection = Connection(*address)
        while (number := next(numbers)) < len(requests) or time.perf_counter() - start < seconds:
            answers.append(await ask(connection, requests[number % len(requests)], start))
        connection.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


async def open_loop(requests: list[bytes], rate: float, seconds: float, address: tuple[str, int]) -> list[Answer]:
    """So many requests a second, whether answers come or not."""
    idle: list[Connection] = []
    answers: list[Answer] = []
    start = time.perf_counter()

    async def one(number: int) -> None:
        connection = idle.pop() if idle else Connection(*address)
        answers.append(await ask(connection, requests[number % len(requests)], start))
        idle.append(connection)

    tasks = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, start + number / rate - time.perf_counter()))
        tasks.append(asyncio.create_task(one(number)))
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return answers


def encode(body: dict[str, Any]) -> bytes:
    """A whole request."""
    content = json.dumps(body).encode()
    return HEAD.format(len(content)).encode() + content


def percentile(values: list[float], share: float) -> float | None:
    """The nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def summary(answers: list[Answer], pairs_a_request: int) -> dict[str, Any]:
    good = [answer for answer in answers if answer.status == 200]
    refused = [answer.seconds for answer in answers if answer.status == 429]
    span = max((answer.at for answer in good), default=0.0)
    return {
        "requests": len(answers),
        "statuses": dict(Counter(str(answer.status) for answer in answers)),
        "seconds": span,
        "pairs_per_s": len(good) * pairs_a_request / span if span else 0.0,
        **{f"p{int(100 * q)}_ms": _ms(percentile([a.seconds for a in good], q)) for q in (0.5, 0.95, 0.99)},
        "refused_p50_ms": _ms(percentile(refused, 0.5)),
        "refused_p99_ms": _ms(percentile(refused, 0.99)),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 2)


def main() -> None:
    asked = json.load(sys.stdin)
    requests = [encode({"pairs": pairs}) for pairs in asked["requests"]]
    address = (asked["host"], asked["port"])
    loop = open_loop if "rate" in asked else closed_loop
    pace = asked.get("rate") or asked["concurrency"]
    answers = asyncio.run(loop(requests, pace, asked["seconds"], address))
    found = summary(answers, len(asked["requests"][0]))
    if asked.get("keep"):
        found["bodies"] = [json.loads(a.body) if a.status == 200 else None for a in answers[: len(requests)]]
        found["each_ms"] = [1000 * a.seconds for a in answers[: len(requests)]]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
