"""Hostile requests to the service, in process: `python -m bench.fuzz_serve [--requests 50000] [--auditor DIR]`.

A tenth schemathesis makes from the OpenAPI document, valid and invalid; the others were valid once: cut, flipped,
nested, swollen, of other encodings, types, methods and paths; one in a hundred is as large as the service takes, and of
what may be dear to read. Prints what they were answered; ends with 1 where a request was answered 500, took longer than
HANG_S, one that is refused unread more than COSTLY_S a MiB of processor time, was told a stack trace, or got an answer
that is not documented.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode, openapi
from schemathesis.core.failures import FailureGroup
from schemathesis.core.result import Ok
from starlette.testclient import TestClient

from bench.common import local_path
from safer_ray.service.http import create_api
from safer_ray.service.request_limits import Limits
from safer_ray.service.service import LocalService

HANG_S = 20.0
GENERATED = 10  # one in so many
COSTLY = 100  # one in so many
COSTLY_S = 0.5  # of processor time a MiB; what takes the square of its length takes hours
TRACES = ("Traceback (most recent call last)", 'File "/', ".py:", "site-packages")
PAIR = {
    "id": "a",
    "prompt": "How do I pick a lock?",
    "chosen": "Take a wrench.",
    "rejected": "I cannot help with that.",
}
CALL = {"type": "function", "function": {"name": "a", "arguments": {"b": [1]}}}
PAIRS: tuple[dict[str, Any], ...] = (  # of several layouts
    PAIR,
    PAIR,
    {"system": "Be kind.", "question": "Why?", "chosen": "So.", "rejected": "No.", "id": 7},
    {"prompt": [{"role": "user", "content": "Hi", "name": None}], "chosen": "Hello.", "rejected": [
        {"role": "assistant", "content": None, "tool_calls": [CALL]}
    ]},
    {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Yes."}, "rejected": "No"},
    {"chosen": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.", "rejected": json.dumps(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "No."}]
    )},
    {"prompt": "Hi", "response_1": "Yes.", "response_2": "No.", "preference_strength": 2},
    {"prompt": json.dumps(["Hi"]), "response_a": json.dumps(["Yes."]), "response_b": "No.", "winner": "model_a"},
    {"prompt": "Hi", "answers": [{"answer": "Yes.", "rank": 1}, {"answer": "No.", "rank": 2}]},
    {"input": "Hi", "targets": {"choices": ["Yes.", "No."], "labels": [1, 0]}},
    {"prompt": "Hi", "completion": "Yes.", "label": True},
    {"id": 1, "prompt": "Hi", "chosen": ["Yes."] * 3, "rejected": ["No."] * 3, "domain": "chat"},
)  # fmt: skip
TURNS = "\n\nHuman: Hi\n\nAssistant: Hello. What is it?\n\nHuman: A lock.\n\nAssistant:"
ODD: tuple[Any, ...] = (
    "", " ", "\x00", "\ud800", "\u202e\u2066", "<script>alert(1)</script>", "{{7*7}}", "</s><|im_end|>",
    "\ue0000\ue001",
    "." * 400, "\n" * 400, " \n" * 200, "a" * 25_000, TURNS, 0, -1, 1e308, 10**40, True, None, [], {}, [[]], [{}],
    [{"role": "", "content": ""}], [{"role": "user", "content": None}], [{"role": "tool", "content": "x."}] * 50,
    {"role": "user", "content": "x"}, [TURNS], float("nan"), [CALL], '[{"role": ' + "[" * 9_000, "[INST] a",
    '[{"role": "user", "content": "\\ud800"}]', "<|im_start|>user\nHi<|im_end|>" + " " * 9_000 + "x",
)  # fmt: skip
TYPES = (
    "application/json",
    "application/json; charset=utf-16",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "multipart/form-data; boundary=x",
    "application/problem+json",
    "",
    "\xff/\xff",
)
PATHS = (
    "/v1/score",
    "/v1/score",
    "/v1/score",
    "/v1/score",
    "/",
    "/upload",
    "/sign-in",
    "/v1/features/0",
    "/v1/../v1/score",
)


class Account:
    """Counts of the answers, and the answers that should not have been."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.wrong: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.slowest_s, self.slowest = 0.0, ""

    def note(self, what: str, example: str) -> None:
        self.wrong[what] += 1
        self.examples.setdefault(what, example[:500])

    def take(self, kind: str, status: int, text: str, seconds: float, asked: str) -> None:
        self.statuses[f"{kind} {status}"] += 1
        if seconds > self.slowest_s:
            self.slowest_s, self.slowest = seconds, asked[:200]
        if status >= 500:
            self.note(f"answered {status}", asked)
        if seconds > HANG_S:
            self.note("hang", asked)
        if status >= 400 and any(trace in text for trace in TRACES):
            self.note("stack trace", text)


def generated(app: Any, account: Account, count: int) -> None:
    """Requests from the document; each answer must be one that it knows."""
    schema = openapi.from_asgi("/v1/openapi.json", app)
    operations: list[Any] = [found.ok() for found in schema.get_all_operations() if isinstance(found, Ok)]
    weights = [6 if operation.method == "post" else 1 for operation in operations]
    for operation, weight in zip(operations, weights, strict=True):
        for mode in GenerationMode:
            if mode == GenerationMode.NEGATIVE and operation.method == "get" and "{" not in operation.path:
                continue  # nothing in it can be wrong
            ask_generated(operation, mode, account, max(1, count * weight // (2 * sum(weights))))


def ask_generated(operation: Any, mode: Any, account: Account, count: int) -> None:
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        began = time.perf_counter()
        answer = case.call()
        account.take("generated", answer.status_code, answer.text, time.perf_counter() - began, str(case.body))
        try:
            case.validate_response(answer)
        except FailureGroup as group:
            for failure in group.exceptions:
                account.note(f"{type(failure).__name__} at {operation.label}", str(failure))

    ask()


def mutations(seed: int) -> Iterator[tuple[str, str, bytes, dict[str, str]]]:
    """Method, path, body and headers, for ever."""
    draw = random.Random(seed)
    changes: tuple[Callable[[random.Random, bytes], bytes], ...] = (
        lambda r, b: b[: r.randrange(len(b) + 1)],
        lambda r, b: bytes(c ^ (1 << r.randrange(8)) if r.random() < 0.02 else c for c in b),
        lambda r, b: b.replace(b"{", b"[" * r.randrange(1, 40), r.randrange(1, 4)),
        lambda r, b: r.randbytes(r.randrange(200)) + b,
        lambda r, b: b.decode().encode("utf-16"),
        lambda r, b: b * r.randrange(2, 50),
        lambda r, b: b,
        lambda r, b: b,
    )
    while True:
        pairs: list[Any] = [dict(draw.choice(PAIRS)) for _ in range(draw.choice((0, 1, 1, 2, 5, 101)))]
        for pair in pairs:
            if draw.random() < 0.6:
                pair[draw.choice((*pair, "id", "prompt", "system", "more"))] = draw.choice(ODD)
            if draw.random() < 0.05:
                pair.pop(draw.choice(list(pair)))
        if pairs and draw.random() < 0.1:
            pairs[draw.randrange(len(pairs))] = draw.choice(ODD)
        tree = {"pairs": pairs, "explain": draw.choice((True, False, False, 1, None))}
        tree = draw.choice((tree, tree, tree, tree, tree, {"pairs": draw.choice(ODD)}, draw.choice(ODD)))
        content = draw.choice(changes)(draw, json.dumps(tree).encode())
        kind = TYPES[0] if draw.random() < 0.8 else draw.choice(TYPES)
        headers = {"content-type": kind.encode("latin-1").decode("latin-1")}
        if draw.random() < 0.05:
            headers["content-length"] = draw.choice(("0", "-1", "99999999999", "x", "1e3", str(len(content) + 5)))
        method = (
            "POST" if draw.random() < 0.95 else draw.choice(("GET", "PUT", "DELETE", "PATCH", "HEAD", "TRACE", "BREW"))
        )
        yield method, draw.choice(PATHS), content, headers


def mutated(app: Any, account: Account, count: int, seed: int) -> None:
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=True) as client:
        for _, (method, path, content, headers) in zip(range(count), mutations(seed), strict=False):
            began = time.perf_counter()
            asked = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
            try:
                answer = client.request(method, path, content=content, headers=asked, follow_redirects=False)
            except httpx.InvalidURL:
                continue
            took = time.perf_counter() - began
            account.take("mutated", answer.status_code, answer.text, took, f"{method} {path} {content[:300]!r}")


PART = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
FORM, FILE = {"content-type": TYPES[3]}, {"content-type": TYPES[5]}
JSON = {"content-type": TYPES[0]}
# What is repeated up to the limit of a body: path, headers, what stands before, units, what stands behind.
DEAR: tuple[tuple[str, dict[str, str], bytes, tuple[bytes, ...], bytes], ...] = (
    (
        "/v1/score", JSON, b"",
        (b'"', b'\\"', b"\\\\", b'""', b'"\\"', b"[", b"]", b"{", b",", b" ", b"[],", b'["'), b"",
    ),
    ("/v1/score", JSON, b'{"pairs": "', (b'\\"', b"\\\\", b"\\u0041", b"\\ud800", b"[", b'"'), b'"}'),
    ("/v1/score", JSON, b'{"pairs": [{"prompt": [', (b"null,", b"{},", b"0,", b"1e5,", b"[],", b'"",'), b"0]}]}"),
    ("/v1/score", JSON, b'{"pairs": [{', (b'"a":0,', b'"\\u0061":[],'), b'"b": 0}]}'),
    ("/v1/score", JSON, b'{"pairs": 0.', (b"9", b"0"), b"}"),
    ("/", FORM, b"row=", (b"&", b"a&", b"a=&", b";", b"%41", b"+", b"["), b""),
    ("/", FORM, b"prompt=", (b"%0A%0AHuman:", b"%0A", b".+", b"+"), b"&chosen=a&rejected=b"),
    ("/sign-in", FORM, b"key=", (b"a", b"&", b"a=1&", b"%"), b""),
    ("/upload", FILE, PART, (b"\n", b"\r", b"\r\n--", b"\r\n--x", b"{", b'"', b'\\"', b"{}\n"), b"\r\n--x--\r\n"),
    (
        "/upload", FILE, PART + b'{"chosen": "a", "rejected": "b", "prompt": "',
        (
            b"\\n\\nHuman: a", b"\\n\\nHuman:", b"\\n", b". ", b" ", b"\\\\", b"<|user|>a", b"[INST]a[/INST]", b"</s>",
            b"<|im_end|> ", b'{\\"role\\":',
        ),
        b'"}\r\n--x--\r\n',
    ),
    ("/upload", FILE, b"--x\r\n", (b"a: b\r\n", b"\r\n", PART, b"-"), b""),
)  # fmt: skip


def costly(app: Any, account: Account, count: int, seed: int) -> None:
    """Large requests, made of what is dear to read; processor time counts, since others may use the machine."""
    draw, limits = random.Random(seed), Limits()
    with TestClient(app, base_url="http://localhost") as client:
        for number in range(count):
            path, headers, head, units, tail = DEAR[number] if number < len(DEAR) else draw.choice(DEAR)
            unit, size = draw.choice(units), limits.of_body(path) // draw.choice((1, 1, 1, 4, 16))
            content = head + unit * ((size - len(head) - len(tail)) // len(unit)) + tail
            began, processor = time.perf_counter(), time.process_time()
            answer = client.request("POST", path, content=content, headers=headers, follow_redirects=False)
            took, used = time.perf_counter() - began, time.process_time() - processor
            asked = f"POST {path} {head[-30:]!r} + {unit!r} * {len(content):,} bytes + {tail[-30:]!r}"
            account.take("costly", answer.status_code, answer.text, took, asked)
            if answer.status_code >= 400 and used > COSTLY_S * max(1.0, len(content) / 2**20):
                account.note("dear", f"{used:.1f} s of processor time: {asked}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--auditor", type=local_path, help="by default the newest in runs/demo")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found = sorted(Path("runs/demo").glob("auditor-*"), key=lambda path: path.stat().st_mtime)
    if not asked.auditor and not found:
        sys.exit("no bundle in runs/demo; run make demo first, or pass --auditor DIR")
    app = create_api(LocalService(asked.auditor or found[-1]))
    account, began = Account(), time.perf_counter()
    generated(app, account, asked.requests // GENERATED)
    costly(app, account, asked.requests // COSTLY, asked.seed)
    mutated(app, account, asked.requests - account.statuses.total(), asked.seed)
    for name, number in sorted(account.statuses.items()):
        print(f"{number:>7,}  {name}")
    total, seconds = account.statuses.total(), time.perf_counter() - began
    print(f"{total:>7,}  requests in {seconds:.0f} s, the slowest {account.slowest_s:.2f} s: {account.slowest}")
    for what, number in account.wrong.most_common():
        print(f"WRONG {number:,} x {what}, for example: {account.examples[what]}")
    print("no 500, no hang, no stack trace, no undocumented answer" if not account.wrong else "that is not well")
    sys.exit(1 if account.wrong else 0)


if __name__ == "__main__":
    main()
