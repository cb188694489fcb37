"""The service as Ray Serve's ingress has it: reads and answers here, scores over a deployment handle."""

import asyncio
from collections.abc import Sequence

from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from safer_ray.service.api import FailedPair, ScoredPair
from safer_ray.service.arguments import ServiceConfig, Thresholds
from safer_ray.service.bundle_info import open_auditor, scores_config
from safer_ray.service.metrics import count_pairs
from safer_ray.service.problems import overloaded, too_late, unavailable
from safer_ray.service.request_limits import Limits
from safer_ray.service.request_parsing import Read, Row, Scored
from safer_ray.service.scorer import Busy
from safer_ray.service.service import BaseService, Results, answers, rows_of

TRIES = 4  # with a scorer that dies at work; scoring a pair again changes nothing


class RemoteService(BaseService):
    """Counts the requests under way and refuses, before anything is read, those that no scorer would have room for."""

    def __init__(self, scorer: DeploymentHandle, config: ServiceConfig) -> None:
        self.scorer = scorer
        self.room = -(-config.room // config.ingresses)
        self.under_way = 0
        bundle = open_auditor(config.auditor)
        scores = scores_config(bundle, config.detector, config.flag_quantile, config.reasons)
        self.limits: Limits = config.limits
        super().__init__(config.auditor, scores)

    def use(self, thresholds: Thresholds) -> None:
        """Other thresholds and limits from now on."""
        self.limits = thresholds.limits
        chosen = thresholds.detector, thresholds.flag_quantile, thresholds.reasons
        self.configure(scores_config(self.bundle, *chosen))

    def full(self) -> bool:
        return self.under_way >= self.room

    async def score(self, pairs: Sequence[Read | FailedPair], explain: bool) -> Results:
        if self.full():
            raise overloaded()
        self.under_way += 1
        try:
            rows = rows_of(pairs, explain)
            scored = await self._ask(rows) if rows else Scored(self.bundle.name, [], {}, self.bundle.red_team)
        finally:
            self.under_way -= 1
        results = answers(pairs, scored)
        good = [result for result in results if isinstance(result, ScoredPair)]
        failed = sum(isinstance(result, FailedPair) for result in results)
        count_pairs(len(good), failed, sum(result.flag for result in good))
        return results

    async def _ask(self, rows: list[Row]) -> Scored:
        """Return what a scorer says; another one is asked when it dies at work.

        Raises:
            Problem: 429, 503 or 504.
        """
        for _ in range(TRIES):
            response = self.scorer.score.remote(rows)
            try:
                scored = await asyncio.wait_for(response, self.limits.answer_s)
            except TimeoutError:
                response.cancel()
                raise too_late(self.limits.answer_s) from None
            except BackPressureError:
                raise overloaded() from None
            except (ActorUnavailableError, RayActorError):
                await asyncio.sleep(0.05)
                continue
            except DeploymentUnavailableError:
                raise unavailable("no scorer can be started; the service's log says why", 30) from None
            if isinstance(scored, Busy):
                raise overloaded()
            return scored
        raise unavailable("the scorer is gone and starts anew; try again")

    async def ready(self) -> bool:
        try:
            await self.scorer.state.remote()
        except (BackPressureError, RayActorError, ActorUnavailableError, DeploymentUnavailableError):
            return False
        return True
