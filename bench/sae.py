"""Measure what a training step of an SAE costs: `python -m bench.sae [--batch 4096 --d 512 --latents 8192 --k 32]
[--json F]`.

Forward and backward pass, and the full step (with Adam, the gradient's parallel component removed and the decoder
normalised, as each does it), without and with the auxiliary loss on 10% dead latents, in turns in one process:
(a) dense autograd as published: TopK scattered into a dense z, a dense decoder;
(b) SAELens' TopK training SAE, as it comes, and with its sparse activations;
(c) EleutherAI sparsify's coder, without Triton;
(d) ours.
Then `bench.sae_quality`: the same training by (a) and (d) on real activations. With a GPU, two larger sizes too.
The peers: `pip install -c constraints.txt ".[bench]"`.
"""

import argparse
import ctypes
import gc
import os
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.common import local_path, write
from bench.engine import peak_memory
from bench.sae_quality import quality
from safer_ray.sae.loss import remove_parallel_gradient, sae_step
from safer_ray.sae.model import TopKSae

AUX = 1 / 32
DEAD = 0.1
KINDS = ("passes", "step", "passes_aux", "step_aux")
GPU_SIZES = ((8192, 2048, 16384, 64), (8192, 2048, 131072, 64))


class Size(NamedTuple):
    batch: int
    d: int
    latents: int
    k: int


class Way(NamedTuple):
    """One implementation: its module, its loss of a batch, and what it does to gradients and weights around Adam."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor | None], Tensor]
    before: Callable[[], None]
    after: Callable[[], None]


class DenseSae(TopKSae):
    """The published computation in the same weights, by autograd over dense matrices."""

    def loss(self, x: Tensor, dead: Tensor | None) -> Tensor:
        pre = self.pre_activations(x)
        z = dense_topk(pre, self.k).relu()
        x_hat = z @ self.W_dec + self.b_dec
        loss = ((x_hat - x).square().mean(-1) / x.square().mean(-1)).mean()
        if dead is None:
            return loss
        residual = (x - x_hat).detach()
        k = min(int(dead.sum()), self.d // 2)
        guess = dense_topk(pre.masked_fill(~dead, -torch.inf), k).relu() @ self.W_dec
        return loss + AUX * ((guess - residual).square().mean(-1) / residual.square().mean(-1)).mean()


def dense_topk(pre: Tensor, k: int) -> Tensor:
    values, features = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, features, values)


def dense(size: Size, device: str) -> Way:
    sae = DenseSae(size.d, size.latents, size.k).to(device)
    return Way(sae, sae.loss, lambda: remove_parallel_gradient(sae.W_dec), sae.normalise_decoder)


def ours(size: Size, device: str) -> Way:
    sae = TopKSae(size.d, size.latents, size.k).to(device)
    none = torch.zeros(size.latents, dtype=torch.bool, device=device)

    def loss(x: Tensor, dead: Tensor | None) -> Tensor:
        return sae_step(sae, x, none if dead is None else dead, AUX).loss

    return Way(sae, loss, lambda: remove_parallel_gradient(sae.W_dec), sae.normalise_decoder)


def saelens(size: Size, device: str, sparse: bool = False) -> Way:
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(
        d_in=size.d,
        d_sae=size.latents,
        k=size.k,
        device=device,
        decoder_init_norm=1.0,
        aux_loss_coefficient=AUX,
        use_sparse_activations=sparse,
        rescale_acts_by_decoder_norm=not sparse,  # the two together have no backward pass
    )
    sae = TopKTrainingSAE(config)

    def loss(x: Tensor, dead: Tensor | None) -> Tensor:
        given = TrainStepInput(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False
        )
        return sae.training_forward_pass(given).loss

    return Way(sae, loss, lambda: None, lambda: None)  # it neither normalises the decoder nor cuts the gradient


def sparsify(size: Size, device: str) -> Way:
    os.environ["SPARSIFY_DISABLE_TRITON"] = "0" if device == "cuda" else "1"
    from sparsify.config import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    coder = SparseCoder(size.d, SparseCoderConfig(num_latents=size.latents, k=size.k), device=device)

    def loss(x: Tensor, dead: Tensor | None) -> Tensor:
        found = coder(x, dead_mask=dead)
        return found.fvu + AUX * found.auxk_loss

    return Way(coder, loss, coder.remove_gradient_parallel_to_decoder_directions, coder.set_decoder_norm_to_unit_norm)


WAYS: dict[str, Callable[[Size, str], Way]] = {
    "dense": dense,
    "saelens": saelens,
    "saelens_sparse": lambda size, device: saelens(size, device, sparse=True),
    "sparsify": sparsify,
    "ours": ours,
}


def same_start(ways: dict[str, Way], size: Size, x: Tensor) -> None:
    """The same weights in all of them."""
    start = TopKSae(size.d, size.latents, size.k)
    start.initialise(x[:1024].cpu(), 0)
    with torch.no_grad():
        for way in ways.values():
            found = dict(way.module.named_parameters())
            if "encoder.weight" in found:
                found["encoder.weight"].copy_(start.W_enc.T)
            else:
                found["W_enc"].copy_(start.W_enc)
            found["W_dec"].copy_(start.W_dec)
            found["b_dec"].copy_(start.b_dec)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mb(work: Callable[[], None], device: str) -> float:
    """The most memory that `work` held above what there was before, MB."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before goes back first
    found: dict[str, float] = {}
    with peak_memory(found, "peak"):
        work()
    return found["peak"]


class Work:
    """The times of one way."""

    def __init__(self, way: Way, x: Tensor, dead: Tensor) -> None:
        self.way, self.x, self.dead = way, x, dead
        # a rate of 0 keeps all rounds at the same weights
        self.optimizer = torch.optim.Adam(way.module.parameters(), lr=0.0, foreach=True)

    def clear(self) -> None:
        self.way.module.zero_grad(set_to_none=True)

    def passes(self) -> None:
        self.clear()
        self.way.loss(self.x, None).backward()

    def passes_aux(self) -> None:
        self.clear()
        self.way.loss(self.x, self.dead).backward()

    def step(self) -> None:
        self.passes()
        self._update()

    def step_aux(self) -> None:
        self.passes_aux()
        self._update()

    def _update(self) -> None:
        self.way.before()
        self.optimizer.step()
        self.way.after()


def measure(size: Size, device: str, rounds: int, names: list[str], kinds: list[str]) -> dict[str, Any]:
    """Seconds of every round and peak MB, by way and work."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size.batch, size.d, generator=generator).to(device)
    dead = (torch.rand(size.latents, generator=generator) < DEAD).to(device)
    ways = {name: WAYS[name](size, device) for name in names}
    same_start(ways, size, x)
    works = {name: Work(way, x, dead) for name, way in ways.items()}
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    memory: dict[str, dict[str, float]] = {name: {} for name in names}
    for name, work in works.items():
        for kind in kinds:
            work.clear()
            memory[name][kind] = peak_mb(getattr(work, kind), device)
            print(f"{name} {kind}: {memory[name][kind]:.0f} MB at most", flush=True)
        work.clear()
    for _ in range(rounds):
        for kind in kinds:
            for name, work in works.items():
                synchronise()
                began = time.perf_counter()
                getattr(work, kind)()
                synchronise()
                seconds[name].setdefault(kind, []).append(time.perf_counter() - began)
                work.clear()
    return {"size": size._asdict(), "device": device, "seconds": seconds, "peak_mb": memory}


def ratio(found: dict[str, Any], other: str, work: str = "passes") -> float | None:
    """Return how many times as long `other` takes as ours: the median over rounds."""
    if work not in found["seconds"].get(other, {}):
        return None
    pairs = zip(found["seconds"][other][work], found["seconds"]["ours"][work], strict=True)
    return float(np.median([theirs / mine for theirs, mine in pairs]))


def show(found: dict[str, Any]) -> None:
    print("\n" + ", ".join(f"{name} {value}" for name, value in found["size"].items()) + f" on {found['device']}")
    works = list(found["seconds"]["ours"])
    print(f"{'seconds (peak MB)':<18}" + "".join(f"{work:>22}" for work in works))
    for name, by_work in found["seconds"].items():
        told = (f"{np.median(by_work[work]):.3f} ({found['peak_mb'][name][work]:.0f})" for work in works)
        print(f"{name:<18}" + "".join(f"{text:>22}" for text in told))


GOALS = {
    "step_vs_dense": ">= 3.5",
    "step_vs_saelens": ">= 4.5",
    "step_vs_sparsify": ">= 1.4",
    "step_aux_vs_dense": "",
    "full_step_vs_dense": "",
    "full_step_vs_saelens": "",
    "full_step_vs_sparsify": "",
    "memory_vs_dense": "<= 0.6",
    "gpu_step_vs_dense": ">= 2.5, with a GPU",
    "gpu_step_vs_sparsify": ">= 1, with a GPU",
    "nmse_vs_dense": "<= 1.01",
    "nmse_vs_reference": "",
    "dead_vs_reference": "<= 0.33",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--d", type=int, default=512)
    parser.add_argument("--latents", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--quality-steps", type=int, default=600, help="of the training on real activations; 0: none")
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    warnings.filterwarnings("ignore", message="Sparse")
    names = [name for name in WAYS if name in {*given.ways, "ours"}]
    rows = [measure(Size(given.batch, given.d, given.latents, given.k), "cpu", given.rounds, names, given.kinds)]
    show(rows[0])
    figures: dict[str, float | None] = dict.fromkeys(GOALS)
    for other in ("dense", "saelens", "sparsify"):
        figures[f"step_vs_{other}"] = ratio(rows[0], other)
        figures[f"full_step_vs_{other}"] = ratio(rows[0], other, "step")
    figures["step_aux_vs_dense"] = ratio(rows[0], "dense", "passes_aux")
    if "dense" in names and "passes" in given.kinds:
        peaks = rows[0]["peak_mb"]
        figures["memory_vs_dense"] = peaks["ours"]["passes"] / peaks["dense"]["passes"]
    if torch.cuda.is_available():
        for size in GPU_SIZES:
            rows.append(measure(Size(*size), "cuda", given.rounds, names, given.kinds))
            show(rows[-1])
        figures["gpu_step_vs_dense"] = ratio(rows[1], "dense")
        figures["gpu_step_vs_sparsify"] = ratio(rows[1], "sparsify")
    if given.quality_steps:
        found = quality(given.quality_steps)
        rows.append(found)
        figures |= {name: found[name] for name in ("nmse_vs_dense", "nmse_vs_reference", "dead_vs_reference")}
    print()
    for name, goal in GOALS.items():
        value = figures[name]
        print(f"{name:<24} {'    none' if value is None else f'{value:8.3f}'}   {goal}")
    write(given.json, figures, rows)


if __name__ == "__main__":
    main()
