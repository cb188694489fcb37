"""From harvested activations to an SAE: where it starts, its training, and its quality on held-out prompts."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from safer_ray.config.reading import AS_IT_COMES, Reading
from safer_ray.config.sections import SaeConfig
from safer_ray.errors import UserError
from safer_ray.reward.checkpoints import load_reward_model, quiet_transformers
from safer_ray.reward.split import validation_split
from safer_ray.reward.tokens import TEXTS
from safer_ray.reward.training_steps import Workers, permutation
from safer_ray.sae.data import Order, Vectors, held_out_vectors, open_vectors, sample
from safer_ray.sae.formats import load_sae, save_sae
from safer_ray.sae.log import write_lines
from safer_ray.sae.model import TopKSae
from safer_ray.sae.model_card import write_model_card
from safer_ray.sae.quality import decoder_clusters, density_histogram, sae_quality, spliced
from safer_ray.sae.training_loop import fit
from safer_ray.sae.variants.registry import new_sae
from safer_ray.storage.artifacts import part_files
from safer_ray.storage.files import read_parquet

log = logging.getLogger(__name__)
SAMPLE = 8192  # vectors that an SAE starts from
TOLD = ("train_vectors", "outliers", "steps")  # on the model card, beside the quality


@dataclass(frozen=True)
class SpliceEvaluation:
    """The pairs that reconstructions are tried on, by folder, and the reward model that reads them."""

    pairs: Path
    reward: Path
    reading: Reading = AS_IT_COMES


def train_sae(
    activations: Path,
    out: Path,
    config: SaeConfig,
    workers: Workers,
    *,
    model: str,
    layer: int,
    start: Path | None = None,
    judged: SpliceEvaluation | None = None,
) -> dict[str, Any]:
    """Train on harvested vectors, write a SAELens directory to `out`; returns held-out metrics, on the first worker.

    With `start` training goes on from that SAE. Exact resume, as in `train_reward`; batches are the same for any number
    of workers.

    Raises:
        UserError: unusable activations, a start or a checkpoint of another shape.
        SaferError: the loss became NaN.
    """
    if workers.size > config.batch_size:
        raise UserError(f"sae: a batch of {config.batch_size} cannot be shared by {workers.size} workers; enlarge it")
    vectors = open_vectors(activations, config)
    sae = first_sae(vectors, config, start).to(workers.device)
    _agree(sae, workers)
    order = Order(vectors, config.batch_size, config.seed, workers.rank, workers.size)
    progress, clock = fit(sae, order, config, workers, out)
    found = {
        "train_vectors": order.rows,
        "outliers": vectors.outliers,
        "steps": progress.step,
        "workers": workers.size,
        "read_share": round(clock.waited / clock.seconds, 4),
        "fit_seconds": round(clock.seconds, 3),
        "history": progress.history,
    }
    if workers.rank == 0:
        save_sae(sae, out, model=model, layer=layer)
        quality = held_out_quality(load_sae(out).to(workers.device), vectors, config, layer, judged)
        write_lines([*progress.history, quality], out)
        write_model_card(out, quality | {name: found[name] for name in TOLD})
        found = quality | found
    workers.sum(torch.zeros(1))  # the others wait here, since the first may still fail
    return found


def held_out_quality(
    sae: TopKSae, vectors: Vectors, config: SaeConfig, layer: int, judged: SpliceEvaluation | None
) -> dict[str, Any]:
    """All that is measured of a finished SAE."""
    found = sae_quality(sae, held_out_vectors(vectors, config.seed))
    measured = {
        **found.figures(),
        "held_out_vectors": found.vectors,
        "density": density_histogram(found),
        "clusters": decoder_clusters(sae)._asdict(),
    }
    if judged is None:
        return measured
    try:
        quality = splice_quality(sae, config, layer, judged)
    except Exception as error:  # noqa: BLE001  # a figure less is no reason to lose the SAE
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("sae: it is kept without what its reconstructions cost the reward model, which failed: %s", reason)
        return measured
    return measured | ({"spliced": quality} if quality else {})


def splice_quality(
    sae: TopKSae, config: SaeConfig, layer: int, judged: SpliceEvaluation
) -> dict[str, dict[str, float]]:
    """Return what reconstructions cost the reward model on held-out pairs, by where they are put in
    (`quality.Spliced`); empty where no pair was held out.

    Raises:
        UserError: pairs or a reward model that cannot be read, or that gives no finite reward.
    """
    pairs = held_out_pairs(judged.pairs, config)
    if not pairs:
        return {}
    quiet_transformers()
    reward = load_reward_model(judged.reward, reading=judged.reading)
    tokens = [found for found in reward.pairs.read(pairs) if not isinstance(found, str)]  # as in the activations
    if not tokens:
        return {}
    return {
        name: spliced(reward, layer, sae, tokens, all_tokens=everywhere)._asdict()
        for name, everywhere in (("sentence ends", False), ("all tokens", True))
    }


def held_out_pairs(directory: Path, config: SaeConfig) -> list[dict[str, Any]]:
    """At most `spliced_pairs` of the pairs whose vectors were held out."""
    files = part_files(directory)
    groups = [read_parquet(path, ["group"])["group"].to_pylist() for path in files]
    held = [np.flatnonzero(validation_split(own, config.validation_percent, config.seed)) for own in groups]
    part = np.repeat(np.arange(len(files)), [len(rows) for rows in held])
    drawn = np.sort(permutation(len(part), config.seed, 0)[: config.spliced_pairs])
    pairs: list[dict[str, Any]] = []
    for number in np.unique(part[drawn]):
        rows = np.concatenate(held)[drawn[part[drawn] == number]]
        pairs += read_parquet(files[number], ["pair_id", *TEXTS]).take(pa.array(rows)).to_pylist()
    return pairs


def first_sae(vectors: Vectors, config: SaeConfig, start: Path | None) -> TopKSae:
    """Return what training begins with: a fresh SAE on a sample of the vectors, or the one in `start`.

    Raises:
        UserError: that one has another shape.
    """
    sae = new_sae(vectors.width, config)
    if start is None:
        drawn = sample(vectors, config.seed, SAMPLE)
        sae.initialise(torch.from_numpy(drawn).float(), config.seed)
        return sae
    found = load_sae(start)
    if (type(found), found.d, found.latents, found.k) != (type(sae), sae.d, sae.latents, sae.k):
        raise UserError(
            f"sae: the SAE in {start} is a {type(found).__name__} of {found.latents} latents, k {found.k}, on "
            f"{found.d} dimensions; wanted a {type(sae).__name__} of {sae.latents}, {sae.k} and {sae.d}: set "
            "sae.variant, sae.latents and sae.k to what it has"
        )
    sae.load_state_dict(found.state_dict())
    return sae


@torch.no_grad()
def _agree(sae: TopKSae, workers: Workers) -> None:
    """All begin with the first worker's weights: on unlike processors, theirs may differ in the last bits."""
    if workers.size > 1:
        for value in sae.state_dict().values():
            if value.is_floating_point():
                mine = value.contiguous() if workers.rank == 0 else torch.zeros(value.shape, device=value.device)
                value.copy_(workers.sum(mine))
