"""Names on the Hugging Face hub: which commit one stands for, and data sets loaded from there."""

import contextlib
import functools
import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from safer_ray import schema
from safer_ray.errors import UserError
from safer_ray.storage.files import move
from safer_ray.storage.locations import cache_folder

PREFIX = "hub:"
COMMIT = re.compile(r"[0-9a-f]{40}")
SECONDS = 10.0  # that the hub is waited for
log = logging.getLogger(__name__)


def split_name(name: str) -> tuple[str, str | None]:
    """Return OWNER/NAME and REVISION of `hub:OWNER/NAME[@REVISION]`; a folder of that name is taken whole."""
    bare = name.removeprefix(PREFIX)
    if Path(bare).exists():
        return bare, None
    owner, _, revision = bare.partition("@")
    return owner, revision or None


def what_the_hub_said(name: str, error: BaseException) -> str | None:
    """Return what is wrong with a model's name, and the remedy, where that is the hub's answer behind an error; None
    for other errors, as of the network."""
    from huggingface_hub import errors as hub  # slow to import

    for cause in _causes(error):
        if isinstance(cause, hub.GatedRepoError):  # which are not found, too
            return f"{name}: its owner lets in those alone who asked; ask on its page, and give your token in HF_TOKEN"
        if isinstance(cause, hub.RepositoryNotFoundError):
            return (
                f"{name}: the hub knows no such model, or shows it to nobody without a token; check the name, and give "
                "your token in HF_TOKEN if it is a private one"
            )
        if isinstance(cause, hub.RevisionNotFoundError):
            return f"{name}: the model has no revision {split_name(name)[1]!r} (any more); name another"
        if isinstance(cause, hub.HfHubHTTPError) and getattr(cause.response, "status_code", None) in (401, 403):
            return f"{name}: the hub does not take your token for it; check HF_TOKEN, and what the token may read"
        if isinstance(cause, hub.HFValidationError):
            return f"{name} is no name of a model on the hub; write hub:OWNER/NAME[@REVISION]"
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def repository_of(name: str) -> str:
    """Return OWNER/NAME of a name that may go on to a file in it."""
    return "/".join(name.split("/")[:2])


def pinned(name: str, kind: Literal["dataset", "model"]) -> str:
    """Return `hub:OWNER/NAME@COMMIT`, with the commit that the name stands for now.

    A folder of this machine, and a name whose commit cannot be found out, which is told, are returned as they are.

    Raises:
        UserError: the hub has no such model, or does not show it.
    """
    bare, revision = split_name(name)
    if Path(bare).exists() or COMMIT.fullmatch(revision or ""):
        return name
    try:
        return f"{PREFIX}{bare}@{_commit(repository_of(bare), revision, kind)}"
    except Exception as error:  # noqa: BLE001  # no network, no such name, no such revision: told, or found elsewhere
        known = _cached_commit(repository_of(bare), revision) if kind == "model" else None
        if known is not None:
            return f"{PREFIX}{bare}@{known}"
        if kind == "model" and (told := what_the_hub_said(name, error)):
            raise UserError(told) from None
        cause = " ".join(str(error).split())[:200]
        log.warning("%s: which commit this is cannot be found out (%s); write hub:%s@COMMIT", name, cause, bare)
        return name


@functools.cache
def _commit(name: str, revision: str | None, kind: str) -> str:
    """Ask the hub. A process gets one answer, and loads what was answered."""
    from huggingface_hub import HfApi

    found = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=SECONDS).sha
    if not found:
        raise UserError(f"the hub names no commit of {name}")
    return str(found)


def _cached_commit(name: str, revision: str | None) -> str | None:
    """Return the commit of a model that was downloaded before."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    try:
        text = (folder / "refs" / (revision or "main")).read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return text if (folder / "snapshots" / text).is_dir() else None


def hub_splits(path: str) -> list[str]:
    """Return the splits of a data set; none where they cannot be found out, as of one of several configurations."""
    import datasets  # slow to import, and only needed here

    name, revision = split_name(path)
    try:
        return [str(split) for split in datasets.get_dataset_split_names(name, revision=revision)]
    except Exception:  # noqa: BLE001  # whatever the hub client raises: loading it tells
        return []


def load_dataset(path: str, split: str) -> Path:
    """Load a data set, and return where it is saved: once, under SAFER_RAY_CACHE (default ~/.cache/safer_ray).

    Raises:
        UserError: it cannot be loaded.
    """
    import datasets  # slow to import, and only needed here

    name, revision = split_name(path)
    try:
        data = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # whatever the hub client raises: no network, no such name, split or revision
        cause = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load {path} (split {split!r}): {cause}; check the name, the split and the network, "
            "or give a downloaded folder"
        ) from error
    cache = cache_folder("hub")
    text = schema.to_json([name, revision or "", split, data._fingerprint])
    folder = cache / f"{Path(name).name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=cache, prefix=".saving-")
        data.save_to_disk(temporary)
        with contextlib.suppress(OSError):  # another process was faster; its copy is the same
            move(Path(temporary), folder)
    return folder
