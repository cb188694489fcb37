"""Measure the memory of ranks that train a reward model: `python -m bench.training_memory [--json OUT]`.

`zero3_load_peak_of_model`: the most anonymous memory that either of two ranks has while it loads a random Llama of 300M
parameters and cuts it for ZeRO 3, above what the process had before, as a share of the model's bytes in float32.
`rank_gb_at_1m_pairs`: the anonymous memory that a rank has for a million pairs of random tokens, 128 a side, of which
it opens the files, plans an epoch and fetches its share of `--steps` batches; `mapped_gb` is what of their files it has
mapped then, which other ranks share and the operating system may drop.
"""

import argparse
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from bench.common import local_path, write
from safer_ray.config.cluster import DeepSpeedConfig
from safer_ray.config.sections import RewardConfig, TinyLlamaConfig
from safer_ray.distributed.deepspeed_engine import compile_nothing, deepspeed_config
from safer_ray.distributed.partition import partition
from safer_ray.reward.checkpoints import new_reward_model, quiet_transformers, save_reward_model
from safer_ray.reward.training_pairs import ROWS, SCHEMA, map_tokens
from safer_ray.reward.training_steps import OptimizerOptions, bucketed_batches
from safer_ray.schema import SIDES

RANKS = 2
SHARDS = "200MB"
TOKENS = 128  # of a side of a random pair
SECONDS = 0.005  # between two looks at a process's memory
TEXTS = [f"Number {i} of a text of no matter, in which words come again." for i in range(1000)]


def rss(kind: str = "RssAnon") -> int:
    """Bytes of memory of this process that are of a kind: anonymous, or of files (RssFile)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {kind}; run this on Linux")


@contextmanager
def peak_above() -> Iterator[Callable[[], int]]:
    """Inside, memory is sampled; afterwards the call gives the most that there was above that of the beginning."""
    before, most, ended = rss(), [0], threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS):
            most[0] = max(most[0], rss() - before)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield lambda: most[0]
    finally:
        most[0] = max(most[0], rss() - before)
        ended.set()
        thread.join()


def random_llama(folder: Path, hidden: int, layers: int, vocabulary: int, shards: str = SHARDS) -> None:
    """Write a random Llama, with a tokenizer, in bfloat16 and in float32, below `folder`."""
    sizes = TinyLlamaConfig(hidden=64, layers=1, heads=2, intermediate=64, vocabulary=1000, positions=512)
    small = new_reward_model(RewardConfig(base=sizes), lambda: TEXTS)
    config = small.model.config
    config.hidden_size, config.num_hidden_layers, config.vocab_size = hidden, layers, vocabulary
    config.intermediate_size, config.num_attention_heads = 4 * hidden, max(1, hidden // 64)
    config.num_key_value_heads, config.head_dim = config.num_attention_heads, 64
    with torch.device("meta"):
        model = type(small.model)(config)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    for dtype in (torch.float32, torch.bfloat16):
        place = folder / str(dtype).removeprefix("torch.")
        save_reward_model(small, place)  # for the tokenizer, and how it reads
        for file in place.glob("*.safetensors"):
            file.unlink()
        model.to(dtype).save_pretrained(place, max_shard_size=shards)


def open_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def join(rank: int, port: int) -> None:
    """Join the group of this bench, on loopback."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    quiet_transformers()
    compile_nothing()
    import deepspeed

    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    deepspeed.init_distributed(dist_backend="gloo")


def load(rank: int, port: int, model: Path) -> tuple[int, int]:
    """Load a model as a rank; the peak above what the process had before, and the model's bytes in float32."""
    join(rank, port)
    import transformers.models.auto.modeling_auto
    import transformers.models.llama.modeling_llama  # noqa: F401  # what a first model imports is not the model's

    told = deepspeed_config(DeepSpeedConfig(stage=3), OptimizerOptions(1e-5))
    with peak_above() as peak:
        reward = new_reward_model(RewardConfig(base=str(model)), list, in_files=True)
        size = 4 * sum(p.numel() for p in reward.model.parameters())
        partition(reward.model, torch.float32, told)
    return peak(), size


def on_ranks(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run `work(rank, port, ...)` in a fresh process for each rank; what they give."""
    spawn, port = multiprocessing.get_context("spawn"), open_port()
    with spawn.Pool(RANKS) as pool:
        return pool.starmap(work, [(rank, port, *arguments) for rank in range(RANKS)], chunksize=1)


def write_random_pairs(folder: Path, pairs: int, rows: int = 5000) -> None:
    """Write tokens of no meaning as a training of so many pairs has them, in parts of `rows`."""
    drawn = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, pairs, rows)):
        count = min(rows, pairs - start)
        offsets = pa.array(np.arange(0, (count + 1) * TOKENS, TOKENS, dtype=np.int32))
        sides: list[pa.Array] = []
        for _ in SIDES:
            ids = pa.array(drawn.integers(0, 32_000, count * TOKENS, dtype=np.int32))
            sides += [pa.ListArray.from_arrays(offsets, ids), pa.nulls(count, SCHEMA.field("chosen_types").type)]
            sides += [pa.array(np.full(count, 40, np.int32)), pa.array(np.zeros(count, bool))]
        names = pa.array([f"p{start + i}" for i in range(count)])
        batch = pa.RecordBatch.from_arrays([names, pa.array(drawn.random(count) < 0.01), *sides], schema=SCHEMA)
        with pa.OSFile(str(folder / f"{number:08}.arrow"), "wb") as sink, pa.ipc.new_file(sink, SCHEMA) as writer:
            for first in range(0, count, ROWS):
                writer.write_batch(batch.slice(first, ROWS))


def hold(rank: int, port: int, folder: Path, steps: int) -> tuple[int, int, int]:
    """Fetch a rank's share of the first batches of an epoch: bytes of anonymous memory and of mapped files at the end,
    above the beginning, and how many pairs were fetched."""
    before, mapped, size, fetched = rss("RssAnon"), rss("RssFile"), 32, 0
    with peak_above() as peak:
        train, _ = map_tokens(sorted(folder.glob("*.arrow"))).split()
        for rows in islice(bucketed_batches(train.lengths, size, 0, 0), steps):
            fetched += len(train[rows[rank::RANKS]])
    return max(peak(), rss("RssAnon") - before), rss("RssFile") - mapped, fetched


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--hidden", type=int, default=1024)
    arguments.add_argument("--layers", type=int, default=16)
    arguments.add_argument("--pairs", type=int, default=1_000_000)
    arguments.add_argument("--steps", type=int, default=2000)
    arguments.add_argument("--json", type=local_path)
    options = arguments.parse_args()
    quiet_transformers()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        random_llama(Path(folder), options.hidden, options.layers, 32_000)
        for place in sorted(Path(folder).iterdir()):
            began = time.perf_counter()
            for rank, (peak, size) in enumerate(on_ranks(load, place)):
                rows.append({"weights": place.name, "rank": rank, "peak": peak, "model": size})
                print(f"{place.name}, rank {rank}: peak {peak / 1e6:.0f} MB of {size / 1e6:.0f} MB, {peak / size:.3f}")
            print(f"{time.perf_counter() - began:.0f} s, with starting the processes")
    figures: dict[str, float | None] = {"zero3_load_peak_of_model": max(row["peak"] / row["model"] for row in rows)}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "tokens")
        write_random_pairs(place, options.pairs)
        for rank, (anonymous, mapped, fetched) in enumerate(on_ranks(hold, place, options.steps)):
            rows.append({"pairs": options.pairs, "rank": rank, "anonymous": anonymous, "mapped": mapped})
            print(f"{options.pairs:,} pairs, rank {rank}: {fetched:,} fetched, {anonymous / 1e6:.0f} MB anonymous")
    figures["rank_gb_at_1m_pairs"] = max(row["anonymous"] for row in rows if "pairs" in row) / 1e9
    figures["mapped_gb"] = max(row["mapped"] for row in rows if "pairs" in row) / 1e9
    print(f"rank_gb_at_1m_pairs {figures['rank_gb_at_1m_pairs']:.3f}, mapped_gb {figures['mapped_gb']:.3f}")
    print(f"zero3_load_peak_of_model {figures['zero3_load_peak_of_model']:.3f}")
    write(options.json, figures, rows)


if __name__ == "__main__":
    main()
