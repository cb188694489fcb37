"""Check that a file or folder holds what it must to be taken for what a command calls it, seen before anything is read
or made."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from safer_ray import schema
from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.errors import UserError
from safer_ray.storage.artifacts import Artifact, open_artifact, part_files

OF_STAGES = ("activations", "salience", "verdicts", "contexts", "detector", "auditor")  # made by the stage of that name
STRICT = ("auditor", "detector")  # of which only an artifact will do, since its manifest is read
PAIRS = ("pair_id", "prompt", "chosen", "rejected")
COLUMNS = {
    "pairs": PAIRS,
    "codes": ("pair_id", "chosen_features", "rejected_features", "chosen_token", "rejected_token"),
    "salience": tuple(schema.SALIENCE.names),
    "verdicts": ("feature", "rating"),
    "contexts": tuple(schema.CONTEXTS.names),
    "scores": ("pair_id", "score"),
    "activations": ("x",),
}


def open_as(role: str, path: Path, reading: Reading = AS_IT_COMES) -> Artifact:
    """Return the artifact, or the foreign file or folder, at `path`, which holds what `role` wants; a reward model's
    files are found as `reading` says.

    Raises:
        UserError: nothing there, or something else.
    """
    if not path.exists():
        raise UserError(f"no such {role}: {path}; check the path, or run the stage that writes it")
    if role == "reward":
        return _open_reward(path, reading)
    HOLDS[role](path)
    artifact = open_artifact(path, role if role in OF_STAGES else None)
    if role in STRICT and not artifact.manifest.get("stage"):
        raise UserError(f"{path} holds no {role}: it has no manifest.json; pass the directory that stage {role} wrote")
    return artifact


def folder_of_pairs(path: Path) -> Path:
    """Return where an artifact of `pairs`, `noise`, `curate` or `export` keeps its pairs."""
    below = path / "pairs"
    return below if below.is_dir() else path


def check_columns(path: Path, columns: tuple[str, ...]) -> None:
    """Raises UserError unless a Parquet file has these columns."""
    try:
        names = set(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}; write it again") from None
    for name in columns:
        if name not in names:
            raise UserError(f"{path} has no column {name!r}; pass the directory of the stage that writes it")


def _table(role: str) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        if path.is_file() and role == "activations":
            check_columns(path, COLUMNS[role])
            return
        _check_folder(path, role)
        folder = folder_of_pairs(path) if role == "pairs" else path
        check_columns(part_files(folder)[0], COLUMNS[role])

    return check


def _check_folder(path: Path, role: str) -> None:
    if not path.is_dir():
        raise UserError(f"{path} is a file; {role} is a folder, pass the directory that a stage wrote")


def _open_reward(path: Path, reading: Reading) -> Artifact:
    """Return a folder that holds a checkpoint (its config, and every file of weights, none of them torn), or an adapter
    of one that is there; or a GGUF file."""
    from safer_ray.pipeline.inputs import with_adapter_base
    from safer_ray.reward.bases import check_config_of, check_weights_of
    from safer_ray.reward.gguf import is_gguf

    if not is_gguf(path):
        _check_folder(path, "a reward model")
    check_config_of(path, "pass the directory that stage `reward` wrote")
    check_weights_of(path, reading.bin_weights)
    return with_adapter_base(open_artifact(path), reading)


def _check_sae(path: Path) -> None:
    from safer_ray.reward.folder import check_file_of_weights

    _check_folder(path, "an SAE")
    if not (path / "cfg.json").is_file():
        raise UserError(f"no SAE in {path}: cfg.json is missing; pass the directory that stage `sae` wrote")
    check_file_of_weights(path / "sae_weights.safetensors")


def _check_features(path: Path) -> None:
    from safer_ray.features.bundle import read_features

    read_features(path, "response")


def _check_ratings(path: Path) -> None:
    from safer_ray.features.judge import read_ratings

    read_ratings(path)


HOLDS: dict[str, Callable[[Path], None]] = {
    **{role: _table(role) for role in COLUMNS},
    "sae": _check_sae,
    "features": _check_features,
    "ratings": _check_ratings,
    "detector": lambda path: _check_folder(path, "a detector"),
    "auditor": lambda path: _check_folder(path, "an auditor bundle"),
}
