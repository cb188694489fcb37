"""The deployable bundle: reward model, SAE, chosen features, what pairs are suspected by, and the reference pairs."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa

from safer_ray.config.sections import DetectorOf, Mode, ScoresConfig
from safer_ray.detection.combined import Readings, load_combined
from safer_ray.errors import UserError
from safer_ray.features.codes import contrasts, matrix_of
from safer_ray.features.scoring import Features, ScoreCodes, Value, margins, parse_features
from safer_ray.reward.folder import check_fetched
from safer_ray.storage.artifacts import Artifact
from safer_ray.storage.contents import check_whole
from safer_ray.storage.files import read_parquet

log = logging.getLogger(__name__)
AUDITOR_FORMAT = 2  # a bundle of another one is refused
DETECTOR = "detector"  # the folder of `combined` in a bundle
VALUES = "values.parquet"  # what `combined` says of the pairs it was fitted on, out of fold


def features_file(path: Path) -> Path:
    """Return the features.json in a folder, or the file that is named itself."""
    return path / "features.json" if path.is_dir() else path


def read_features(path: Path, mode: Mode | None = None) -> Features:
    """features.json, or the one in a directory, as a selection.

    Raises:
        UserError: missing, not JSON, or selecting nothing.
    """
    path = features_file(path)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no features at {path}; run stage `select`, which writes features.json") from None
    except (ValueError, OSError, RecursionError):
        raise UserError(f"{path} is not JSON; pass the features.json of stage `select`") from None
    features = parse_features(tree, mode)
    if mode is None and "mode" not in tree:
        log.warning("%s names no mode: the ends of responses alone count, as in mode `response`", path)
    return features


def check_auditor(auditor: Artifact) -> None:
    """Raises UserError unless it is a bundle of a format that this version reads, whose files are there, and those
    made."""
    check_fetched(auditor.path)
    found = auditor.metrics.get("format")
    if found != AUDITOR_FORMAT:
        raise UserError(f"{auditor.path}: bundle format {found}, this version reads {AUDITOR_FORMAT}; build it again")
    check_whole(auditor)


def check_code(auditor: Artifact, trust_remote_code: bool) -> None:
    """Raises UserError where the reward model in a bundle brings Python code, and its user does not trust that."""
    folder = auditor.path / "reward"
    files = [folder / name for name in ("config.json", "tokenizer_config.json")]
    if not trust_remote_code and any(b"auto_map" in file.read_bytes() for file in files if file.is_file()):
        from safer_ray.reward.pretrained import Checkpoint, check_trusted  # here, since few bundles need it

        check_trusted(Checkpoint(str(folder), str(folder)))


def best_detector(auditor: Artifact) -> DetectorOf:
    """Return what finds most errors of all that a bundle can suspect pairs by (docs/experiment.md)."""
    return "combined" if (auditor.path / DETECTOR).is_dir() else "reward_margin"


def scorer(auditor: Artifact, config: ScoresConfig) -> ScoreCodes:
    """Scores codes by a bundle's features, and suspects them by `config.detector`.

    Raises:
        UserError: the bundle holds no such detector.
    """
    features = read_features(auditor.path / "features.json")
    reference = reference_values(auditor, config.detector)
    return ScoreCodes(features, reference, config.flag_quantile, config.reasons, _value(auditor, config.detector))


def reference_values(auditor: Artifact, detector: DetectorOf) -> np.ndarray:
    """Return what a detector says of the reference pairs, float64 [n]; low: suspicious.

    Raises:
        UserError: the bundle holds no such detector.
    """
    if detector == "combined":
        values = read_parquet(_fitted(auditor) / VALUES)["combined"].to_numpy()
    else:
        name = "score" if detector == "safer" else detector
        column = read_parquet(auditor.path / "reference.parquet")[name]
        known = column.drop_null()  # of fewer pairs than the other column, where it ends in nulls
        if len(column) and not len(known) and detector == "reward_margin":
            raise UserError(f"{auditor.path} knows no rewards of its reference pairs; pass --detector safer")
        values = known.to_numpy()
    if not len(values) or not np.isfinite(values).all():
        raise UserError(f"{auditor.path}: its reference is empty or not finite ({detector}); build the bundle again")
    return values


def vector_layers(auditor: Artifact) -> list[int]:
    """The layers whose mean vectors a bundle's combined detector reads.

    Raises:
        UserError: it does not say.
    """
    layers = auditor.metrics.get("vector_layers")
    if not layers:
        raise UserError(f"{auditor.path} does not say the vector_layers of its combined detector; build it again")
    return list(layers)


def _fitted(auditor: Artifact) -> Path:
    folder = auditor.path / DETECTOR
    if not folder.is_dir():
        raise UserError(
            f"{auditor.path} has no combined detector; build the bundle by a run with `cross_fit` and "
            "`scores.detector: combined`, or pass --detector reward_margin"
        )
    return folder


def _value(auditor: Artifact, detector: DetectorOf) -> Value | None:
    """Return what a pair is valued by; None: its score."""
    if detector == "safer":
        return None
    if detector == "reward_margin":
        return lambda codes, _: margins(codes)
    model = load_combined(_fitted(auditor))

    def combined(codes: pa.Table, scores: np.ndarray) -> np.ndarray:
        contrast = contrasts(codes, len(model.effect.weights))
        vectors = (matrix_of(codes[name]) for name in ("response", "prompt"))
        return model(Readings(margins(codes), scores, contrast, *vectors))

    return combined
