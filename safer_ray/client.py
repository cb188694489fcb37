"""A client of the scoring service: typed answers, and patience with a service that is busy or starts anew.

Needs httpx alone. Scoring changes nothing, so that a request may be sent again whenever no answer came.
"""

import email.utils
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import httpx

from safer_ray.errors import SaferError

PASSING = frozenset({429, 500, 502, 503, 504})  # busy, or gone while it answered


class ServiceError(SaferError):
    """The service refused a request, or gave no answer however often it was asked; `status` is None without one."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Contribution(NamedTuple):
    """The share of a feature in a pair's score; negative ones make it suspicious."""

    feature: int
    name: str
    sign: int  # 1: fires on safe responses; -1: on unsafe ones
    contribution: float


class Span(NamedTuple):
    """A sentence, and what it adds to the score: `[start:end]` of the text in `column` of the pair as sent, or of
    the content of its message `message` where the column holds a list."""

    side: Literal["chosen", "rejected"]
    part: Literal["prompt", "response"]
    message: int
    start: int
    end: int
    contribution: float
    features: list[int]
    column: str | None = None  # None: of a service that takes no other layout than prompt, chosen, rejected


@dataclass(frozen=True)
class Scored:
    """A pair with its score; `suspicion` is in [0, 1], 1 worst, `percentile` in [0, 100], low worst."""

    id: str
    score: float
    percentile: float
    suspicion: float
    flag: bool
    decision: Literal["keep", "review"]
    reward_chosen: float
    reward_rejected: float
    reward_margin: float
    truncated: bool
    features: list[Contribution] | None = None
    spans: list[Span] | None = None
    notes: list[str] = field(default_factory=list)  # on how the texts were read: markup that was unwrapped, or is left


@dataclass(frozen=True)
class Failed:
    """A pair without a score, and why."""

    id: str
    code: str
    detail: str


class Patience(NamedTuple):
    """The time that a client goes on asking."""

    tries: int = 8
    first_s: float = 0.25  # before the second try; twice as long before each next one, less up to half by chance
    longest_s: float = 8.0
    longest_asked_s: float = 60.0  # where the service asks for more: a key's limits are by the minute


class Client:
    """`with Client("http://127.0.0.1:8000") as client: client.score(pairs)`."""

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        token: str | None = None,
        *,
        timeout_s: float = 90.0,
        patience: Patience = Patience(),  # noqa: B008  # a value
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.patience = patience
        self.http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.http.close()

    def score(
        self,
        pairs: Iterable[Mapping[str, Any]],
        *,
        explain: bool = False,
        at_once: int = 32,
        format: str = "auto",
        carried: Sequence[str] = (),
    ) -> list[Scored | Failed]:
        """The outcome of each pair, in order, by requests of `at_once` pairs.

        A pair is `{id?, prompt, chosen, rejected}`, each text or messages, or a row of any other format of one pair a
        row, recognised by its columns or named by `format`. `carried` are columns that look like a part of the prompt
        and are none.

        Raises:
            ServiceError: a request was refused, or got no answer.
        """
        asked = ({} if format == "auto" else {"format": format}) | ({"carried": [*carried]} if carried else {})
        outcomes: list[Scored | Failed] = []
        for sent in _chunks(pairs, at_once):
            answer = self._ask("POST", "/v1/score", {"pairs": sent, "explain": explain, **asked})
            outcomes += [read_outcome(result) for result in answer["results"]]
        return outcomes

    def auditor(self) -> dict[str, Any]:
        """The bundle that pairs are scored by."""
        return dict(self._ask("GET", "/v1/auditor"))

    def features(self) -> list[dict[str, Any]]:
        """The features that make up the score."""
        return list(self._ask("GET", "/v1/features")["features"])

    def feature(self, feature_id: int) -> dict[str, Any]:
        """One of them, with contexts and histogram."""
        return dict(self._ask("GET", f"/v1/features/{feature_id}"))

    def ready(self) -> bool:
        """Return whether the service answers that it is ready; asks once."""
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of an answer, however often the service has to be asked.

        Raises:
            ServiceError: it refuses, or the patience is at its end.
        """
        reason, status, wait = "", None, 0.0
        for attempt in range(self.patience.tries):
            time.sleep(wait)
            try:
                answer = self.http.request(method, path, json=body)
            except httpx.TransportError as error:
                reason, status, wait = f"{type(error).__name__}: {error}", None, pause(self.patience, attempt, None)
                continue
            if answer.is_success:
                return answer.json()
            reason, status = detail_of(answer), answer.status_code
            if status not in PASSING:
                raise ServiceError(f"{method} {self.http.base_url.join(path)} was refused: {status}, {reason}", status)
            wait = pause(self.patience, attempt, answer.headers.get("Retry-After"))
        tries = f"{self.patience.tries} tries"
        raise ServiceError(
            f"no answer from {self.http.base_url.join(path)} in {tries}: {status or ''} {reason}", status
        )


def _chunks(pairs: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for number, pair in enumerate(pairs):
        own = {} if pair.get("id") is not None else {"id": str(number)}
        chunk.append({**pair, **own})
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def read_outcome(result: Mapping[str, Any]) -> Scored | Failed:
    """One result of an answer; keys that a later service adds are left out."""
    if "error" in result:
        return Failed(result["id"], result["error"]["code"], result["error"]["detail"])
    known = {name: result[name] for name in Scored.__dataclass_fields__ if name in result}
    for name, kind in (("features", Contribution), ("spans", Span)):
        if known.get(name) is not None:
            known[name] = [kind(**{key: row[key] for key in kind._fields if key in row}) for row in known[name]]
    return Scored(**known)


def detail_of(answer: httpx.Response) -> str:
    """Return what a problem says, or the status alone."""
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase


def pause(patience: Patience, attempt: int, asked: str | None) -> float:
    """Seconds before the next try: what the service asked for, or longer each time; never twice the same, so that
    clients that were refused together do not come back together."""
    wait = min(patience.first_s * 2**attempt, patience.longest_s)
    if (told := seconds_of(asked)) is not None:
        wait = max(wait, min(told, patience.longest_asked_s))
        return wait + random.uniform(0.0, min(wait, patience.longest_s) / 2)
    return wait * random.uniform(0.5, 1.0)


def seconds_of(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which has seconds or a date."""
    if header is None:
        return None
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
