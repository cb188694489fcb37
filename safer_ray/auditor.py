"""The deployable bundle: reward model, SAE, chosen features, and the scores that suspicion is measured against."""

import json
from pathlib import Path

import pyarrow as pa

from safer_ray.artifacts import Artifact, read_parquet
from safer_ray.config import Mode, ScoresConfig
from safer_ray.errors import UserError
from safer_ray.scoring import Features, ScoreCodes, parse_features

AUDITOR_FORMAT = 1  # a bundle of another one is refused


class AuditPairs:
    """Batch function: pairs -> SCORES, by an auditor bundle."""

    def __init__(self, auditor: Artifact, config: ScoresConfig) -> None:
        from safer_ray.engine import EncodePairs  # here, since scoring codes needs no torch

        self.encode = EncodePairs(auditor.path / "reward", auditor.path / "sae")
        self.score = scorer(auditor, config)

    def __call__(self, pairs: pa.Table) -> pa.Table:
        codes = self.encode(pairs)
        for name in ("row_key", "extra"):
            codes = codes.append_column(name, pairs[name])
        return self.score(codes)


def read_features(path: Path, mode: Mode | None = None) -> Features:
    """features.json, or the one in a directory, as a selection.

    Raises:
        UserError: missing, not JSON, or selecting nothing.
    """
    path = path / "features.json" if path.is_dir() else path
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no features at {path}; run stage `select`, which writes features.json") from None
    except ValueError:
        raise UserError(f"{path} is not JSON; pass the features.json of stage `select`") from None
    return parse_features(tree, mode)


def check_auditor(auditor: Artifact) -> None:
    """Raises UserError unless it is a bundle of a format that this version reads."""
    found = auditor.metrics.get("format")
    if found != AUDITOR_FORMAT:
        raise UserError(f"{auditor.path}: bundle format {found}, this version reads {AUDITOR_FORMAT}; build it again")


def scorer(auditor: Artifact, config: ScoresConfig) -> ScoreCodes:
    reference = read_parquet(auditor.path / "reference.parquet")["score"].to_numpy()
    features = read_features(auditor.path / "features.json")
    return ScoreCodes(features, reference, config.flag_quantile, config.reasons)
