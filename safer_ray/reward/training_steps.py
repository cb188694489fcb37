"""Pure training steps, schedules, and the small adapters to the engine that applies gradients and to its workers."""

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safer_ray.errors import SaferError, UserError, explain_disk_errors
from safer_ray.reward.ending import asked_to_end, end
from safer_ray.reward.execution import rewards_of
from safer_ray.reward.forward import pack_to_train
from safer_ray.reward.loss import BRADLEY_TERRY, PairLoss
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import alike, unpacked
from safer_ray.reward.text import PairTokens
from safer_ray.reward.trunk import start_after
from safer_ray.storage.digests import check_digests, record_digests
from safer_ray.storage.files import make_folder, move

SAVE_SHARE = 0.05  # of a training's time, that saving checkpoints may take
LEAST_SECONDS = 10.0  # between two that nobody asked for
WRITE_RATE = 5e8  # bytes a second that a worker is taken to write, before its first checkpoint has shown it
KEPT = 2  # checkpoints
TORCH = "torch.pt"


class RewardStep(NamedTuple):
    """The result on a batch of pairs: the loss, and the reward margins (chosen - rejected; > 0 is right)."""

    loss: Float[Tensor, ""]
    margin: Float[Tensor, " n"]


class KnownStates(NamedTuple):
    """The output of block `layer` for the sides of a batch, the chosen ones first; each [length, d]."""

    layer: int
    sides: list[Tensor]


def reward_step(
    reward: RewardModel,
    batch: list[PairTokens],
    bfloat16: bool = False,
    known: KnownStates | None = None,
    run: Callable[..., Any] | None = None,
    loss: PairLoss = BRADLEY_TERRY,
    label_margins: Float[Tensor, " n"] | None = None,
) -> RewardStep:
    """Return loss and margins of a batch, whose pairs run packed where they can.

    `run` is called in place of the model where something wraps it. With `bfloat16` the pass computes in it, and the
    weights stay as they are. With `known` states only the blocks behind them run, and the two sides of a pair apart.
    """
    rows = [unpacked(pair.chosen.ids, pair.chosen.types) for pair in batch]
    rows += [unpacked(pair.rejected.ids, pair.rejected.types) for pair in batch]
    if len({alike(reward.model.config, row) for row in rows}) > 1:
        known = None  # they cannot run side by side, as the states do
    packed = pack_to_train(reward, batch) if known is None else None
    start: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if known is not None:
        start = start_after(reward, known.layer, pad_sequence(known.sides, batch_first=True))
    with start, torch.autocast(reward.device.type, torch.bfloat16, enabled=bfloat16):
        if packed is not None:
            chosen, rejected = rewards_of(reward, packed, run).float().view(-1, 2).T
        else:
            chosen, rejected = rewards_of(reward, rows, run).float().view(2, -1)
    if label_margins is not None:
        label_margins = label_margins.to(chosen.device)
    return RewardStep(loss(chosen, rejected, label_margins), (chosen - rejected).detach())


def warmup_cosine(step: int, total: int, warmup: float) -> float:
    """Factor of the learning rate in [0, 1]: linear up over the share `warmup`, then a half cosine down to 0."""
    rise = max(1, round(total * warmup))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def warmup_decay(step: int, total: int, warmup: float, decay: float) -> float:
    """Factor in [0, 1]: linear up over `warmup`, flat, linear down over the last share `decay`; continuous."""
    rise, fall = max(1, round(total * warmup)), max(1, round(total * decay))
    return min(1.0, (step + 1) / rise, (total - step) / fall)


def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def bucketed_batches(lengths: np.ndarray, size: int, seed: int, epoch: int, window: int = 16) -> Iterator[np.ndarray]:
    """An epoch's batches: a seeded permutation, sorted by length inside windows of batches, batches shuffled again.

    Every index comes exactly once; the last batch may be short.
    """
    order = permutation(len(lengths), seed, epoch)
    batches = []
    # Lengths alike in a batch save padding; sorted over the whole epoch, long texts would all come together.
    for start in range(0, len(order), size * window):
        chunk = order[start : start + size * window]
        chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [chunk[i : i + size] for i in range(0, len(chunk), size)]
    # A stream of its own, or the batches would be shuffled by the numbers that made the order of rows.
    for i in np.random.default_rng([seed, epoch, 1]).permutation(len(batches)):
        yield batches[i]


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of how gradients are applied; batch and micro-batch sizes are one worker's."""

    learning_rate: float
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    micro_batches: int = 1  # a step
    micro_batch_size: int = 1
    bfloat16: bool = False


class Checkpointable(Protocol):
    """Can be saved and restored as a checkpoint. Every call is made by all workers."""

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...


class OptimizerAdapter(Checkpointable, Protocol):
    """Applies gradients: plain torch, or DeepSpeed on a cluster. Every call is made by all workers."""

    autocast: bool  # whether forward passes are to run under torch's autocast to bfloat16
    counts_micro_batches: bool  # whether it has to be given all of a step, those without a pair too

    @property
    def model(self) -> Any:
        """Return what to call for a forward pass that will be differentiated."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient; a step's losses sum to its share of the mean over the whole batch."""
        ...

    def step(self, factor: float) -> None:
        """Apply the gradients, summed over workers, at `learning_rate * factor`."""
        ...

    def weights(self) -> dict[str, Tensor] | None:
        """Whole tensors by name on the first worker; None on the others."""
        ...


class Workers(Protocol):
    """The processes that train together, seen from one of them. Every method is called by all, in the same order."""

    rank: int
    size: int
    device: torch.device  # that this process computes on
    state: Path  # folder of what goes with the training once it has ended
    partitions: bool  # whether each of them keeps a share of every weight alone (ZeRO 3)

    def engine(self, module: nn.Module, options: OptimizerOptions) -> OptimizerAdapter: ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum over workers."""
        ...

    def reduce_scatter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return of each contiguous tensor this worker's share of the rows (`share`), summed over workers."""
        ...

    def all_gather(self, tensors: Sequence[Tensor]) -> None:
        """The reverse, in place: every worker's share of the rows of contiguous tensors to all others."""
        ...

    def due(self, wanted: bool = False) -> bool:
        """Return whether it is time for a checkpoint, by what the former ones took, or a worker was told to end; one
        that is `wanted` need not wait where there is time for it."""
        ...

    def save(self, engine: Checkpointable, state: dict[str, Any]) -> None:
        """Keep a checkpoint of the engine, of every worker's random state and of the loop's `state`; a worker that was
        told to end ends then."""
        ...

    def load(self, engine: Checkpointable) -> dict[str, Any] | None:
        """Go back to the last checkpoint; the loop's state, None where there is none."""
        ...

    def on_step(self, done: int, total: int) -> None: ...


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, vectors (biases, norms) do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed, plain = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module that its training changes, by name: what is frozen is its base's."""
    return _without_frozen(module, module.state_dict())


def _without_frozen(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in tensors.items() if name not in frozen}


class TorchOptimizer:
    """AdamW on a module in one process."""

    counts_micro_batches = False

    def __init__(self, module: nn.Module, options: OptimizerOptions) -> None:
        self.module = module
        self.options = options
        self.autocast = options.bfloat16
        groups = decay_groups(module, options.weight_decay)
        # Fused, a CPU's step takes a fifth of the time, which is 1% of what gradients take (bench/RESULTS.md), and its
        # last bits are others: models that are there would have to be trained again.
        fused = all(parameter.is_cuda for group in groups for parameter in group["params"])
        self.optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, foreach=not fused, fused=fused)

    @property
    def model(self) -> nn.Module:
        return self.module

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.learning_rate * factor
        if self.options.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self) -> dict[str, Tensor] | None:
        return self.module.state_dict()

    def save(self, directory: Path) -> None:
        state = {"module": trained_state(self.module), "optimizer": self.optimizer.state_dict()}
        save_tensors(state, directory / TORCH)

    def load(self, directory: Path) -> None:
        """Raises UserError: the checkpoint is of a module of another shape."""
        state = torch.load(directory / TORCH, weights_only=True, map_location="cpu")
        trained = _without_frozen(self.module, state["module"])  # checkpoints of before held all
        check_shapes(self.module, trained, directory.parent)
        self.module.load_state_dict(trained, strict=False)
        self.optimizer.load_state_dict(state["optimizer"])


def check_shapes(module: nn.Module, found: dict[str, Tensor], state: Path) -> None:
    """Raises UserError unless a checkpoint's tensors are those of the module that are trained, by name and shape."""
    wanted, there = ({name: tuple(t.shape) for name, t in own.items()} for own in (trained_state(module), found))
    for name in sorted(wanted.keys() | there.keys()):
        if wanted.get(name) != there.get(name):
            raise UserError(
                f"the unfinished training in {state} has {name} of shape {there.get(name)}, this run "
                f"{wanted.get(name)}; go on with the config that it began with, or delete {state} to train anew"
            )


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """torch.save, with a full disk told in one line.

    Raises:
        SaferError: the disk is full.
    """
    with explain_disk_errors(path.parent):
        try:
            torch.save(state, path)
        except RuntimeError as error:  # torch's own writer reports a full disk this way
            raise SaferError(f"cannot write {path}: {str(error).splitlines()[0]}; free some space") from error


@contextlib.contextmanager
def _torn_named(checkpoint: Path, remedy: str) -> Iterator[None]:
    """Name a checkpoint that cannot be read, with the remedy.

    Raises:
        UserError: a file of it is missing, empty or torn.
    """
    try:
        yield
    except (SaferError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        first = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint {checkpoint} is torn ({type(error).__name__}: {first}); {remedy}") from error


class Checkpoints:
    """`step-N` directories of one training, whole or absent; the highest counts, and the one before it is kept."""

    def __init__(self, state: Path, rank: int, group: dict[str, Any]) -> None:
        self.state = state
        self.rank = rank
        self.group = group  # what a checkpoint depends on: workers, engine, partitioning
        self.began = self.saved = self.begun = time.monotonic()
        self.spent = 0.0  # seconds, on all checkpoints
        self.cost = 0.0  # seconds that the next one is taken to need

    def expect(self, module: nn.Module, workers: int) -> None:
        """Take the first checkpoint to cost what a module's weights, and what Adam keeps of them, are to write."""
        size = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in module.parameters())
        self.cost = size / workers / WRITE_RATE

    def due(self, wanted: bool = False) -> bool:
        """Return whether there is time for a checkpoint: with it, all take `SAVE_SHARE` of the training at most."""
        now = time.monotonic()
        waited = wanted or now - self.saved > LEAST_SECONDS
        return waited and self.spent + self.cost <= SAVE_SHARE * (now - self.began)

    def begin(self) -> Path:
        """Return where the next checkpoint is written, under its temporary name."""
        self.begun = time.monotonic()
        path = self.state / "next"
        if self.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            make_folder(path)
        return path

    def write(self, engine: Checkpointable, state: dict[str, Any]) -> Path:
        """Write this worker's part: the engine's, its random state, and the loop's on the first worker; where it is."""
        path = self.state / "next"
        engine.save(path)
        save_tensors({"rng": torch.get_rng_state()}, path / f"rng-{self.rank}.pt")
        if self.rank == 0:
            save_tensors(state, path / "loop.pt")
            (path / "group.json").write_text(json.dumps(self.group), encoding="utf-8")
        return path

    def close(self, step: int) -> None:
        """Rename the checkpoint, then forget the older ones but one."""
        self.saved = time.monotonic()
        self.cost = self.saved - self.begun
        self.spent += self.cost
        if self.rank != 0:
            return
        # Listed before the rename, and removed after it: at every moment one whole checkpoint is there.
        older = self._all()
        target = self.state / f"step-{step:08}"
        shutil.rmtree(target, ignore_errors=True)
        move(self.state / "next", target)
        for path in [path for path in older if path != target][: 1 - KEPT or None]:
            shutil.rmtree(path)

    def _all(self) -> list[Path]:
        return sorted(self.state.glob("step-*"))

    def load(self, engine: Checkpointable, workers: Workers) -> dict[str, Any] | None:
        """The last checkpoint into `engine`; the loop's state, None where there is none.

        Raises:
            UserError: it was made by another number or kind of workers, or its files are torn, or not those saved.
        """
        self.began = time.monotonic()  # of the loop: what was read before it is no time of its steps
        if not self._all():
            return None
        path = self._all()[-1]
        remedy = f"delete {self.state} to train anew"
        if len(self._all()) > 1:
            remedy = f"delete {path} to go on from {self._all()[-2].name}, or all of {self.state} to train anew"
        with _torn_named(path, remedy):
            group = json.loads((path / "group.json").read_text(encoding="utf-8"))
        if group != self.group:
            raise UserError(
                f"the unfinished training in {self.state} was made with {group}, this run has {self.group}; go on with "
                f"the same, or delete {self.state} to train anew"
            )
        # Before anything of it is read: DeepSpeed unpickles its files.
        check_digests(path, workers.rank, workers.size, lambda found: workers.sum(torch.tensor(found)).tolist(), remedy)
        with _torn_named(path, remedy):
            engine.load(path)
            # Last, since building an engine and loading weights may draw from it.
            torch.set_rng_state(torch.load(path / f"rng-{self.rank}.pt", weights_only=True)["rng"])
            return torch.load(path / "loop.pt", weights_only=True, map_location="cpu")


class OneProcess:
    """Training in this process alone."""

    rank = 0
    size = 1
    partitions = False

    def __init__(self, state: Path, on_step: Callable[[int, int], None] = lambda done, total: None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.state = state
        self.checkpoints = Checkpoints(state, 0, {"workers": 1, "engine": "torch"})
        self.on_step = on_step

    def engine(self, module: nn.Module, options: OptimizerOptions) -> OptimizerAdapter:
        self.checkpoints.expect(module, self.size)
        return TorchOptimizer(module, options)

    def sum(self, values: Tensor) -> Tensor:
        return values

    def reduce_scatter(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def all_gather(self, tensors: Sequence[Tensor]) -> None:
        pass

    def due(self, wanted: bool = False) -> bool:
        return asked_to_end() or self.checkpoints.due(wanted)

    def save(self, engine: Checkpointable, state: dict[str, Any]) -> None:
        self.checkpoints.begin()
        record_digests(self.checkpoints.write(engine, state), 0, 1)
        self.checkpoints.close(state["progress"]["step"])
        if asked_to_end():
            end()

    def load(self, engine: Checkpointable) -> dict[str, Any] | None:
        return self.checkpoints.load(engine, self)


def share(rows: int, rank: int, size: int) -> slice:
    """Consecutive rows that worker `rank` of `size` looks after."""
    return slice(rows * rank // size, rows * (rank + 1) // size)


def my_share(rows: np.ndarray, workers: Workers) -> np.ndarray:
    """This worker's rows of a batch: every `size`-th, so that rows of like length spread evenly."""
    return rows[workers.rank :: workers.size]
