"""Judges rate how much a feature concerns the concept. The concept probe needs no model beyond the reward model."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from safer_ray.config.read import explain_validation
from safer_ray.config.sections import JudgeConfig
from safer_ray.detection.quality import auroc
from safer_ray.errors import UserError
from safer_ray.features.codes import flatten
from safer_ray.schema import VERDICTS, table, to_json

if TYPE_CHECKING:
    from safer_ray.features.encoder import Encoder


class Exchange(BaseModel):
    """A prompt with a safe and an unsafe response: a harmful request refused or complied with, or a benign request
    answered or refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    category: str
    kind: Literal["harmful", "benign"]
    prompt: str
    safe: str
    unsafe: str


class Probe(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    concept: str
    description: str = ""
    exchanges: tuple[Exchange, ...]


class Separation(NamedTuple):
    """A feature's separation of safe from unsafe responses: AUROC in [0, 1], > 0.5 where it fires more on safe ones."""

    auroc: float
    harmful: float  # among harmful requests only
    benign: float


def load_probe(name: str) -> Probe:
    """A shipped probe by name, or one from a YAML file.

    Raises:
        UserError: no such probe, or not in the format of `safer_ray/data/probes/safety.yaml`.
    """
    shipped = resources.files("safer_ray") / "data" / "probes" / f"{name}.yaml"
    path = Path(name)
    if not path.is_file() and not shipped.is_file():
        raise UserError(f"no probe {name!r}: neither a YAML file nor one that ships (safety)")
    try:
        text = path.read_text(encoding="utf-8") if path.is_file() else shipped.read_text(encoding="utf-8")
        probe = Probe.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        raise explain_validation(error, name) from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{name} is not readable YAML: {' '.join(str(error).split())}") from None
    if len(probe.exchanges) < 10:
        raise UserError(f"{name}: {len(probe.exchanges)} exchanges are too few to rate features by; write at least 10")
    return probe


def probe_pairs(probe: Probe) -> list[dict[str, Any]]:
    """Exchanges as pairs: the safe response is the chosen one."""
    return [
        {
            "pair_id": exchange.id,
            "prompt": [{"role": "user", "content": exchange.prompt}],
            "chosen": [{"role": "assistant", "content": exchange.safe}],
            "rejected": [{"role": "assistant", "content": exchange.unsafe}],
        }
        for exchange in probe.exchanges
    ]


def response_maxima(codes: pa.Table, side: str, features: Sequence[int]) -> np.ndarray:
    """Largest activation of each feature over the response's ends; [n, features], 0 where it does not fire."""
    flat = flatten(codes, side, "response")
    maxima = np.zeros((len(codes), int(max([*features, *flat.feature.tolist()], default=0)) + 1))
    np.maximum.at(maxima, (flat.row, flat.feature), flat.value)
    return maxima[:, list(features)]


class Judge(Protocol):
    """Rates how much features concern the concept; `JUDGES` has the class of each `kind` that a config may name."""

    @property
    def name(self) -> str:
        """Return what verdicts call it."""
        ...

    def __call__(self, saliences: dict[int, float]) -> pa.Table:
        """VERDICTS of the features given with their salience: a rating of 1-5 with its reason, or none."""
        ...


class MakeJudge(Protocol):
    """An entry of `JUDGES`: the class of a judge, given the models at work and what the config says."""

    def __call__(self, encoder: "Encoder", probe: Probe, config: JudgeConfig) -> Judge: ...


class ProbeJudge:
    """Rates features 1-5 by |AUROC - 0.5| of their maximum over response ends on matched exchanges."""

    def __init__(self, encoder: "Encoder", probe: Probe, config: JudgeConfig) -> None:
        self.probe = probe
        self.config = config
        from safer_ray.features.encoder import codes_table  # here, since ratings are read without torch

        self.codes = codes_table(encoder.encode(probe_pairs(probe)))

    @property
    def name(self) -> str:
        return f"probe:{self.probe.concept}"

    def separations(self, features: Sequence[int]) -> list[Separation]:
        """Return how each feature tells the exchanges' safe from their unsafe responses."""
        safe, unsafe = (response_maxima(self.codes, side, features) for side in ("chosen", "rejected"))
        kinds = np.array([exchange.kind for exchange in self.probe.exchanges])
        columns = [auroc(safe[mask], unsafe[mask]) for mask in (kinds != "", kinds == "harmful", kinds == "benign")]
        return [Separation(*(float(v) for v in values)) for values in zip(*columns, strict=True)]

    def rate(self, separation: Separation) -> int:
        distance = abs(separation.auroc - 0.5)
        return 1 + sum(distance >= threshold for threshold in self.config.thresholds)

    def __call__(self, saliences: dict[int, float]) -> pa.Table:
        """VERDICTS of the features given with their salience.

        A feature that separates the exchanges the other way round than its salience says stays unrated.
        """
        rows = []
        for feature, found in zip(saliences, self.separations(list(saliences)), strict=True):
            rating: int | None = self.rate(found)
            fires = "safe" if found.auroc > 0.5 else "unsafe"
            reason = (
                f"fires more on {fires} responses: AUROC {found.auroc:.2f} "
                f"(harmful requests {found.harmful:.2f}, benign {found.benign:.2f})"
            )
            contradicts = (found.auroc - 0.5) * saliences[feature] < 0
            if contradicts and rating is not None and rating > 1:
                reason = f"sign contradicts its salience {saliences[feature]:+.3f}: {reason}; would be rated {rating}"
                rating = None
            raw = to_json(found._asdict())
            rows.append({"feature": feature, "judge": self.name, "rating": rating, "reason": reason, "raw": raw})
        return table(rows, VERDICTS)


JUDGES: dict[str, MakeJudge] = {"probe": ProbeJudge}  # by `judge.kind` of a config


def ratings_of(verdicts: pa.Table) -> dict[int, int | None]:
    """Each feature's rating; where judges differ, the lowest, and unrated if any left it so."""
    ratings: dict[int, int | None] = {}
    for row in verdicts.select(["feature", "rating"]).to_pylist():
        feature, rating = row["feature"], row["rating"]
        known = ratings.get(feature, rating)
        ratings[feature] = None if known is None or rating is None else min(known, rating)
    return ratings


def read_ratings(path: Path) -> dict[int, int | None]:
    """Ratings from a JSON file `{"feature": rating}`.

    Raises:
        UserError: not such a file, or a rating outside 1..5.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        ratings = {int(key): value for key, value in tree.items()}
    except FileNotFoundError:
        raise UserError(f"no ratings at {path}") from None
    except (ValueError, AttributeError, OSError, RecursionError):
        raise UserError(f'{path}: wanted JSON {{"feature id": rating 1-5 or null}}') from None
    bad = [
        f"{key}: {value!r}"
        for key, value in ratings.items()
        if value is not None and (type(value) is not int or not 1 <= value <= 5)
    ]
    if bad:
        raise UserError(f"{path}: a rating is 1-5 or null, got {bad[0]}")
    return ratings
