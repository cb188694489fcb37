"""Measure what a pair costs: `python -m bench.engine [--pairs 400] [--sizes small large] [--device cuda] [--json OUT]`.

On the same pairs, in turns:
(a) the published way: every text padded to a fixed length, the whole causal model with its vocabulary head and all
    hidden states, chosen and rejected apart, 8 texts a batch; the texts do not change its cost: 16 pairs are enough;
(b) transformers without our tricks: the whole backbone, batches sorted by length and padded to their longest;
(c) ours: packed pairs, no block past the layer read, batches by token budget; with rewards, the whole model once; in
    float32, and in bfloat16 where the processor multiplies it, against the published way in float32, as it is.
Runs without Ray; `--device cuda --sizes 1b` for a GPU, in bfloat16. How memory grows is told by a CPU (`bench.growth`).
"""

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from bench.common import local_path, write
from bench.growth import growth
from safer_ray.config.sections import RewardConfig, TinyLlamaConfig
from safer_ray.features.contexts import FindContexts
from safer_ray.features.encoder import Encoder, codes_table
from safer_ray.features.salience import SumFeatures, candidates, reduce_sums, salience_table
from safer_ray.features.scoring import Features, pair_scores
from safer_ray.formats.canonical import parse_prompt
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers
from safer_ray.reward.mixed import keep_exact
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import pack, pad_batch
from safer_ray.reward.precision import cpu_multiplies
from safer_ray.reward.pretrained import lower_trunk
from safer_ray.reward.text import PairTokens, both_sides
from safer_ray.sae.model import TopKSae
from safer_ray.storage.background import heartbeat

DATA = Path(__file__).parents[1] / "../shared/data/hh_harmless_test.jsonl.gz"
SHARES = ("tokenise", "forward", "sae", "output")


class Size(NamedTuple):
    """A random Llama, the layer that is read, and the SAE on it."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    layer: int
    latents: int = 2048
    k: int = 32


SIZES = {
    "small": Size(256, 8, 4, 688, 6),
    "large": Size(512, 16, 8, 1376, 12),
    "1b": Size(2048, 16, 32, 8192, 12, 16384, 64),
}
VOCABULARY = 8000
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, as NVIDIA says


def read_pairs(count: int) -> list[dict[str, Any]]:
    """hh-rlhf harmless, as pairs."""
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(count), lines, strict=False)]
    return [
        {
            "pair_id": row["id"],
            "prompt": parse_prompt(row["prompt"])[0],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]


def texts_of(pairs: Sequence[dict[str, Any]]) -> Iterator[str]:
    for pair in pairs:
        for side in ("prompt", "chosen", "rejected"):
            yield from (message["content"] for message in pair[side])


@dataclass(frozen=True)
class Bench:
    """One model on one device, and the pairs."""

    size: Size
    reward: RewardModel
    causal: Any  # the same backbone with a vocabulary head, for way (a)
    sae: TopKSae
    pairs: list[dict[str, Any]]
    tokens: list[PairTokens]

    @property
    def device(self) -> torch.device:
        return self.reward.device


def prepare(size: Size, count: int, device: str, *, halved: bool = False) -> Bench:
    """Return a model in bfloat16 on a GPU or where it is `halved`, else in float32."""
    from transformers import LlamaForCausalLM

    pairs = read_pairs(count)
    base = TinyLlamaConfig(
        hidden=size.hidden,
        layers=size.layers,
        heads=size.heads,
        intermediate=size.intermediate,
        vocabulary=VOCABULARY,
        positions=2048,
    )
    reward = new_reward_model(RewardConfig(base=base, max_length=1024), lambda: texts_of(pairs))
    dtype = torch.bfloat16 if device == "cuda" or halved else torch.float32
    reward.model.eval().to(device=device)
    if dtype == torch.bfloat16:
        lower_trunk(reward.model, dtype)
        keep_exact(reward)
    causal = LlamaForCausalLM(reward.model.config).eval().to(device=device, dtype=dtype)
    sae = TopKSae(size.hidden, size.latents, size.k)
    sae.initialise(torch.randn(2048, size.hidden, generator=torch.Generator().manual_seed(0)), 0)
    return Bench(size, reward, causal, sae, pairs, reward.pairs(pairs))


# The three ways


def published(bench: Bench, width: int, pairs: int = 16) -> int:
    """Way (a); the number of pairs that went through."""
    rows = bench.tokens[:pairs]
    for side in ("chosen", "rejected"):
        sequences = [getattr(pair, side).ids[:width] for pair in rows]
        for start in range(0, len(sequences), 8):
            rows_now = sequences[start : start + 8]
            batch = [np.pad(s, (0, width - len(s)), constant_values=bench.reward.pad) for s in rows_now]
            inputs = pad_batch(batch, bench.reward.pad, bench.device)
            output = bench.causal(**inputs, output_hidden_states=True, use_cache=False)
            output.hidden_states[bench.size.layer].float().cpu()
    return len(rows)


def plain(bench: Bench) -> int:
    """Way (b)."""
    sequences = [side.ids for side in both_sides(bench.tokens)]
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), 16):
        rows = [sequences[i] for i in order[start : start + 16]]
        inputs = pad_batch(rows, bench.reward.pad, bench.device)
        output = bench.reward.model.base_model(**inputs, output_hidden_states=True, use_cache=False)
        output.hidden_states[bench.size.layer].float().cpu()
    return len(bench.tokens)


def early(bench: Bench) -> RewardModel:
    """The model without the blocks past the layer that is read, as `Engine.load(rewards=False)` gives it."""
    blocks = bench.reward.blocks()
    del blocks[bench.size.layer :]
    return bench.reward


def activations(engine: Encoder, tokens: list[PairTokens]) -> int:
    """Way (c) without rewards or codes."""
    engine.encode_tokens(tokens)
    return len(tokens)


def audit(engine: Encoder, bench: Bench) -> int:
    """All of it from texts: codes, salience, contexts of the candidates, scores."""
    import pyarrow as pa

    codes = codes_table(engine.encode(bench.pairs))
    ranked = salience_table(reduce_sums([SumFeatures("response")(codes)], bench.size.latents), "response")
    features = candidates(ranked, 256)
    names = ("prompt", "chosen", "rejected")
    texts = pa.Table.from_pylist([{name: pair[name] for name in names} for pair in bench.pairs])
    for name in texts.column_names:
        codes = codes.append_column(name, texts[name])
    FindContexts(bench.reward.pairs, features, "response", 8)(codes)
    pair_scores(codes, Features(features[:16], features[16:32], "response"))
    return len(codes)


# Measuring


@contextmanager
def peak_memory(found: dict[str, float], name: str) -> Iterator[None]:
    """The most that this process held above what it began with, MB, sampled every 5 ms."""
    process = psutil.Process()
    before = process.memory_info().rss
    most = [before]

    def watch() -> None:
        most[0] = max(most[0], process.memory_info().rss)

    try:
        with heartbeat(0.005, watch):
            yield
    finally:
        found[name] = (most[0] - before) / 2**20


def wall() -> float:
    return time.perf_counter()


def processor() -> float:
    """Seconds of the processor, as if the threads of torch had the cores to themselves all the time."""
    return time.process_time() / torch.get_num_threads()


Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"wall": wall, "processor": processor}


def seconds_a_pair(work: Callable[[], int], clock: Clock) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = clock()
    with torch.inference_mode():
        count = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (clock() - began) / count


def matmul_ceiling(device: torch.device, dtype: torch.dtype, clock: Clock, n: int = 2048) -> float:
    """FLOP/s of a large square product, the best of five."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(5):
        best = max(best, 2 * n**3 / seconds_a_pair(lambda: (a @ b, 1)[1], clock))
    return best


def peak_of(device: torch.device) -> float | None:
    """FLOP/s that a GPU's maker promises; None for one that is not known, or a CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def forward_flops(bench: Bench, layers: int) -> float:
    """Multiplications and additions of packed pairs through so many blocks: projections, and attention to what each
    token sees."""
    size = bench.size
    per_token = 2 * (4 * size.hidden**2 + 3 * size.hidden * size.intermediate)
    total = 0.0
    for pair in bench.tokens:
        packed = pack(pair.chosen.ids, pair.rejected.ids)
        seen = float((packed.position_ids + 1).sum())
        total += layers * (len(packed.ids) * per_token + 4 * size.hidden * seen)
    return total


def shares(engine: Encoder, bench: Bench, clock: Clock) -> dict[str, float]:
    """Return where the time of an audit's forward pass goes, as shares of 1."""
    spent = dict.fromkeys(SHARES, 0.0)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = clock()
        with torch.inference_mode():
            result = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent[name] += clock() - began
        return result

    tokens = timed("tokenise", lambda: bench.reward.pairs(bench.pairs))
    bare = Encoder(engine.reward, engine.layer, rewards=True)
    encoded = timed("forward", lambda: bare.encode_tokens(tokens))
    codes = timed("sae", lambda: engine.codes_of(encoded.vectors))
    timed("output", lambda: codes_table(encoded._replace(codes=codes)))
    whole = sum(spent.values())
    told = {name: seconds / whole for name, seconds in spent.items()}
    return told | {"seconds": whole, "forward_s": spent["forward"]}


def measure(size: Size, count: int, device: str, rounds: int, clock: Clock) -> dict[str, Any]:
    """Everything about one size; each figure the median over rounds in which the ways took turns."""
    bench = prepare(size, count, device)
    whole = Encoder(bench.reward, size.layer, bench.sae)
    ways: dict[str, Callable[[], int]] = {
        "padded_512": lambda: published(bench, 512),
        "padded_1024": lambda: published(bench, 1024),
        "transformers": lambda: plain(bench),
        "audit": lambda: audit(whole, bench),
    }
    cut = prepare(size, count, device)
    first = Encoder(early(cut), size.layer, rewards=False)
    encoder = Encoder(cut.reward, size.layer, bench.sae, rewards=False)
    ways["one_pass"] = lambda: activations(first, bench.tokens)
    ways["audit_activations"] = lambda: audit(encoder, replace(bench, reward=cut.reward))
    if device == "cpu" and cpu_multiplies("bfloat16"):
        halved = prepare(size, count, device, halved=True)
        lower = Encoder(halved.reward, size.layer, halved.sae)
        ways["padded_1024_bf16"] = lambda: published(halved, 1024)
        ways["audit_bf16"] = lambda: audit(lower, halved)
    memory: dict[str, float] = {}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    ceilings, parts = [], []
    for _ in range(rounds):
        for name, work in ways.items():
            with peak_memory(memory, name):
                seconds[name].append(seconds_a_pair(work, clock))
        ceilings.append(matmul_ceiling(bench.device, bench.reward.model.dtype, clock))
        parts.append(shares(whole, bench, clock))
    cost = {name: float(np.median(values)) for name, values in seconds.items()}
    share = {name: float(np.median([p[name] for p in parts])) for name in SHARES}
    forward = float(np.median([p["forward_s"] for p in parts]))
    flops = forward_flops(bench, size.layers) / forward
    tokens = sum(len(s.ids) for s in both_sides(bench.tokens))
    told = f"hidden {size.hidden}, {size.layers} layers, layer {size.layer}"
    print(f"\n{told}, {count} pairs, {tokens / count:.0f} tokens a pair")
    for name, value in cost.items():
        print(f"{name:<20} {1 / value:10.2f} pairs/s {tokens / count / value:10.0f} tokens/s {memory[name]:8.0f} MB")
    print(", ".join(f"{name} {value:.2f}" for name, value in share.items()))
    return {
        "one_pass_vs_padded_512": cost["padded_512"] / cost["one_pass"],
        "one_pass_vs_padded_1024": cost["padded_1024"] / cost["one_pass"],
        "one_pass_vs_transformers": cost["transformers"] / cost["one_pass"],
        "audit_vs_published_1024": 3 * cost["padded_1024"] / cost["audit"],
        "audit_activations_vs_published_1024": 3 * cost["padded_1024"] / cost["audit_activations"],
        "audit_vs_published_1024_bf16": 3 * cost["padded_1024"] / cost["audit_bf16"] if "audit_bf16" in cost else None,
        "forward_share_of_matmul": flops / float(np.median(ceilings)),
        "tokenise_share": share["tokenise"],
        "gpu_mfu": flops / peak if (peak := peak_of(bench.device)) else None,
        "pairs_per_s": 1 / cost["audit"],
        "shares": share,
        "memory_mb": memory,
    }


GOALS = {
    "one_pass_vs_padded_512": ">= 10",
    "one_pass_vs_padded_1024": ">= 20",
    "one_pass_vs_transformers": ">= 1.7",
    "audit_vs_published_1024": ">= 45",
    "audit_vs_published_1024_bf16": ">= 60, where the processor multiplies it",
    "audit_activations_vs_published_1024": ">= 50",
    "forward_share_of_matmul": ">= 0.75, hidden 512",
    "tokenise_share": "<= 0.10",
    "gpu_mfu": ">= 0.40, with a GPU",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["small", "large"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="On a busy machine: processor.")
    parser.add_argument("--no-growth", action="store_true", help="Leave out how memory grows.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    quiet_transformers()
    rows: list[dict[str, Any]] = []
    for name in given.sizes:
        found = measure(SIZES[name], given.pairs, given.device, given.rounds, CLOCKS[given.clock])
        rows.append({"size": name} | found)
        for figure, goal in GOALS.items():
            told = "    none" if found[figure] is None else f"{found[figure]:8.2f}"
            print(f"{figure:<38} {told}   {goal}")
    figures = {name: rows[0][name] for name in GOALS}
    figures |= {name: rows[-1][name] for name in ("forward_share_of_matmul", "gpu_mfu")}
    if given.device == "cpu" and not given.no_growth:
        figures["rss_growth_5k_to_50k"] = growth()
        print(f"{'rss_growth_5k_to_50k':<38} {figures['rss_growth_5k_to_50k']:8.2f}   <= 1.1")
    write(given.json, figures, rows)


if __name__ == "__main__":
    main()
