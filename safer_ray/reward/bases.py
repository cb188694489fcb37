"""Find the checkpoint that a name stands for: a folder, a file, a package's, or one on the hub."""

import importlib.util
from pathlib import Path

from safer_ray.data.hub import PREFIX, repository_of, split_name
from safer_ray.errors import UserError
from safer_ray.reward.folder import check_config, check_weights
from safer_ray.reward.gguf import check_gguf, is_gguf
from safer_ray.reward.pretrained import Checkpoint

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


def check_weights_of(path: Path) -> None:
    """See that all weights of a folder, or of a GGUF file, are there; raises as `check_weights` and `check_gguf`."""
    if is_gguf(path) and not path.is_dir():
        check_gguf(path)
    else:
        check_weights(path)


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
        raise UserError(f"cannot load {base}: {' '.join(str(error).split())[:300]}") from None


def checkpoint_of(base: str, trust_remote_code: bool = False) -> Checkpoint:
    """A checkpoint by its folder, file or hub name; raises as `resolve_base`."""
    return Checkpoint(base, *resolve_base(base), trust_remote_code)


def check_files(checkpoint: Checkpoint) -> None:
    """Raises UserError where a checkpoint on this machine lacks weights, or holds such as are not read."""
    if Path(checkpoint.path).exists():
        check_weights_of(Path(checkpoint.path))


def folder_of(checkpoint: Checkpoint) -> Path:
    """Return where the files of a checkpoint lie on this machine."""
    from transformers.utils import cached_file

    if Path(checkpoint.path).is_dir():
        return Path(checkpoint.path)
    return Path(str(cached_file(checkpoint.path, "config.json", revision=checkpoint.revision))).parent
