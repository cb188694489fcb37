"""Describe an auditor bundle, read without the model: for clients, and for the page."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from safer_ray.config.sections import DetectorOf, ScoresConfig
from safer_ray.errors import UserError
from safer_ray.features.bundle import best_detector, check_auditor, read_features, reference_values
from safer_ray.features.bundle_facts import expected_flags
from safer_ray.features.cards import read_cards
from safer_ray.service.api import (
    AuditorInfo,
    FeatureContext,
    FeatureDetail,
    FeatureSummary,
    Histogram,
    Reference,
    SideHistograms,
)
from safer_ray.storage.artifacts import MANIFEST, Artifact, open_artifact
from safer_ray.storage.files import read_parquet

BINS = 40


def open_auditor(path: Path) -> Artifact:
    """Raises UserError unless a bundle that this version reads is at `path`."""
    if path.exists() and not (path / MANIFEST).is_file():
        raise UserError(f"{path} is no auditor bundle ({MANIFEST} is missing); pass the directory of stage `auditor`")
    auditor = open_artifact(path, "auditor")
    check_auditor(auditor)
    return auditor


def scores_config(auditor: Artifact, detector: DetectorOf | None, flag_quantile: float, reasons: int) -> ScoresConfig:
    """Return how pairs are scored; the detector is that of an audit where none is named."""
    chosen = detector or best_detector(auditor)
    return ScoresConfig(detector=chosen, flag_quantile=flag_quantile, reasons=reasons)


def info_of(auditor: Artifact, config: ScoresConfig) -> AuditorInfo:
    """Return what clients may know of a bundle and of how it is used."""
    features = read_features(auditor.path / "features.json")
    coder = json.loads((auditor.path / "sae" / "cfg.json").read_text(encoding="utf-8"))
    values = np.sort(reference_values(auditor, config.detector))
    scores = read_parquet(auditor.path / "reference.parquet", ["score"])["score"].drop_null().to_numpy()
    told = expected_flags(auditor, config.detector, config.flag_quantile, len(values))
    place = min(int(config.flag_quantile * len(values)), len(values) - 1)
    written = datetime.fromtimestamp((auditor.path / MANIFEST).stat().st_mtime, UTC)
    return AuditorInfo(
        name=auditor.name,
        format=auditor.metrics["format"],
        model=_model(auditor),
        layer=coder["metadata"]["safer_ray_layer"],
        latents=coder["d_sae"],
        mode=features.mode,
        detector=config.detector,
        flag_quantile=config.flag_quantile,
        threshold=float(values[place]),
        safe=len(features.safe),
        unsafe=len(features.unsafe),
        reference=Reference(**told, score=histogram(scores), value=histogram(values)),
        red_team=auditor.red_team,
        created=written.isoformat(timespec="seconds"),
        licences=sorted(auditor.licence),
    )


def _model(auditor: Artifact) -> str:
    """The kind of the reward model, and its name."""
    config = json.loads((auditor.path / "reward" / "config.json").read_text(encoding="utf-8"))
    return f"{config.get('model_type', 'model')} {auditor.manifest.get('inputs', {}).get('reward', '')}".strip()


def histogram(values: np.ndarray) -> Histogram:
    counts, edges = np.histogram(values, BINS)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())


def details_of(auditor: Artifact) -> dict[int, FeatureDetail]:
    """The features of a bundle by id, strongest first."""
    return {row["feature"]: _detail(row) for row in read_cards(auditor.path).to_pylist()}


def _detail(card: Mapping[str, Any]) -> FeatureDetail:
    fires = card["edges"] is not None
    return FeatureDetail(
        id=card["feature"],
        **{name: card[name] for name in ("name", "sign", "salience", "rating", "reason")},
        **{name: card[name] for name in ("chosen_sum", "rejected_sum", "n_chosen", "n_rejected")},
        histogram=SideHistograms(**{k: card[k] for k in ("edges", "chosen", "rejected")}) if fires else None,
        contexts=[FeatureContext(**context) for context in card["contexts"] or ()],
    )


def summary_of(detail: FeatureDetail) -> FeatureSummary:
    return FeatureSummary(**{name: getattr(detail, name) for name in FeatureSummary.model_fields})
