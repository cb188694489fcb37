"""The scoring service: `serve run serve.app:build auditor=DIR` answers POST /v1/score on loopback.

The scorer is the same batch function that `safer-ray audit` maps over fragments, so HTTP scores equal batch scores.
"""

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field
from ray import serve

from safer_ray import schema
from safer_ray.artifacts import open_artifact
from safer_ray.auditor import AuditPairs, check_auditor
from safer_ray.config import ScoresConfig

api = FastAPI(title="safer_ray", version="1")


class Pair(BaseModel):
    """A preference pair as text; the prompt is one user turn."""

    id: str = ""
    prompt: str = Field(max_length=20_000)
    chosen: str = Field(min_length=1, max_length=20_000)
    rejected: str = Field(min_length=1, max_length=20_000)


class ScoreRequest(BaseModel):
    pairs: list[Pair] = Field(min_length=1, max_length=100)


def as_row(pair: Pair, number: int) -> dict[str, Any]:
    """A request's pair in the PAIRS schema."""
    return {
        "pair_id": pair.id or str(number),
        "row_key": f"request#{number}",
        "prompt": [{"role": "user", "content": pair.prompt}] if pair.prompt else [],
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
    }


@serve.deployment(max_ongoing_requests=8, max_queued_requests=64)
@serve.ingress(api)
class Scorer:
    """One auditor in one replica."""

    def __init__(self, auditor: str) -> None:
        bundle = open_artifact(Path(auditor), "auditor")
        check_auditor(bundle)
        self.score_pairs = AuditPairs(bundle, ScoresConfig())

    @api.post("/v1/score")
    def score(self, request: ScoreRequest) -> list[dict[str, Any]]:
        """Score, suspicion (1 is worst), flag, decision and reasons of each pair, in the order sent."""
        rows = [as_row(pair, number) for number, pair in enumerate(request.pairs)]
        return self.score_pairs(schema.table(rows, schema.PAIRS)).drop_columns(["extra", "row_key"]).to_pylist()


def build(args: dict[str, str]) -> serve.Application:
    """The application for `serve run serve.app:build auditor=DIR`."""
    return Scorer.bind(args["auditor"])  # type: ignore[attr-defined]
