"""Find the checkpoint that a name stands for: a folder, a file, a package's, or one on the hub."""

import importlib.util
from pathlib import Path

from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.data.hub import PREFIX, repository_of, split_name, what_the_hub_said
from safer_ray.errors import UserError
from safer_ray.reward.folder import adapter_settings, check_config, check_weights, is_adapter, words_of
from safer_ray.reward.gguf import check_gguf, is_gguf
from safer_ray.reward.pretrained import Checkpoint, open_config

PACKAGE = "package:"


def resolve_base(base: str) -> tuple[str, str | None]:
    """A checkpoint's folder, GGUF file or hub name, and its revision.

    Raises:
        UserError: no such package, or no model in that folder or file.
    """
    if base.startswith(PREFIX):
        name, revision = split_name(base)
        if not is_gguf(name):
            return name, revision
        path = Path(name) if Path(name).exists() else _downloaded(base, name, revision)
        check_config_of(path, "")
        return str(path), None
    if base.startswith(PACKAGE):
        path = _in_package(base)
        check_config_of(path, "name a folder of the package that holds one")
        return str(path), None
    check_config_of(Path(base), "write hub:OWNER/NAME for one on the hub")
    return base, None


def check_config_of(path: Path, otherwise: str) -> None:
    """See that a folder holds a model's config, or that a file is a GGUF one; raises as `check_config` and
    `check_gguf`."""
    if is_gguf(path) and not path.is_dir():
        check_gguf(path)
    else:
        check_config(path, otherwise)


def check_weights_of(path: Path, bin_weights: bool = False) -> None:
    """See that all weights of a folder, or of a GGUF file, are there; raises as `check_weights` and `check_gguf`."""
    if is_gguf(path) and not path.is_dir():
        check_gguf(path)
    else:
        check_weights(path, bin_weights)


def _in_package(base: str) -> Path:
    """Return a path in a package, of which nothing is imported."""
    module, _, below = base.removeprefix(PACKAGE).partition("/")
    top, *inner = module.split(".")
    if not all(name.isidentifier() for name in (top, *inner)):
        raise UserError(f"{base}: {module!r} is no name of a package; write package:MODULE/FOLDER")
    spec = importlib.util.find_spec(top)  # of a name with a dot, it would import what is before that
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise UserError(f"{base}: package {module!r} is not installed; install it, or the extra that carries it")
    return Path(folders[0], *inner, below)


def _downloaded(base: str, name: str, revision: str | None) -> Path:
    """Return where a file of a repository on the hub lies once it is here."""
    from transformers.utils import cached_file

    repository = repository_of(name)
    try:
        return Path(str(cached_file(repository, name.removeprefix(f"{repository}/"), revision=revision)))
    except (OSError, ValueError) as error:
        raise UserError(what_the_hub_said(base, error) or f"cannot load {base}: {words_of(error)}") from None


def checkpoint_of(base: str, reading: Reading = AS_IT_COMES) -> Checkpoint:
    """A checkpoint by its folder, file or hub name; of an adapter, the one that it is merged into, with it.

    Raises:
        UserError: as `resolve_base`; or an adapter's base cannot be read, or there is no adapter to name one of.
    """
    path, revision = resolve_base(base)
    found = Checkpoint(base, path, revision, reading.trust_remote_code, reading.bin_weights)
    own = adapter_base(base, Path(path), reading)
    if own is None:
        return found
    told = f"{base} is an adapter ({adapter_settings(Path(path))['peft_type']}) of {own}, which"
    remedy = "name its base with adapter_base (--read adapter_base=FOLDER)"
    try:
        if not own.startswith((PREFIX, PACKAGE)) and not Path(own).exists():
            raise UserError("there is no such file or folder")
        below, own_revision = resolve_base(own)
        if is_adapter(Path(below)):
            raise UserError("is an adapter itself; merge that first")
        merged = found._replace(path=below, revision=own_revision, adapter=Path(path), base=own)
        open_config(merged._replace(adapter=None, name=own))
    except UserError as error:
        raise UserError(f"{told} cannot be read: {error}; {remedy}") from None
    return merged


def adapter_base(name: str, path: Path, reading: Reading) -> str | None:
    """Return what an adapter at a path is merged into: what its user says, else what it says itself; None: it is no
    adapter.

    Raises:
        UserError: nobody says it, or the user does of what is no adapter.
    """
    if not (path.is_dir() and is_adapter(path)):
        if reading.adapter_base is not None:
            raise UserError(f"adapter_base is {reading.adapter_base}, but {name} is no adapter; leave it out")
        return None
    if reading.adapter_base is not None:
        return reading.adapter_base
    settings = adapter_settings(path)
    own = settings.get("base_model_name_or_path")
    if not own:
        raise UserError(f"{name} is an adapter that names no base; name one: adapter_base (--read adapter_base=FOLDER)")
    for place in (path / own, Path(own)):
        if place.exists():
            return str(place.absolute())
    if own.startswith((PREFIX, PACKAGE)) or Path(own).is_absolute() or own.startswith(".") or own.count("/") > 1:
        return str(own)
    revision = settings.get("revision")
    return f"{PREFIX}{own}@{revision}" if revision else f"{PREFIX}{own}"


def check_files(checkpoint: Checkpoint) -> None:
    """Raises UserError where a checkpoint on this machine lacks weights, or holds such as are not read."""
    for path in (checkpoint.adapter, Path(checkpoint.path)):
        if path is not None and path.exists():
            check_weights_of(path, checkpoint.bin_weights)


def folder_of(checkpoint: Checkpoint) -> Path:
    """Return where the files of a checkpoint lie on this machine."""
    from transformers.utils import cached_file

    if Path(checkpoint.path).is_dir():
        return Path(checkpoint.path)
    return Path(str(cached_file(checkpoint.path, "config.json", revision=checkpoint.revision))).parent
