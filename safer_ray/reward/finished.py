"""Finished reward models: where their files lie, whether they give rewards, and a folder that keeps them."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from safer_ray.config.reward import RewardConfig
from safer_ray.data.hub import PREFIX, what_the_hub_said
from safer_ray.errors import UserError, explain_disk_errors
from safer_ray.reward.bases import checkpoint_of, resolve_base
from safer_ray.reward.checkpoints import TRIED, load_reward_model, save_reward_model
from safer_ray.reward.folder import READ, VOCABULARIES, weight_files, words_of
from safer_ray.reward.forward import forward_pairs
from safer_ray.reward.model import RewardModel
from safer_ray.reward.reading import SETTINGS, how_it_reads, settings_of
from safer_ray.storage.digests import sha256_of
from safer_ray.storage.files import read_json, write_json

FETCHED = [*READ, *VOCABULARIES, "*.safetensors", "additional_chat_templates/*"]


def model_path(base: str) -> Path:
    """Return where the files of a model lie; one that is named `hub:OWNER/NAME[@REVISION]` is fetched where it is not
    here yet.

    Raises:
        UserError: no such model, or none that may be fetched.
    """
    name, revision = resolve_base(base)
    if not base.startswith(PREFIX) or Path(name).exists():
        return Path(name)
    return Path(_fetched(base, name, revision))


def _fetched(base: str, name: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, revision=revision, allow_patterns=FETCHED)
    except Exception as error:  # noqa: BLE001  # whatever the hub client and what it is built on raise
        told = f"cannot fetch {base}: {words_of(error)}; check the name and the network, or give a folder"
        raise UserError(what_the_hub_said(base, error) or told) from None


def check_gives_rewards(reward: RewardModel) -> None:
    """Put a short pair to a model.

    Raises:
        UserError: its rewards are not finite.
    """
    tokens = reward.pairs.read([TRIED])[0]
    if isinstance(tokens, str):
        raise UserError(f"{reward.name}: it cannot read a short pair: {tokens}")
    found = forward_pairs(reward, [tokens], rewards=True).rewards
    if found is None or not np.isfinite(found.numpy()).all():
        raise UserError(f"{reward.name}: its reward of a short pair is not finite; copy the model again")


def keep_finished(base: str, config: RewardConfig, out: Path) -> dict[str, Any]:
    """Write a folder that reads as the model `base` does, by what `config` asks where the model's own files leave that
    open; returns what the model is.

    Weights that are read as they are are not copied: the folder holds links to a local model's, and shares the files
    of one from the hub or a package. Others (of an adapter, or in another format) are written out as safetensors.

    Raises:
        UserError: no such model, or none that gives a reward.
    """
    source = model_path(base)
    plain = checkpoint_of(str(source), config).is_plain and all(f.parent == source for f in weight_files(source))
    reward = load_reward_model(source, dtype=torch.float32, reading=config)  # in which it is written, if at all
    check_gives_rewards(reward)
    how = how_it_reads(source, config) if source.is_dir() else None
    settings = settings_of(reward.pairs)
    if "max_length" in config.model_fields_set:
        settings["max_length"] = min(settings["max_length"], config.max_length)
    if how is not None and how.frozen_layers:
        settings["frozen_layers"] = how.frozen_layers
    head = config.head if config.head is not None else how.head if how is not None else None
    with explain_disk_errors(out):
        if plain:
            copy_small_files(source, out)
            for file in weight_files(source):
                _place(file, out / file.name, linked=not base.startswith((PREFIX, "package:")))
            if head is not None:
                settings["head"] = head.model_dump(mode="json", exclude_none=True)
        else:
            save_reward_model(reward, out)
            settings = read_json(out / SETTINGS) | settings  # whose head chooses where the weights written here do not
        write_json(settings, out / SETTINGS)
    text = reward.model.config.get_text_config()
    return {
        "read_as_it_is": plain,
        "architecture": type(reward.model).__name__,
        "layers": int(text.num_hidden_layers),
        "hidden": int(text.hidden_size),
        "parameters": sum(p.numel() for p in reward.model.parameters()),
        "files": {file.name: file_facts(file) for file in sorted(out.glob("*.safetensors"))},
    }


def file_facts(file: Path) -> dict[str, Any]:
    """Return what a file of weights is known by."""
    return {"bytes": file.stat().st_size, "sha256": sha256_of(file)}


def copy_small_files(source: Path, out: Path) -> None:
    """Copy all of a model but its weights: config, tokenizer, templates, and code of its own."""
    out.mkdir(parents=True, exist_ok=True)
    small = {file for pattern in (*READ, *VOCABULARIES) for file in source.glob(pattern) if file.is_file()}
    for file in sorted(small):
        if file.name != "manifest.json":
            shutil.copyfile(file, out / file.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", out / "additional_chat_templates", dirs_exist_ok=True)


def _place(file: Path, where: Path, *, linked: bool) -> None:
    """Put a file of weights where it is looked for: as a link, or as the file itself, which takes no room where both
    are on one file system."""
    where.unlink(missing_ok=True)
    if linked:
        where.symlink_to(file.absolute())
        return
    real = Path(os.path.realpath(file))
    try:
        os.link(real, where)
    except OSError:
        shutil.copyfile(real, where)


def mend_links(folder: Path, base: str) -> None:
    """Point the links of a folder of `keep_finished` to where the model lies now, which is the same by content; what
    lies where they pointed to may have become another one."""
    for link in sorted(folder.glob("*.safetensors")):
        if link.is_symlink():
            file = (model_path(base) / link.name).absolute()
            if link.readlink() != file:
                _place(file, link, linked=True)
