"""A bundle without the weights of its reward model: it names the model and the hash of each file, and finds them."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.storage.contents import content_hash
from safer_ray.storage.digests import sha256_of
from safer_ray.storage.files import move, read_json, write_json
from safer_ray.storage.locations import cache_folder
from safer_ray.storage.marks import MANIFEST
from safer_ray.storage.recipes import Artifact

REFERENCE = "weights.json"  # in the place of the weights
ELSEWHERE = "SAFER_RAY_MODEL"  # where the model lies now, if not where the bundle says
CHECKED = "checked.json"


def refer_to(reward: Artifact, out: Path) -> None:
    """Write a model's folder without its weights, which are named.

    Raises:
        UserError: they are no finished model's own files.
    """
    known = reward.metrics
    if not known.get("read_as_it_is"):
        raise UserError(
            "auditor.weights: reference is for a finished model (reward.use) whose own files are read; the weights of "
            "this one were made here, so the bundle has to hold them: leave it out"
        )
    shutil.copytree(reward.path, out, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    write_json({"model": known["use"], "files": known["files"]}, out / REFERENCE)


def reward_folder(bundle: Path) -> Path:
    """Return the folder of a bundle's reward model; where the bundle only names the weights, one in the cache with
    links to them, whose hashes were compared.

    Raises:
        UserError: they are not to be found, or are not those that the bundle was made with.
    """
    folder = bundle / "reward"
    if not (folder / REFERENCE).is_file():
        return folder
    named = _named(folder / REFERENCE)
    source = _source(named["model"])
    cache = cache_folder("models")
    name = hashlib.sha256(f"{content_hash(folder)}:{content_hash(bundle / MANIFEST)}:{source}".encode()).hexdigest()
    made = cache / name[:16]
    if _checked(made, source, named["files"]):
        return made / "reward"
    _check(source, named)
    with explain_disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".making-"))
        shutil.copytree(folder, temporary / "reward")
        shutil.copyfile(bundle / MANIFEST, temporary / MANIFEST)  # says how sentences end
        for file in named["files"]:
            (temporary / "reward" / file).symlink_to(source / file)
        write_json(_stamps(source, named["files"]), temporary / CHECKED)
        shutil.rmtree(made, ignore_errors=True)
        try:
            move(temporary, made)
        except OSError:  # another process was faster; what it made is the same
            shutil.rmtree(temporary, ignore_errors=True)
    return made / "reward"


def _named(file: Path) -> dict[str, Any]:
    tree = read_json(file)
    files = tree.get("files") if isinstance(tree, dict) else None
    sound = isinstance(files, dict) and files and isinstance(tree.get("model"), str)
    for name, facts in (files or {}).items() if isinstance(files, dict) else ():
        plain = Path(name).name == name and name.endswith(".safetensors")
        sound = sound and plain and isinstance(facts, dict) and isinstance(facts.get("sha256"), str)
    if not sound:
        raise UserError(f"{file} does not name a model's weights; copy the bundle again from where it was made")
    return dict(tree)


def _source(model: str) -> Path:
    from safer_ray.reward.finished import model_path  # which imports torch

    elsewhere = os.environ.get(ELSEWHERE)
    try:
        return model_path(elsewhere or model).absolute()
    except UserError as error:
        raise UserError(
            f"the bundle names its reward model and does not hold it: {error}; or set {ELSEWHERE} to where it lies now"
        ) from None


def _stamps(source: Path, files: dict[str, Any]) -> dict[str, list[int]]:
    found = {name: (source / name).stat() for name in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _checked(made: Path, source: Path, files: dict[str, Any]) -> bool:
    """Return whether the files were compared before, and have not changed since."""
    if not (made / CHECKED).is_file():
        return False
    try:
        return bool(read_json(made / CHECKED) == _stamps(source, files))
    except (UserError, OSError):
        return False


def _check(source: Path, named: dict[str, Any]) -> None:
    for name, facts in named["files"].items():
        file = source / name
        if not file.is_file():
            raise UserError(
                f"the bundle was made with {named['model']}, and there is no {name} in {source}; put the model back, "
                f"or say in {ELSEWHERE} where it lies"
            )
        if sha256_of(file) != facts["sha256"]:
            raise UserError(
                f"{file} is not the {name} that the bundle was made with (sha256 {facts['sha256'][:12]}…), and scores "
                f"would be of another model; get that one, and say in {ELSEWHERE} where it lies"
            )
