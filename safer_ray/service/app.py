"""The scoring service on Ray Serve: `python -m serve auditor=DIR` answers HTTP on loopback.

`Ingress` reads and answers requests and holds no model; `Scorer` has it, and scores what waits in one call, by the same
batch function that `safer-ray audit` maps over fragments, so HTTP scores equal batch scores. Texts are never logged.
"""

from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig, HTTPOptions
from ray.serve.handle import DeploymentHandle

from safer_ray.distributed.ray_internals import serve_client
from safer_ray.errors import UserError
from safer_ray.features.bundle import check_code
from safer_ray.service.access import LOOPBACK
from safer_ray.service.arguments import ServiceConfig, Thresholds, read_args
from safer_ray.service.auth import Keys, find_keys
from safer_ray.service.bundle_info import info_of, open_auditor, scores_config
from safer_ray.service.http import create_api
from safer_ray.service.keys import Key
from safer_ray.service.metrics import count_answer
from safer_ray.service.problems import log_at_once
from safer_ray.service.remote_service import RemoteService
from safer_ray.service.request_limits import Limits
from safer_ray.service.scorer import Scorer

SPARE = 16  # requests beyond its room that a replica takes, to refuse them itself, or to say that it is alive
ROUTER = {"initial_backoff_s": 0.005, "backoff_multiplier": 1.5, "max_backoff_s": 0.02}  # by default, half a second
OVERLOAD = BackpressureConfig(status_code=429, retry_after_s=1)
DRAIN_S = 60.0  # that a replica which is to go has for what it has begun


@serve.ingress()
class Ingress:
    """Keys, limits, reading and answering; imports neither torch nor the model."""

    def __init__(self, scorer: DeploymentHandle, config: ServiceConfig, listed: tuple[Key, ...]) -> None:
        log_at_once()
        self.config = config
        self.keys = Keys(config.keys, listed)
        check_binding(http_host(), bool(self.keys), config.insecure)
        self.service = RemoteService(scorer, config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        hosts = () if self.keys or self.config.insecure else LOOPBACK
        return create_api(self.service, self.limits, self.keys, hosts, count_answer, self.config.ingresses)

    def limits(self) -> Limits:
        return self.service.limits

    def reconfigure(self, config: dict[str, Any]) -> None:
        """Other thresholds, without a restart."""
        self.service.use(Thresholds.model_validate(config))


def http_host() -> str:
    """The address that Serve's proxies listen on, or will."""
    client = serve_client() if ray.is_initialized() else None
    host = client.http_config.host if client is not None else HTTPOptions().host
    return host or LOOPBACK[0]  # none: Serve has no proxies


def check_binding(host: str, keys: bool, insecure: bool) -> None:
    """Raises UserError where strangers could ask: no keys, and more than loopback."""
    if host.lower() not in LOOPBACK and not host.startswith("127.") and not keys and not insecure:
        raise UserError(
            f"serve: listening on {host} without keys would let strangers in; make one by `safer-ray key NAME` and "
            "pass keys=FILE (or SAFER_RAY_KEYS), listen on 127.0.0.1, or pass insecure=true"
        )


def build(args: dict[str, Any]) -> serve.Application:
    """The application for `serve run serve.app:build auditor=DIR [KEY=VALUE …]`; keys as in ServiceConfig.

    Raises:
        UserError: an unknown or missing key, a value that cannot be, no readable bundle or keys, a door left open.
    """
    config = read_args(args)
    bundle = open_auditor(config.auditor)
    check_code(bundle, config.trust_remote_code)
    info_of(bundle, scores_config(bundle, config.detector, config.flag_quantile, config.reasons))  # or it says why not
    keys = find_keys(config.keys)
    check_binding(http_host(), bool(keys), config.insecure)
    lasting, thresholds = config.lasting(), config.thresholds()
    scorer = serve.deployment(
        name="Scorer",
        max_ongoing_requests=config.waiting + SPARE,
        max_queued_requests=config.room,
        backpressure_config=OVERLOAD,
        request_router_config=ROUTER,
        autoscaling_config=autoscaling(config),
        user_config=thresholds,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": config.scorer_cpus, "num_gpus": config.scorer_gpus},
    )(Scorer)
    ingress = serve.deployment(
        name="Ingress",
        num_replicas=config.ingresses,
        max_ongoing_requests=config.room + SPARE,
        max_queued_requests=4 * SPARE,
        request_router_config=ROUTER,
        backpressure_config=OVERLOAD,
        user_config=thresholds,
        max_surge_percent=100,
        graceful_shutdown_timeout_s=DRAIN_S,
        ray_actor_options={"num_cpus": 0},
    )(Ingress)
    return ingress.bind(scorer.bind(lasting), lasting, keys.listed)


def autoscaling(config: ServiceConfig) -> AutoscalingConfig:
    """Another scorer where requests would wait for several batches."""
    return AutoscalingConfig(
        min_replicas=config.scorers,
        max_replicas=config.most_scorers,
        target_ongoing_requests=max(1.0, config.waiting / 4),
        upscale_delay_s=10.0,
        downscale_delay_s=300.0,
    )
