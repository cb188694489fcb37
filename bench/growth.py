"""Measure whether memory grows with the corpus: `python -m bench.growth [--small 5000] [--large 50000]`.

Each corpus goes through `pairs` and `codes` in a process of its own, by a model small enough that nothing but the pairs
counts; what is compared is the most memory that each process ever held resident.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench.common import local_path, write
from safer_ray.config.sections import PairsConfig, RewardConfig, SourceConfig, TinyLlamaConfig
from safer_ray.data.corpus import write_corpus
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers, save_reward_model
from safer_ray.reward.training_pairs import pair_texts
from safer_ray.sae.formats import save_sae
from safer_ray.sae.model import TopKSae
from safer_ray.storage.artifacts import Place, open_artifact, read_parts

MODEL = TinyLlamaConfig(hidden=32, layers=2, heads=2, intermediate=64, vocabulary=2000, positions=256)


def prepare(folder: Path, count: int) -> None:
    """A corpus of so many pairs that begins again and again, a random reward model and a random SAE."""
    write_corpus(folder, train_per_section=500, heldout_per_section=1, seed=0)
    some = model_stages.pairs(StageContext(Place(folder / "some"), LocalRunner()), sources(folder / "train.jsonl"))
    table = read_parts(some.path)
    rows = table.select(["prompt", "chosen", "rejected"]).to_pylist()
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as out:
        for number in range(count):
            out.write(json.dumps({"id": f"p{number}", **rows[number % len(rows)]}) + "\n")
    save_reward_model(new_reward_model(RewardConfig(base=MODEL), lambda: pair_texts(table)), folder / "model")
    sae = TopKSae(MODEL.hidden, 256, 8)
    sae.initialise(torch.randn(512, MODEL.hidden, generator=torch.Generator().manual_seed(0)), 0)
    save_sae(sae, folder / "sae", model="random", layer=2)


def sources(path: Path) -> PairsConfig:
    return PairsConfig(sources=(SourceConfig(path=str(path), format="canonical"),))


def run(folder: Path) -> None:
    """Pairs and codes of the corpus in `folder`; what that took, as JSON."""
    ctx = StageContext(Place(folder / "runs"), LocalRunner())
    pairs = model_stages.pairs(ctx, sources(folder / "pairs.jsonl"))
    codes = model_stages.codes(ctx, pairs, open_artifact(folder / "model"), open_artifact(folder / "sae"))
    print(json.dumps({"pairs": codes.manifest["rows"]["written"], "peak_mb": held_at_most()}))


def held_at_most() -> float:
    """MB that this process ever held resident; `getrusage` would tell the most of the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 1024  # type: ignore[union-attr]


def peak(count: int) -> float:
    """MB that a process held at most over so many pairs."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), count)
        command = [sys.executable, "-m", "bench.growth", "--run", name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    told = json.loads(said.splitlines()[-1])
    assert told["pairs"] == count
    print(f"{count:,} pairs: {told['peak_mb']:.0f} MB")
    return float(told["peak_mb"])


def growth(small: int = 5000, large: int = 50_000) -> float:
    """Peak memory over the large corpus as a multiple of that over the small one."""
    less = peak(small)
    return peak(large) / less


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", type=int, default=5000)
    parser.add_argument("--large", type=int, default=50_000)
    parser.add_argument("--run", type=local_path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    quiet_transformers()
    if given.run is not None:
        run(given.run)
        return
    figure = growth(given.small, given.large)
    print(f"{'rss_growth_5k_to_50k':<38} {figure:8.2f}   <= 1.1")
    write(given.json, {"rss_growth_5k_to_50k": figure}, [])


if __name__ == "__main__":
    main()
