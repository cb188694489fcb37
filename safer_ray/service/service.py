"""The service that routes and page ask: a Protocol that Ray Serve's ingress implements, and `LocalService`, which needs
no Ray."""

import asyncio
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from safer_ray.config.reading import Reading
from safer_ray.config.sections import DetectorOf, ScoresConfig
from safer_ray.features.bundle import check_code
from safer_ray.service.api import AuditorInfo, FailedPair, FeatureDetail, FeatureSummary, ScoredPair
from safer_ray.service.bundle_info import details_of, info_of, open_auditor, scores_config, summary_of
from safer_ray.service.request_parsing import Read, Row, Scored, answer

Result = ScoredPair | FailedPair


class Results(list[Result]):
    """One result a pair, in the order sent, and the auditor that scored them; while a service goes over to another
    bundle, it may not be the one that it tells of."""

    def __init__(self, results: Iterable[Result], auditor: str, red_team: bool = False) -> None:
        super().__init__(results)
        self.auditor = auditor
        self.red_team = red_team


class Service(Protocol):
    """Scores pairs that were read, and tells of the auditor that it scores them by.

    Raises:
        Problem: 429, 503 or 504 by `score`, where the whole request gets no answer.
    """

    async def score(self, pairs: Sequence[Read | FailedPair], explain: bool) -> Results: ...

    async def info(self) -> AuditorInfo: ...

    async def features(self) -> list[FeatureSummary]: ...

    async def feature(self, feature_id: int) -> FeatureDetail | None: ...

    def full(self) -> bool:
        """Return whether there is no room for another request."""
        ...

    async def health(self) -> bool:
        """Return whether this process answers."""
        ...

    async def ready(self) -> bool:
        """Return whether the bundle is loaded and a scorer answers in time."""
        ...


class BaseService:
    """A service without its scoring: it describes its bundle."""

    def __init__(self, auditor: Path, config: ScoresConfig) -> None:
        self.bundle = open_auditor(auditor)
        self.details = details_of(self.bundle)
        self.names = {feature: detail.name for feature, detail in self.details.items()}
        self.configure(config)

    def configure(self, config: ScoresConfig) -> None:
        self.config = config
        self.told = info_of(self.bundle, config)

    async def info(self) -> AuditorInfo:
        return self.told

    async def features(self) -> list[FeatureSummary]:
        return [summary_of(detail) for detail in self.details.values()]

    async def feature(self, feature_id: int) -> FeatureDetail | None:
        return self.details.get(feature_id)

    def full(self) -> bool:
        return False

    async def health(self) -> bool:
        return True


def answers(read: Sequence[Read | FailedPair], scored: Scored) -> Results:
    """In the order sent; what is scored are the pairs that could be read."""
    outcomes = iter(scored.outcomes)
    found = (pair if isinstance(pair, FailedPair) else answer(pair, next(outcomes), scored.names) for pair in read)
    return Results(found, scored.auditor, scored.red_team)


def rows_of(read: Sequence[Read | FailedPair], explain: bool) -> list[Row]:
    """Return what a scorer needs of the pairs that could be read."""
    pairs = (found.pair for found in read if isinstance(found, Read))
    return [Row(pair.prompt, pair.chosen, pair.rejected, explain) for pair in pairs]


class LocalService(BaseService):
    """Scores in this process, one request after the other."""

    def __init__(
        self,
        auditor: Path,
        *,
        detector: DetectorOf | None = None,
        flag_quantile: float = 0.05,
        reasons: int = 8,
        trust_remote_code: bool = False,
    ) -> None:
        from safer_ray.service.scoring import ScorePairs, score_rows

        bundle = open_auditor(auditor)
        config = scores_config(bundle, detector, flag_quantile, reasons)
        check_code(bundle, trust_remote_code)
        self.scorer = ScorePairs(bundle, config, Reading(trust_remote_code=trust_remote_code))
        self.score_rows = score_rows
        self.thread = ThreadPoolExecutor(max_workers=1)
        super().__init__(auditor, config)

    def configure(self, config: ScoresConfig) -> None:
        super().configure(config)
        self.scorer.configure(config)

    async def score(self, pairs: Sequence[Read | FailedPair], explain: bool) -> Results:
        loop, rows = asyncio.get_running_loop(), rows_of(pairs, explain)
        outcomes = await loop.run_in_executor(self.thread, self.score_rows, self.scorer.outcomes, rows)
        return answers(pairs, Scored(self.bundle.name, outcomes, self.names, self.bundle.red_team))

    async def ready(self) -> bool:
        return True
