"""Pairs of requests to outcomes, by the batch function that `safer-ray audit` maps over fragments: equal scores.

Texts are never logged, and no error that a pair causes leaves its own outcome.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa

from safer_ray import schema
from safer_ray.audit.score import AuditPairs
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.config.sections import ScoresConfig
from safer_ray.errors import SaferError
from safer_ray.features.explain import explain
from safer_ray.features.scoring import suspicion
from safer_ray.reward.forward import Forward
from safer_ray.reward.text import PairTokens
from safer_ray.service.problems import log_without_texts
from safer_ray.service.request_parsing import Outcome, Row
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.files import read_parquet

FIGURES = ("score", "suspicion", "flag", "decision", "reward_chosen", "reward_rejected", "reward_margin")


Score = Callable[[Sequence[Row]], list[Outcome]]


class ScorePairs(AuditPairs):
    """Rows -> outcomes: one forward pass, and the arithmetic of an audit.

    A config that is set while it works counts from the next call on.
    """

    def __init__(self, auditor: Artifact, config: ScoresConfig, reading: Reading = AS_IT_COMES) -> None:
        super().__init__(auditor, config, reading=reading)
        self.scores = read_parquet(auditor.path / "reference.parquet", ["score"])["score"].drop_null().to_numpy()

    def configure(self, config: ScoresConfig) -> None:
        super().configure(config.model_copy(update={"reasons": 0}))  # `explain` tells more
        self.reasons = config.reasons

    def coded(self, pairs: pa.Table, tokens: list[PairTokens], found: Forward) -> pa.Table:
        self.codes = super().coded(pairs, tokens, found)
        return self.codes

    def outcomes(self, rows: Sequence[Row]) -> list[Outcome]:
        """Return the outcome of each row in order; one that the model cannot read has the reason in place of
        figures."""
        every = [row._asdict() | {"pair_id": str(i), "row_key": str(i)} for i, row in enumerate(rows)]
        scored, reasons = self.read(schema.table(every, schema.PAIRS))
        found = iter(self._told(scored, [(rows[i], said) for i, said in enumerate(every) if i not in reasons]))
        failed = {i: reason.replace(f"pair '{i}'", "this pair", 1) for i, reason in reasons.items()}
        return [Outcome(None, error=failed[i]) if i in failed else next(found) for i in range(len(rows))]

    def _told(self, scored: pa.Table | None, read: Sequence[tuple[Row, dict[str, Any]]]) -> list[Outcome]:
        """Return what is told of the rows that were scored."""
        if scored is None:
            return []
        percentiles = 100 * (1 - suspicion(scored["score"].to_numpy(), self.scores))
        columns = {name: scored[name].to_pylist() for name in FIGURES}
        columns |= {"percentile": percentiles.tolist(), "truncated": schema.truncated(self.codes).tolist()}
        figures = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        asked = [i for i, (row, _) in enumerate(read) if row.explain]
        codes, pairs = self.codes.take(pa.array(asked, pa.int64())), [read[i][1] for i in asked]
        told = explain(codes, self.score.features, pairs, self.reward.pairs, self.reasons) if asked else []
        explanations = dict(zip(asked, told, strict=True))
        return [Outcome(values, explanations.get(i)) for i, values in enumerate(figures)]


def score_rows(score: Score, rows: Sequence[Row]) -> list[Outcome]:
    """The outcome of each row; where scoring fails the rows are halved until only bad ones are left.

    One call scores n good rows; a bad one among them costs about 2 log2(n) calls more, on ever fewer rows.
    """
    if not rows:
        return []
    try:
        return score(rows)
    except Exception as error:  # noqa: BLE001  # whatever a pair does, the others get their scores
        if len(rows) == 1:
            return [Outcome(None, error=reason_of(error))]
    half = len(rows) // 2
    return score_rows(score, rows[:half]) + score_rows(score, rows[half:])


def reason_of(error: Exception) -> str:
    """An error as one line without any text of the pair, which messages of foreign libraries may quote."""
    if isinstance(error, SaferError):
        return str(error).replace("pair '0'", "this pair", 1)
    log_without_texts(error)
    return f"this pair cannot be scored ({type(error).__name__})"


def score_requests(score: Score, requests: Sequence[Sequence[Row]]) -> list[list[Outcome]]:
    """Outcomes request by request, from one call for all their rows."""
    outcomes = score_rows(score, [row for request in requests for row in request])
    cuts = accumulate(map(len, requests), initial=0)
    return [outcomes[start:stop] for start, stop in pairwise(cuts)]
