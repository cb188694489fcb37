"""The deployment that has the model: batch after batch, in a thread beside the event loop, which stays free."""

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ray import serve

from safer_ray.config.reading import Reading
from safer_ray.service.arguments import ServiceConfig, Thresholds
from safer_ray.service.batch_queue import Gate
from safer_ray.service.bundle_info import details_of, open_auditor, scores_config
from safer_ray.service.metrics import measure_batch, measure_waiting, time_stage
from safer_ray.service.problems import log_at_once
from safer_ray.service.request_parsing import Outcome, Row, Scored

CHARS_PER_TOKEN = 4  # about; only batches are cut by it
MARKUP_TOKENS = 16  # of a pair
STUCK_S = 300.0  # a batch that takes longer never ends
NICE = 5  # those who read, answer and refuse come first
SWITCH_S = 0.001  # the event loop and the model take turns; by default, after five times as long
ALL_TOKENS = 10**9  # more than the gate lets through at once


class Busy(NamedTuple):
    """A scorer's answer when it has no room."""

    waiting: int


class Waiting(NamedTuple):
    """A request in the queue."""

    rows: list[Row]
    tokens: int


def tokens_of(rows: Sequence[Row]) -> int:
    """About how many tokens the model reads of them."""
    said = sum(len(m["content"]) for row in rows for part in (row.prompt, row.chosen, row.rejected) for m in part)
    return said // CHARS_PER_TOKEN + MARKUP_TOKENS * len(rows)


def batch_size(requests: Sequence[Waiting]) -> int:
    return sum(request.tokens for request in requests)


class Scorer:
    """The one Engine of a replica.

    `@serve.batch` cuts batches by its clock, while another one is at work; so that a busy scorer gets full ones and an
    idle one does not wait, requests enter its queue through a gate, when the model is free, as many as fit.
    """

    def __init__(self, config: ServiceConfig) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import torch

        from safer_ray.reward.checkpoints import quiet_transformers
        from safer_ray.service.scoring import ScorePairs, score_requests

        log_at_once()
        quiet_transformers()
        os.nice(NICE)
        sys.setswitchinterval(SWITCH_S)
        torch.set_num_threads(config.torch_threads)
        self.room = config.waiting
        self.bundle = open_auditor(config.auditor)
        self.names = {feature: detail.name for feature, detail in details_of(self.bundle).items()}
        self.pairs = ScorePairs(
            self.bundle, self._scores(Thresholds()), Reading(trust_remote_code=config.trust_remote_code)
        )
        self.score_requests = score_requests
        self.thread = ThreadPoolExecutor(
            max_workers=1, initializer=torch.set_num_threads, initargs=(config.torch_threads,)
        )
        self.gate = Gate(config.batch_tokens)
        self.began: float | None = None  # when the batch at work did
        self.counts: Counter[str] = Counter(batches=0, requests=0, pairs=0)

    def _scores(self, config: Thresholds) -> Any:
        return scores_config(self.bundle, config.detector, config.flag_quantile, config.reasons)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Other thresholds, from the next batch on; the model stays."""
        scores = self._scores(Thresholds.model_validate(config))
        await asyncio.get_running_loop().run_in_executor(self.thread, self.pairs.configure, scores)

    async def score(self, rows: list[Row]) -> Scored | Busy:
        """The outcome of each row, scored together with the requests that wait at the same time."""
        if len(self.gate) >= self.room:
            return Busy(len(self.gate))
        came, tokens = time.perf_counter(), tokens_of(rows)
        async with self.gate.passed(tokens):
            time_stage("queue", time.perf_counter() - came)
            outcomes = await self.score_batch(Waiting(rows, tokens))
        names = self.names if rows[0].explain else {}
        return Scored(self.bundle.name, outcomes, names, self.bundle.red_team)

    @serve.batch(max_batch_size=ALL_TOKENS, batch_wait_timeout_s=0, batch_size_fn=batch_size)
    async def score_batch(self, requests: list[Waiting]) -> list[list[Outcome]]:
        """Outcomes of each request; an exception would fail all requests of the batch, so pairs raise none."""
        self.began = time.perf_counter()
        try:
            loop, rows = asyncio.get_running_loop(), [request.rows for request in requests]
            outcomes = await loop.run_in_executor(self.thread, self.score_requests, self.pairs.outcomes, rows)
        finally:
            time_stage("score", time.perf_counter() - self.began)
            self.began = None
        self.counts.update(batches=1, requests=len(requests), pairs=sum(map(len, rows)))
        measure_batch(batch_size(requests))
        measure_waiting(len(self.gate))
        return outcomes

    async def state(self) -> dict[str, int]:
        """Return what this replica has done; an answer says that it is alive."""
        return {**self.counts, "waiting": len(self.gate)}

    def check_health(self) -> None:
        """Serve starts a replica anew whose batch does not end."""
        if self.began is not None and time.perf_counter() - self.began > STUCK_S:
            raise RuntimeError(f"a batch has been at work for more than {STUCK_S:g} s")
