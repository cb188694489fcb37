"""The scoring service: `serve run serve.app:build auditor=DIR` answers POST /v1/score on loopback.

`Api` reads requests and holds no model; `Scorer` joins what waits into one table and scores it in one call, by the same
batch function that `safer-ray audit` maps over fragments, so HTTP scores equal batch scores. Texts are never logged.
"""

import asyncio
import logging
import os
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Self

import pyarrow as pa
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig
from ray.serve.handle import DeploymentHandle

from safer_ray import schema
from safer_ray.artifacts import MANIFEST, Artifact, open_artifact
from safer_ray.config import Frozen, ScoresConfig
from safer_ray.errors import SaferError, UserError
from safer_ray.formats import Refused, read_pair
from safer_ray.read_config import explain_validation

MAX_PAIRS = 100  # of a request
MAX_CHARS = 20_000  # of a prompt or response, over its messages
MAX_TOTAL_CHARS = 500_000  # of a request
MAX_MESSAGES = 200  # of a prompt or response
MAX_ID_CHARS = 200
ANSWERED = ("score", "suspicion", "flag", "decision", "reward_chosen", "reward_rejected", "reward_margin", "reasons")
HEALTH_TIMEOUT_S = 5.0
SPARE_REQUESTS = 8  # that the ingress takes beyond what the scorers hold, health checks among them

Row = dict[str, Any]  # a pair in the PAIRS schema
Outcome = dict[str, Any]  # `id` with what is ANSWERED as in the SCORES schema, or with `error`
Score = Callable[[pa.Table], pa.Table]

logger = logging.getLogger("ray.serve")


def _kind(value: object) -> str | None:
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list) else None


class Message(BaseModel):
    role: str = Field(min_length=1)
    content: str


Text = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Message], Field(max_length=MAX_MESSAGES), Tag("messages")],
    Discriminator(
        _kind, custom_error_type="type", custom_error_message="wanted text or a list of {role, content} messages"
    ),
]


class Pair(BaseModel):
    """A text prompt is one user turn or a Human:/Assistant: transcript, a text response the assistant's answer."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, max_length=MAX_ID_CHARS, coerce_numbers_to_str=True)  # its position by default
    prompt: Text
    chosen: Text
    rejected: Text

    def chars(self) -> dict[str, int]:
        """Characters of each text, those of roles among them."""
        texts = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        return {k: len(t) if isinstance(t, str) else sum(len(m.role + m.content) for m in t) for k, t in texts.items()}

    @model_validator(mode="after")
    def _limits(self) -> Self:
        for name, chars in self.chars().items():
            if chars > MAX_CHARS:
                raise ValueError(f"{name} has {chars:,} characters, at most {MAX_CHARS:,} are allowed")
        return self


class ScoreRequest(BaseModel):
    pairs: list[Pair] = Field(min_length=1, max_length=MAX_PAIRS)

    @model_validator(mode="after")
    def _limits(self) -> Self:
        if (chars := sum(sum(pair.chars().values()) for pair in self.pairs)) > MAX_TOTAL_CHARS:
            raise ValueError(f"{chars:,} characters in all, at most {MAX_TOTAL_CHARS:,} are allowed; send fewer pairs")
        return self


def read_rows(pairs: Sequence[Pair]) -> list[Row]:
    """Each pair in the PAIRS schema, or `id` and `error` of one that `safer-ray audit` would quarantine."""
    read: list[Row] = []
    for number, pair in enumerate(pairs):
        pair_id = str(number) if pair.id is None else pair.id
        try:
            said = read_pair(pair.model_dump(exclude={"id"}), "canonical")
        except Refused as reason:
            read.append({"id": pair_id, "error": str(reason)})
        else:
            read.append({"pair_id": pair_id, "prompt": said.prompt, "chosen": said.chosen, "rejected": said.rejected})
    return read


def score_rows(score: Score, rows: Sequence[Row]) -> list[Outcome]:
    """The outcome of each row, by its `row_key`; where scoring fails the rows are halved until only bad ones are left.

    One call scores n good rows; a bad one among them costs about 2 log2(n) calls more, on ever fewer rows.
    """
    if not rows:
        return []
    try:
        scored = {row["row_key"]: row for row in score(schema.table(list(rows), schema.PAIRS)).to_pylist()}
        return [{"id": r["pair_id"], **{k: scored[r["row_key"]][k] for k in ANSWERED}} for r in rows]
    except Exception as error:  # noqa: BLE001  # whatever a pair does, the others get their scores
        if len(rows) == 1:
            return [{"id": rows[0]["pair_id"], "error": explain(error)}]
    half = len(rows) // 2
    return score_rows(score, rows[:half]) + score_rows(score, rows[half:])


def explain(error: Exception) -> str:
    """An error as one line without any text of the pair, which messages of foreign libraries may quote."""
    if isinstance(error, SaferError):
        return str(error)
    *_, last = traceback.extract_tb(error.__traceback__)
    logger.warning("a pair could not be scored: %s at %s:%s", type(error).__name__, last.filename, last.lineno)
    return f"this pair cannot be scored ({type(error).__name__})"


def score_requests(score: Score, requests: Sequence[Sequence[Row]]) -> list[list[Outcome]]:
    """Outcomes request by request, from one table of all their rows; ids may repeat, within a request or across."""
    rows = [row for request in requests for row in request]
    outcomes = score_rows(score, [row | {"row_key": str(number)} for number, row in enumerate(rows)])
    cuts = accumulate(map(len, requests), initial=0)
    return [outcomes[start:stop] for start, stop in pairwise(cuts)]


class ServiceConfig(Frozen):
    """Arguments of `build`."""

    auditor: Path
    max_batch_size: Annotated[int, Field(gt=0)] = 8  # requests scored in one call
    batch_wait_s: Annotated[float, Field(ge=0, le=10)] = 0.01  # how long a request waits for company
    max_queued: Annotated[int, Field(gt=0)] = 32  # requests that wait for a scorer; more are answered 503
    timeout_s: Annotated[float, Field(gt=0)] = 60.0  # then a request is answered 504
    replicas: Annotated[int, Field(gt=0)] = 1  # scorers, each with the model
    num_cpus: Annotated[float, Field(gt=0)] = 1.0  # of a scorer
    threads: Annotated[int, Field(gt=0)] | None = None  # of torch in a scorer; num_cpus by default


class Scorer:
    """The model in one replica: batch after batch, in a thread beside the event loop, which stays free to answer.

    `@serve.batch` cuts batches while another one is at work, by its clock alone; so that a busy scorer gets full ones,
    requests enter its queue only when the model is free.
    """

    def __init__(self, config: ServiceConfig) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        from safer_ray.audit import AuditPairs

        torch.set_num_threads(config.threads or max(1, int(config.num_cpus)))
        self.score = AuditPairs(open_auditor(config.auditor), ScoresConfig())
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.free = asyncio.Event()
        self.free.set()
        self.counts: Counter[str] = Counter(batches=0, requests=0, pairs=0, failed=0)
        self.score_batch.set_max_batch_size(config.max_batch_size)  # type: ignore[attr-defined]
        self.score_batch.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]

    async def score_request(self, rows: list[Row]) -> list[Outcome]:
        """The outcome of each row, scored together with the requests that wait at the same time."""
        await self.free.wait()
        return await self.score_batch(rows)

    @serve.batch
    async def score_batch(self, requests: list[list[Row]]) -> list[list[Outcome]]:
        """Outcomes of each request; an exception would fail all requests of the batch, so pairs raise none."""
        self.free.clear()
        try:
            loop = asyncio.get_running_loop()
            outcomes = await loop.run_in_executor(self.thread, score_requests, self.score, requests)
        finally:
            self.free.set()
        failed = sum("error" in outcome for request in outcomes for outcome in request)
        self.counts.update(batches=1, requests=len(requests), pairs=sum(map(len, requests)), failed=failed)
        return outcomes

    async def health(self) -> dict[str, Any]:
        """What this replica has done."""
        return {"status": "ok", **self.counts}


api = FastAPI(title="safer_ray", version="1")


@api.exception_handler(RequestValidationError)
async def refuse(_request: Request, error: RequestValidationError) -> JSONResponse:
    """422 with the first problem in one line, the texts left out."""
    first, *rest = error.errors()
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ") + (f" (and {len(rest)} more)" if rest else "")
    return JSONResponse({"detail": f"{place.removeprefix('.')}: {message}"}, 422)


@serve.ingress(api)
class Api:
    """Reads and answers requests; imports neither torch nor the model."""

    def __init__(self, scorer: DeploymentHandle, auditor: str, timeout_s: float) -> None:
        self.scorer = scorer
        self.auditor = auditor
        self.timeout_s = timeout_s

    @api.post("/v1/score")
    async def score(self, request: ScoreRequest) -> dict[str, Any]:
        """`results`, in the order sent: each pair's score, suspicion (1 is worst), flag and reasons, or its error."""
        read = read_rows(request.pairs)
        rows = [row for row in read if "error" not in row]
        scored = iter(await self._ask(self.scorer.score_request.remote(rows), self.timeout_s) if rows else [])
        return {"auditor": self.auditor, "results": [row if "error" in row else next(scored) for row in read]}

    @api.get("/healthz")
    async def healthz(self) -> dict[str, Any]:
        """200 when a scorer answers in time, as one that is overloaded may not; with what it has done so far."""
        return {"auditor": self.auditor, **await self._ask(self.scorer.health.remote(), HEALTH_TIMEOUT_S)}

    async def _ask(self, response: Any, timeout_s: float) -> Any:
        """What the scorer answers; Serve makes 503 of its BackPressureError."""
        try:
            return await asyncio.wait_for(response, timeout_s)
        except TimeoutError:
            response.cancel()
            raise HTTPException(504, f"no answer within {timeout_s:g} s; send fewer pairs or try again") from None
        except RayActorError:
            raise HTTPException(503, "the scorer is gone and starts anew; try again", {"Retry-After": "5"}) from None


def read_args(args: Mapping[str, Any]) -> ServiceConfig:
    """Raises UserError on a key that is unknown or missing, or a value that cannot be."""
    known = list(ServiceConfig.model_fields)
    if unknown := sorted(args.keys() - set(known)):
        raise UserError(f"serve: unknown key {unknown[0]!r}; known are {', '.join(known)}")
    if not args.get("auditor"):
        raise UserError("serve: no auditor; write auditor=DIR, the bundle that stage `auditor` made")
    try:
        config = ServiceConfig.model_validate(dict(args))
    except ValidationError as error:
        raise explain_validation(error, "serve") from None
    return config.model_copy(update={"auditor": config.auditor.expanduser().resolve()})  # replicas run elsewhere


def open_auditor(path: Path) -> Artifact:
    """Raises UserError unless a bundle that this version reads is at `path`."""
    from safer_ray.auditor import check_auditor

    if path.exists() and not (path / MANIFEST).is_file():
        raise UserError(f"{path} is no auditor bundle ({MANIFEST} is missing); pass the directory of stage `auditor`")
    auditor = open_artifact(path, "auditor")
    check_auditor(auditor)
    return auditor


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run serve.app:build auditor=DIR [KEY=VALUE …]`; keys as in ServiceConfig.

    Raises:
        UserError: an unknown or missing key, a value that cannot be, or no readable bundle.
    """
    config = read_args(args)
    auditor = open_auditor(config.auditor)
    ongoing = 2 * config.max_batch_size  # of a scorer: a batch at work and one that waits
    overload = BackpressureConfig(status_code=503, retry_after_s=1)
    scorer = serve.deployment(
        num_replicas=config.replicas,
        max_ongoing_requests=ongoing,
        max_queued_requests=config.max_queued,
        backpressure_config=overload,
        ray_actor_options={"num_cpus": config.num_cpus},
    )(Scorer)
    ingress = serve.deployment(
        max_ongoing_requests=config.replicas * ongoing + config.max_queued + SPARE_REQUESTS,
        max_queued_requests=config.max_queued,
        backpressure_config=overload,
        ray_actor_options={"num_cpus": 0},
    )(Api)
    return ingress.bind(scorer.bind(config), auditor.name, config.timeout_s)
