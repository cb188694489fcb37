"""Arguments of the service: `safer-ray serve KEY=VALUE …`, or `args` in a file for `serve deploy`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from safer_ray.config.read import explain_validation
from safer_ray.config.sections import DetectorOf, Frozen, Share
from safer_ray.config.values import LocalPath
from safer_ray.errors import UserError
from safer_ray.service.request_limits import Limits

Count = Annotated[int, Field(gt=0)]


class Thresholds(Frozen):
    """Settings that `user_config` changes while the service runs."""

    detector: DetectorOf | None = None  # what an audit suspects by, where none is named
    flag_quantile: Share = 0.05
    reasons: Annotated[int, Field(ge=0, le=100)] = 8  # contributing features named per pair
    limits: Limits = Limits()


class ServiceConfig(Thresholds):
    """Arguments of `build`."""

    auditor: LocalPath
    keys: LocalPath | None = None  # a file of hashed keys; or the variable SAFER_RAY_KEYS
    insecure: bool = False  # whether strangers may ask: without keys on other than loopback
    trust_remote_code: bool = False  # whether Python code that the bundle's reward model brings may run
    scorers: Count = 1  # at least, each with the model
    max_scorers: Count | None = None  # as load comes; None: no more
    ingresses: Count = 1  # processes that read and answer requests
    scorer_cpus: Annotated[float, Field(gt=0)] = 1.0
    scorer_gpus: Annotated[float, Field(ge=0)] = 0.0
    threads: Count | None = None  # of torch in a scorer; None: its share of the cores
    batch_tokens: Count = 32_768  # about so many are scored in one call
    waiting: Count = 72  # requests that a scorer takes, the batch at work included; more are answered 429

    @model_validator(mode="after")
    def _scorers(self) -> Self:
        if self.max_scorers is not None and self.max_scorers < self.scorers:
            raise ValueError(f"max_scorers {self.max_scorers} is smaller than scorers {self.scorers}")
        return self

    @property
    def most_scorers(self) -> int:
        return self.max_scorers or self.scorers

    @property
    def room(self) -> int:
        """Requests that may be under way at once, over all scorers."""
        return self.waiting * self.most_scorers

    @property
    def torch_threads(self) -> int:
        share = len(os.sched_getaffinity(0)) // self.most_scorers
        return self.threads or max(int(self.scorer_cpus), share, 1)

    def thresholds(self) -> dict[str, Any]:
        """As `user_config`."""
        return {name: value for name, value in self.model_dump().items() if name in Thresholds.model_fields}

    def lasting(self) -> "ServiceConfig":
        """Without what `user_config` says, so that another threshold makes no other deployment of it."""
        return self.model_copy(update={name: field.default for name, field in Thresholds.model_fields.items()})


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
    return config.model_copy(update={"auditor": _whole(config.auditor), "keys": config.keys and _whole(config.keys)})


def _whole(path: Path) -> Path:
    """Replicas have another working directory."""
    return path.expanduser().resolve()
