"""Measure what Ray costs and gains: `python -m bench.runner [--pairs 5000] [--rounds 3] [--json OUT]`.

The same pairs go through the same model in this process, on one Ray actor and on two, in turns. Rates are taken between
the first fragments and the last, so that loading a model and starting actors, which every stage pays once, stay out.
"""

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.common import local_path, write
from safer_ray.config.sections import CorpusConfig, PairsConfig, RayConfig, RewardConfig, SourceConfig, TinyLlamaConfig
from safer_ray.distributed.ray_runner import RayRunner
from safer_ray.distributed.session import ray_session
from safer_ray.features.passes import EncodePairs
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner, Runner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers, save_reward_model
from safer_ray.reward.tokens import TokenisePairs
from safer_ray.reward.training_pairs import pair_texts
from safer_ray.reward.training_steps import Workers
from safer_ray.sae.formats import save_sae
from safer_ray.sae.model import TopKSae
from safer_ray.schema import CODES
from safer_ray.storage.artifacts import Artifact, Place, part_fragments, read_fragment, read_parts
from safer_ray.storage.work import MapJob, TrainJob

MODEL = TinyLlamaConfig(hidden=192, layers=4, heads=4, intermediate=512, vocabulary=4000, positions=256)
FRAGMENTS = 50  # so many that two actors end together


class Clock:
    """When each fragment was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, stage: str, done: int, total: int, rows: int) -> None:
        self.times.append(time.perf_counter())

    def seconds_a_fragment(self, first: int = 6) -> float:
        """Mean over the fragments after the `first`."""
        return (self.times[-1] - self.times[first - 1]) / (len(self.times) - first)


def prepare(folder: Path, pairs: int) -> tuple[Artifact, Path, Path]:
    """Pairs, a random reward model and a random SAE."""
    ctx = StageContext(Place(folder), LocalRunner(), fragment_rows=pairs // FRAGMENTS)
    corpus = model_stages.corpus(ctx, CorpusConfig(train_per_section=pairs // 2, heldout_per_section=1))
    source = SourceConfig(path="corpus:train.jsonl", format="canonical", limit=pairs)
    made = model_stages.pairs(ctx, PairsConfig(sources=(source,)), corpus)
    table = read_parts(made.path)
    reward = new_reward_model(RewardConfig(base=MODEL, max_length=256), lambda: pair_texts(table))
    save_reward_model(reward, folder / "model")
    sae = TopKSae(MODEL.hidden, 2048, 32)
    sae.initialise(torch.randn(4096, MODEL.hidden, generator=torch.Generator().manual_seed(0)), 0)
    save_sae(sae, folder / "sae", model="random", layer=4)
    return made, folder / "model", folder / "sae"


def codes_job(reward: Path, sae: Path) -> MapJob:
    return MapJob(
        "codes",
        read_fragment,
        lambda: EncodePairs(reward, sae),
        CODES,
        prepare=lambda: TokenisePairs(reward),
        loads_model=True,
    )


def measure(runner: Runner, clock: Clock, job: MapJob, pairs: Path, out: Path) -> float:
    """Seconds a fragment, once everything is up."""
    runner.map(job, part_fragments(pairs), out)
    return clock.seconds_a_fragment()


def begin(out: Path, workers: Workers) -> dict[str, Any]:
    """A training that only says when it began."""
    return {"began": time.time()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as name, ray_session(RayConfig(max_actors=2, min_actors=2)):
        folder = Path(name)
        pairs, reward, sae = prepare(folder, given.pairs)
        job = codes_job(reward, sae)
        rows = []
        for number in range(given.rounds):
            row: dict[str, Any] = {"round": number}
            for kind, actors in (("local", 0), ("one actor", 1), ("two actors", 2)):
                clock = Clock()
                config = RayConfig(min_actors=actors or 1, max_actors=actors or 1)
                runner = RayRunner(config, clock) if actors else LocalRunner(clock)
                row[kind] = measure(runner, clock, job, pairs.path, folder / f"{kind}-{number}")
            rows.append(row)
            print(f"round {number}: " + ", ".join(f"{k} {v:.3f} s a fragment" for k, v in list(row.items())[1:]))
        starts = []
        for number in range(given.rounds):
            (folder / f"train-{number}").mkdir()
            began = time.time()
            (said,) = RayRunner().train([TrainJob("start", begin, {}, folder / f"train-{number}")])
            starts.append(said["began"] - began)
    figures = {
        "map_overhead": median(row["one actor"] / row["local"] for row in rows),
        "map_scaling_2": median(row["one actor"] / row["two actors"] for row in rows),
        "train_start_s": median(starts),
    }
    for figure, value in figures.items():
        print(f"{figure:<16} {value:.3f}")
    write(given.json, dict(figures), rows)


if __name__ == "__main__":
    main()
