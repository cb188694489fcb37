"""From a finished reward model and pairs to a bundle and a report: a run whose config is made from the model."""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from pydantic import ValidationError

from safer_ray.config.read import assigned, explain_validation
from safer_ray.config.reading import Reading
from safer_ray.config.sections import RunConfig, SaeConfig
from safer_ray.errors import UserError
from safer_ray.features.encoder import positions_of
from safer_ray.pipeline.run import STAGES, Run, check_until, run
from safer_ray.pipeline.runner import Runner
from safer_ray.pipeline.stage import pairs_of
from safer_ray.reward.bases import checkpoint_of
from safer_ray.reward.checkpoints import layer_count, load_reward_model, quiet_transformers
from safer_ray.reward.forward import forward_pairs
from safer_ray.reward.model import RewardModel
from safer_ray.reward.pretrained import open_config
from safer_ray.reward.split import validation_split
from safer_ray.reward.text import PairTokens, both_sides
from safer_ray.storage.artifacts import Artifact, read_parts

DEPTH = 0.75  # share of the blocks below the layer that is read
WIDTH = 8  # latents by hidden size
K = 64  # latents of a vector, a quarter of the hidden size at most
PASSES = 2  # over the vectors, in the training of the autoencoder
LEAST_STEPS = 1000  # of that training
BATCH = 1024  # vectors a step; of fewer vectors, a sixteenth of them
HELD_OUT = 20  # percent of the prompts, the bundle's reference
RATINGS = (5, 4, 3)  # least rating of the features that are chosen, the first that enough have
ENOUGH = 4
SAMPLE = 64  # pairs that are tokenised for the estimate
TIMED = 16  # pairs that are read for it
OnStage = Callable[[str, Artifact | None], None]
log = logging.getLogger(__name__)


class Estimate(NamedTuple):
    """An estimate of what a fit takes, in one process of this machine."""

    layer: int
    layers: int
    latents: int
    k: int
    pairs: int
    vectors: int  # about
    steps: int
    hours: float
    memory_gb: float
    disk_gb: float

    def lines(self) -> list[tuple[str, str]]:
        """Return what is said of it: names and values."""
        minutes = self.hours * 60
        return [
            ("layer", f"{self.layer} of {self.layers}"),
            ("autoencoder", f"{self.latents:,} latents, k {self.k}, {self.steps:,} steps"),
            ("pairs", f"{self.pairs:,}, about {self.vectors:,} vectors at sentence ends"),
            ("time", f"about {self.hours:.1f} hours" if self.hours > 2 else f"about {max(2, round(minutes))} minutes"),
            ("memory", f"about {_size(self.memory_gb)}"),
            ("disk", f"about {_size(self.disk_gb)}"),
        ]


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{max(1, round(gigabytes * 1000))} MB"


def fit_config(
    model: str, sources: Sequence[dict[str, Any]], out: Path, assignments: list[str] | None = None
) -> RunConfig:
    """Return the config of a fit: what is derived from the model, with `key=value` assignments laid over it.

    Raises:
        UserError: no such model, `out` names no run, or a value that does not fit.
    """
    quiet_transformers()
    reading = _reading(assigned({}, assignments).get("reward", {}))
    layers = layer_count(model, reading)
    hidden = int(open_config(checkpoint_of(model, reading)).get_text_config().hidden_size)
    defaults: dict[str, Any] = {
        "name": out.name,
        "root": str(out.parent),
        "pairs": {"sources": list(sources)},
        "reward": {"use": model, "validation_percent": HELD_OUT},
        "activations": {"layer": max(1, round(DEPTH * layers))},
        "sae": {"latents": WIDTH * hidden, "k": max(1, min(K, hidden // 4))},
        "scores": {"detector": "reward_margin"},  # as audits with the bundle suspect pairs
        "report": {"title": f"SAFER on {model}"},
    }
    tree = _laid_over(defaults, assigned({}, assignments))
    if (tree["name"], tree["root"]) != (out.name, str(out.parent)):
        raise UserError("--set name and root: a fit lies in the folder that --out names; leave them out")
    if isinstance(tree["reward"], dict) and tree["reward"]["use"] != model:
        raise UserError("--set reward.use: --reward names the model; leave it out")
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        if error.errors()[0]["loc"] == ("name",):
            raise UserError(
                f"--out {tree['name']}: a run is called by letters, digits, `.`, `_` and `-`; choose another folder"
            ) from None
        raise explain_validation(error, f"fit {model}") from None


def _laid_over(tree: Any, said: Any) -> Any:
    """Return a tree of values with another one laid over it; where both have a section, key by key."""
    if not (isinstance(tree, dict) and isinstance(said, dict)):
        return said
    return tree | {key: _laid_over(tree.get(key), value) for key, value in said.items()}


def _reading(section: Any) -> Reading:
    """Return how a model is read, as far as a section `reward` says it; what is wrong in it is said later."""
    said = section if isinstance(section, dict) else {}
    try:
        return Reading.model_validate({name: said[name] for name in said if name in Reading.model_fields})
    except ValidationError as error:
        raise explain_validation(error, "--set (reward)") from None


def fit(
    config: RunConfig,
    runner: Runner,
    *,
    until: str | None = None,
    fresh: bool = False,
    on_stage: OnStage,
    on_estimate: Callable[[Estimate], None],
) -> Run:
    """Make the bundle and the report of a config of `fit_config`; what is there already is not made again.

    What the config leaves open is chosen on the way: the steps of the autoencoder by its vectors, the rating of the
    features by how many have it.

    Raises:
        UserError: anything in the config or the inputs that cannot work.
    """
    told: dict[str, Artifact | None] = {}

    def report(name: str, artifact: Artifact | None) -> None:
        if name not in told or told[name] is None:
            told[name] = artifact
            on_stage(name, artifact)

    def up_to(stage: str | None, config: RunConfig) -> Run:
        kept = frozenset(name for name, artifact in told.items() if artifact)
        return run(config, runner, until=stage, fresh=fresh, kept=kept, on_stage=report)

    check_until(config, until)
    found = up_to(_first(until, "reward"), config)
    if _ends(until, "reward"):
        return found
    if fresh or not _is_there(config, runner, "activations"):
        expected = estimate(config, found.artifacts["pairs"], found.artifacts["reward"])
        on_estimate(expected)
        check_enough(expected, config.sae)
        check_held_out(found.artifacts["pairs"], config.sae)
        check_room(expected, found.directory)
    found = up_to(_first(until, "activations"), config)
    if _ends(until, "activations"):
        return found
    vectors = int(found.artifacts["activations"].manifest["rows"]["written"])
    config = config.model_copy(update={"sae": with_steps(config.sae, vectors)})
    found = up_to(_first(until, "verdicts"), config)
    if _ends(until, "verdicts"):
        return found
    if "rating" not in config.select.model_fields_set:
        rating = rating_of(found.artifacts["verdicts"])
        config = config.model_copy(update={"select": config.select.model_copy(update={"rating": rating})})
    return up_to(until, config)


def _ends(until: str | None, stage: str) -> bool:
    """Return whether a run that goes no further than `until` ends with a stage, or before it."""
    return until is not None and STAGES.index(until) <= STAGES.index(stage)


def _first(until: str | None, stage: str) -> str:
    """Return the earlier of two stages in the order of a run."""
    return until if until is not None and _ends(until, stage) else stage


def check_enough(expected: Estimate, config: SaeConfig) -> None:
    """Raises UserError where pairs give fewer vectors than a step of the autoencoder takes."""
    batch = with_steps(config, expected.vectors).batch_size
    if expected.vectors * (1 - config.validation_percent / 100) < 0.9 * batch:  # of a number that is about right
        raise UserError(
            f"fit: {expected.pairs:,} pairs give about {expected.vectors:,} vectors, and a step of the autoencoder "
            f"takes {batch:,}, held-out ones apart; pass more pairs, or lower it: --set sae.batch_size=N"
        )


def _is_there(config: RunConfig, runner: Runner, stage: str) -> bool:
    seen: dict[str, bool] = {}
    run(config, runner, until=stage, dry=True, on_stage=lambda name, made: seen.update({name: made is not None}))
    return all(seen.values())


def with_steps(config: SaeConfig, vectors: int) -> SaeConfig:
    """Return how an autoencoder is trained on so many vectors: what the config leaves open is chosen."""
    said, chosen = config.model_fields_set, {}
    trained = max(1, int(vectors * (1 - config.validation_percent / 100)))
    if "batch_size" not in said:
        chosen["batch_size"] = int(np.clip(trained // 16, 32, BATCH))
    if "steps" not in said:
        chosen["steps"] = max(LEAST_STEPS, -(-PASSES * trained // chosen.get("batch_size", config.batch_size)))
    return config.model_copy(update=chosen)


def rating_of(verdicts: Artifact) -> int:
    """Return the least rating of the features to choose: the highest that a few have, or a better one.

    Raises:
        UserError: none is rated 3 or better.
    """
    ratings = [rating or 0 for rating in read_parts(verdicts.path, ["rating"])["rating"].to_pylist()]
    counts = {least: sum(rating >= least for rating in ratings) for least in RATINGS}
    rating = next((least for least in RATINGS if counts[least] >= ENOUGH), RATINGS[-1])
    if not counts[rating]:
        raise UserError(
            f"fit: of {len(ratings)} features that tell chosen from rejected, none is rated {RATINGS[-1]} or better by "
            f"the probe (the best: {max(ratings, default=0)}): this layer shows no feature of safety; try another "
            "(--set activations.layer=N), more pairs, a probe of your own concept (--set judge.exchanges=FILE), or "
            "take what there is (--set select.rating=2)"
        )
    if counts[rating] < ENOUGH:
        log.warning(
            "fit: only %d of %d features that tell chosen from rejected are rated %d or better by the probe: scores "
            "and reasons rest on these, and most pairs may score 0; try another layer (--set activations.layer=N), "
            "more pairs, or a probe of your own concept (--set judge.exchanges=FILE)",
            *(counts[rating], len(ratings), rating),
        )
    else:
        log.warning("fit: %d features are rated %d or better by the probe, and make the score", counts[rating], rating)
    return rating


def estimate(config: RunConfig, pairs: Artifact, model: Artifact) -> Estimate:
    """Return what a fit takes, by putting a few of its pairs to the model.

    Raises:
        UserError: the model cannot be loaded, or cannot read them.
    """
    table = read_parts(pairs_of(pairs), ["pair_id", "prompt", "chosen", "rejected"])
    spread = np.unique(np.linspace(0, len(table) - 1, SAMPLE).astype(int))
    reward = load_reward_model(model.path, reading=config.reading)
    read = reward.pairs.read(table.take(spread).to_pylist())
    tokens = [pair for pair in read if not isinstance(pair, str)]
    if not tokens:
        raise UserError(f"fit: {config.reward.use} can read none of {len(read)} pairs; the first: {read[0]}")
    pair_seconds = _seconds_of_a_pair(reward, tokens)
    text = reward.model.config.get_text_config()
    d, layers = int(text.hidden_size), int(text.num_hidden_layers)
    every = config.activations.tokens == "all"
    sides = [side.ids for side in both_sides(tokens)] if every else positions_of(tokens)
    vectors = int(sum(map(len, sides)) / len(tokens) * len(table))
    sae = with_steps(config.sae, vectors)
    step = _seconds_of_a_step(d, sae)
    passes = config.activations.layer / layers + 1
    spliced = min(sae.spliced_pairs, int(len(table) * sae.validation_percent / 100))
    seconds = (passes * len(table) + 3 * spliced) * pair_seconds + sae.steps * step
    size = sum(p.numel() * p.element_size() for p in reward.model.parameters())
    coder = 2 * d * sae.latents * 4
    held = np.mean([len(pair.chosen.ids) + len(pair.rejected.ids) for pair in tokens]) * d * 4 * 16
    disk = vectors * (2 * d + 6 * sae.k) + 2 * coder + size * (config.auditor.weights == "copy")
    return Estimate(
        layer=config.activations.layer,
        layers=layers,
        latents=sae.latents,
        k=sae.k,
        pairs=len(table),
        vectors=vectors,
        steps=sae.steps,
        hours=seconds / 3600,
        memory_gb=(max(size + held, 4 * coder) + 1e9) / 1e9,
        disk_gb=disk / 1e9,
    )


def check_held_out(pairs: Artifact, config: SaeConfig) -> None:
    """Raises UserError where no prompt is held out to measure the autoencoder by."""
    groups = read_parts(pairs_of(pairs), ["group"])["group"].to_pylist()
    if not validation_split(groups, config.validation_percent, config.seed).any():
        raise UserError(
            f"fit: none of {len(set(groups))} prompts is among the {config.validation_percent:g}% that are held out of "
            "the autoencoder's training; pass more pairs (500 or more for a bundle that can be trusted)"
        )


def check_room(expected: Estimate, folder: Path) -> None:
    """Tell where the memory will be short.

    Raises:
        UserError: the disk has less room than a fit takes, beyond what is in its folder already.
    """
    there = sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())
    free = shutil.disk_usage(folder).free
    if expected.disk_gb * 1e9 - there > free:
        raise UserError(
            f"fit: about {expected.disk_gb:.1f} GB are wanted in {folder}, and its disk has {free / 1e9:.1f} GB free; "
            "make room, or choose a folder on another disk as --out"
        )
    memory = psutil.virtual_memory().available / 1e9
    if expected.memory_gb > memory:
        log.warning(
            "fit: about %.1f GB of memory will be used and %.1f GB are free; close other programs, lower sae.latents, "
            "or run it on a cluster with reward.shards",
            *(expected.memory_gb, memory),
        )


def _seconds_of_a_pair(reward: RewardModel, tokens: Sequence[PairTokens]) -> float:
    """Return how long a pair of mean length takes, by reading a few."""
    few = tokens[:TIMED]
    turns = []
    for _ in range(2):  # the first sets up what is used again
        began = time.monotonic()
        forward_pairs(reward, few)
        turns.append(time.monotonic() - began)
    lengths = [len(pair.chosen.ids) + len(pair.rejected.ids) for pair in tokens]
    return min(turns) / max(1, sum(lengths[: len(few)])) * float(np.mean(lengths))


def _seconds_of_a_step(d: int, sae: SaeConfig) -> float:
    """Return how long a step of the autoencoder takes: the products that are most of it, on a few rows."""
    rows = 64
    x, weight = torch.randn(rows, d), torch.randn(d, sae.latents)
    began = time.monotonic()
    for _ in range(3):
        x @ weight
    return (time.monotonic() - began) / 3 / rows * sae.batch_size * 4
