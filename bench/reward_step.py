"""Measure what packing pairs saves of a reward model's training: `python -m bench.reward_step [--steps 40] [--json
OUT]`.

The demo's reward model, on pairs of its corpus: every batch is a step with its pairs packed, and then one with the two
sides of each pair apart, which is what all other models get; the same gradients, as
`tests/reward/test_packing.py` shows.
"""

import argparse
import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from bench.common import local_path, write
from safer_ray.config.sections import PairsConfig, RewardConfig, SourceConfig, TinyLlamaConfig
from safer_ray.data.corpus import write_corpus
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import pack
from safer_ray.reward.text import PairTokens
from safer_ray.reward.training_pairs import pair_texts
from safer_ray.reward.training_steps import bucketed_batches, reward_step
from safer_ray.storage.artifacts import Place, read_parts

MODEL = TinyLlamaConfig(hidden=96, layers=3, heads=4, intermediate=256, vocabulary=2000, positions=256)
BATCH = 16  # pairs a worker of the demo takes a step


def prepared(folder: Path) -> tuple[RewardModel, list[PairTokens]]:
    write_corpus(folder, train_per_section=1000, heldout_per_section=1, seed=0)
    source = SourceConfig(path=str(folder / "train.jsonl"), format="canonical")
    pairs = model_stages.pairs(StageContext(Place(folder / "runs"), LocalRunner()), PairsConfig(sources=(source,)))
    table = read_parts(pairs.path)
    reward = new_reward_model(RewardConfig(base=MODEL, max_length=160), lambda: pair_texts(table))
    return reward, reward.pairs(table.to_pylist())


def seconds(reward: RewardModel, batch: list[PairTokens]) -> float:
    """Seconds that one step takes, forward and backward."""
    reward.model.zero_grad()
    began = time.perf_counter()
    reward_step(reward, batch).loss.backward()
    return time.perf_counter() - began


def seconds_apart(reward: RewardModel, batch: list[PairTokens]) -> float:
    """Seconds that one step takes where the two sides of a pair run as two sequences."""
    with patch("safer_ray.reward.training_steps.pack_to_train", return_value=None):
        return seconds(reward, batch)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--steps", type=int, default=40)
    arguments.add_argument("--threads", type=int, default=1, help="of torch; a worker of the demo has one")
    arguments.add_argument("--json", type=local_path)
    options = arguments.parse_args()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    torch.set_num_threads(options.threads)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        reward, tokens = prepared(Path(folder))
    reward.model.train()
    lengths = torch.tensor([max(len(t.chosen.ids), len(t.rejected.ids)) for t in tokens]).numpy()
    batches = [[tokens[i] for i in rows] for rows in islice(bucketed_batches(lengths, BATCH, 0, 0), options.steps + 3)]
    timed = [(seconds(reward, batch), seconds_apart(reward, batch)) for batch in batches][3:]
    own = sum(len(pack(t.chosen.ids, t.rejected.ids).ids) for t in tokens)
    figures: dict[str, float | None] = {
        "apart_vs_packed": median(there / here for here, there in timed),
        "tokens_apart_vs_packed": sum(len(t.chosen.ids) + len(t.rejected.ids) for t in tokens) / own,
    }
    for name, value in figures.items():
        print(f"{name} {value:.2f}")
    write(options.json, figures, [{"packed": here, "apart": there} for here, there in timed])


if __name__ == "__main__":
    main()
