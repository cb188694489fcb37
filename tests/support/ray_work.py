"""Work for the tests of sessions and faults: slow where it is to be disturbed, and it notes where it runs."""

import os
import signal
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import ray

from safer_ray.config.sections import RewardConfig, TinyLlamaConfig
from safer_ray.storage.artifacts import Fragment, part_fragments, part_name, read_fragment
from safer_ray.storage.files import write_parquet
from safer_ray.storage.work import MapJob, TrainJob

ROWS = 10  # of a fragment
SECONDS = {"map": 0.5, "train": 1.0}  # of a batch of two rows, and of a step, that dawdle
WRITTEN = pa.schema([("pair_id", pa.string()), ("double", pa.int64())])
REWARD = RewardConfig(
    base=TinyLlamaConfig(hidden=16, layers=1, heads=2, intermediate=24, vocabulary=400, positions=128),
    max_length=96,
    epochs=2,
    batch_size=8,
    micro_batch_size=2,
    learning_rate=1e-3,
    validation_percent=20,
    evaluations=3,
)


class Note(NamedTuple):
    """That a process worked on something: the first value of a batch, or a step of a training."""

    what: str
    pid: int
    node: str
    rank: int
    value: int


def note(folder: Path, what: str, value: int, rank: int = 0) -> None:
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "here"
    with (folder / f"note-{os.getpid()}").open("a") as file:
        file.write(f"{what} {os.getpid()} {node} {rank} {value}\n")


def notes(folder: Path, what: str) -> list[Note]:
    """Those of a kind, the last of each process at its end."""
    found = []
    for file in folder.glob("note-*"):
        for words in (line.split() for line in file.read_text().splitlines()):
            if len(words) == 5 and words[0] == what:
                found.append(Note(words[0], int(words[1]), words[2], int(words[3]), int(words[4])))
    return found


def write_input(folder: Path, count: int) -> Path:
    """So many parts of ten numbered rows, to be doubled."""
    for number in range(count):
        ids = range(ROWS * number, ROWS * (number + 1))
        columns = {"pair_id": [f"p{i}" for i in ids], "row_key": [f"in.jsonl#{i}" for i in ids], "value": list(ids)}
        write_parquet(pa.table(columns), folder / "in" / part_name(number))
    return folder


def fragments(folder: Path) -> list[Fragment]:
    return part_fragments(folder / "in")


def one_file(folder: Path, count: int) -> list[Fragment]:
    """So many fragments of ten numbered rows, all of one file."""
    ids = range(ROWS * count)
    columns = {"pair_id": [f"p{i}" for i in ids], "row_key": [f"in.jsonl#{i}" for i in ids], "value": list(ids)}
    write_parquet(pa.table(columns), folder / "one" / part_name(0))
    (whole,) = part_fragments(folder / "one")
    return [replace(whole, number=i, start=ROWS * i, stop=ROWS * (i + 1)) for i in range(count)]


def read_noted(fragment: Fragment, folder: Path, dies_once_at: int) -> pa.Table:
    """As `read_fragment`, by a process that notes it, and dies once at a fragment."""
    note(folder, "read", fragment.number)
    if fragment.number == dies_once_at and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return read_fragment(fragment)


def read_after_first(fragment: Fragment, folder: Path) -> pa.Table:
    """As `read_fragment`, but any other than the first only when that has come to the model."""
    end = time.monotonic() + 60
    while fragment.number and not list(folder.glob("seen-*")):
        assert time.monotonic() < end, "the first fragment waits for those behind it"
        time.sleep(0.02)
    return read_fragment(fragment)


def dawdle(folder: Path, what: str, yes: bool) -> None:
    """Whether work of a kind is to take its time."""
    if yes:
        (folder / f"dawdle-{what}").touch()
    else:
        (folder / f"dawdle-{what}").unlink(missing_ok=True)


def wait(folder: Path, what: str) -> None:
    if (folder / f"dawdle-{what}").exists():
        time.sleep(SECONDS[what])


class Double:
    """A batch function that dawdles."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, rows: pa.Table) -> pa.Table:
        values = rows["value"].to_pylist()
        note(self.folder, "map", values[0])
        wait(self.folder, "map")
        return pa.table({"pair_id": rows["pair_id"], "double": [2 * v for v in values]})


def mapping(folder: Path) -> MapJob:
    return MapJob("codes", read_fragment, partial(Double, folder), WRITTEN, loads_model=True, batch_rows=2)


class Watched:
    """Workers that note every step, and dawdle."""

    def __init__(self, workers: Any, folder: Path) -> None:
        self.workers, self.folder = workers, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self.workers, name)

    def on_step(self, done: int, total: int) -> None:
        note(self.folder, "train", done, self.rank)
        wait(self.folder, "train")
        self.workers.on_step(done, total)


def train_watched(pairs: Path, out: Path, config: RewardConfig, workers: Any, folder: Path) -> dict[str, Any]:
    """`train_reward` with a checkpoint at every step."""
    import safer_ray.reward.training_steps  # here, since processes that map need none of it
    from safer_ray.reward.train import train_reward

    safer_ray.reward.training_steps.Checkpoints.due = lambda self, wanted=False: True  # type: ignore[method-assign]
    return train_reward(pairs, out, config, Watched(workers, folder))


def training(folder: Path, pairs: Path) -> TrainJob:
    arguments = {"pairs": pairs, "config": REWARD, "folder": folder}
    return TrainJob("reward", train_watched, arguments, folder / "reward")


class Mortal:
    """Doubles, and can be told to die, once or whenever it sees a value."""

    def __init__(self, folder, *, dies_once_at=None, dies_at=None, chokes_at=None):
        self.folder, self.dies_once_at, self.dies_at, self.chokes_at = folder, dies_once_at, dies_at, chokes_at

    def __call__(self, rows):
        values = rows["value"].to_pylist()
        with (self.folder / f"seen-{os.getpid()}").open("a") as seen:
            seen.write(f"{values[0]}\n")
        if "torch" in sys.modules:
            (self.folder / "torch").touch()
        if self.dies_at in values:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.dies_once_at in values and not (self.folder / "died").exists():
            (self.folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.chokes_at in values:
            raise ValueError("too bitter")
        return pa.table({"pair_id": rows["pair_id"], "double": [2 * v for v in values]})


def mortal(folder, *, loads_model=True, batch_rows=5, **options):
    return MapJob(
        "codes",
        read_fragment,
        partial(Mortal, folder, **options),
        WRITTEN,
        loads_model=loads_model,
        batch_rows=batch_rows,
    )


def fragments_done(folder: Path) -> int:
    return len(list((folder / "out/done").glob("*.json")))


def steps_done(folder: Path) -> int:
    """Of the last checkpoint."""
    return max((int(path.name.removeprefix("step-")) for path in folder.glob("reward/state/step-*")), default=0)


# Batch functions of single tests: here, since an actor that unpickles one loads its module, and a test's loads torch.


class Slow:
    """A batch function that in its first processes takes long over value 40, and tells that it is at it."""

    def __init__(self, folder, most):
        self.folder, self.most = folder, most

    def __call__(self, rows):
        values = rows["value"].to_pylist()
        if 40 in values and len(list(self.folder.glob("at-*"))) < self.most:
            (self.folder / f"at-{os.getpid()}").touch()
            time.sleep(60)
        return pa.table({"pair_id": rows["pair_id"], "double": [2 * v for v in values]})


class Undoes:
    """A batch function that, at the last fragment, once takes back the first fragment's commit."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, rows):
        values, entry = rows["value"].to_pylist(), self.folder / "out/done/00000000.json"
        if 70 in values and not (self.folder / "taken").exists():
            while not entry.exists():
                time.sleep(0.02)
            entry.rename(self.folder / "taken")
        return pa.table({"pair_id": rows["pair_id"], "double": [2 * v for v in values]})


class Explains:
    def __init__(self, error):
        self.error = error

    def __call__(self, rows):
        raise self.error


class Times:
    """A batch function that holds a factor, and tells which process was built for it, and when it gave it back."""

    def __init__(self, folder, factor):
        self.folder, self.factor = folder, factor
        self.tell("built")

    def tell(self, what):
        with (self.folder / f"told-{os.getpid()}").open("a") as file:
            file.write(f"{what} {self.factor}\n")

    def __call__(self, rows):
        return pa.table({"pair_id": rows["pair_id"], "double": [self.factor * v for v in rows["value"].to_pylist()]})

    def __del__(self):
        self.tell("gone")
