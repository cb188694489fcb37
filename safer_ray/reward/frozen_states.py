"""Compute once what frozen blocks give of every pair of a training, each worker its share, and map it from files.

A state is kept as float16 with one power of two for each token, which puts the token's largest entry into the range
[2^14, 2^15): the rounding is relative, 2^-11 at most, for all entries down to 2^-28 of that, whatever the model's scale
(plain float16 overflows at 65,504, which the largest entries of some models come near; bfloat16 rounds by 2^-8).
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from safer_ray.errors import UserError
from safer_ray.reward.forward import trunk_states
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import unpacked
from safer_ray.reward.text import both_sides
from safer_ray.reward.training_pairs import TrainingPairs, checksum
from safer_ray.reward.training_steps import Workers, share
from safer_ray.storage.files import make_folder, write_json

FOLDER = "frozen-states"  # in a training's state
TOP = 15  # the exponent of two that a token's largest entry lies below
AT_ONCE = 2**28  # bytes of float32 states that are computed before they are written
FREE_SHARE = 0.9  # of the free disk, where nobody says how much may be taken
log = logging.getLogger(__name__)


class Halves(NamedTuple):
    """States in float16, [tokens, d], and the exponent of each token's power of two, int8 [tokens]."""

    values: np.ndarray
    exponents: np.ndarray


def to_halves(states: Float[Tensor, "tokens d"]) -> Halves:
    """Round states to float16, scaled by a power of two for each token."""
    x = states.float().cpu().numpy()
    _, exponent = np.frexp(np.abs(x).max(axis=1, initial=0.0))
    exponents = np.clip(exponent - TOP, -128, 127).astype(np.int8)
    with np.errstate(over="ignore"):  # of infinite ones, which stay so and are told as a loss that is no number
        return Halves(np.ldexp(x, -exponents.astype(np.int32)[:, None]).astype(np.float16), exponents)


def from_halves(halves: Halves) -> Float[Tensor, "tokens d"]:
    """Return states in float32; what `to_halves` rounded, exactly."""
    return torch.from_numpy(np.ldexp(halves.values.astype(np.float32), halves.exponents.astype(np.int32)[:, None]))


class FrozenStates:
    """The states of both sides of pairs, by the pairs' numbers, in the files of all workers."""

    def __init__(self, folder: Path, pairs: TrainingPairs, width: int, workers: int) -> None:
        lengths = pairs.side_lengths
        self.numbers = pairs.numbers
        self.first = np.concatenate([[0], np.cumsum(lengths.reshape(-1))])  # token of each side, chosen then rejected
        self.bounds = [share(len(pairs), rank, workers).start for rank in range(workers)]
        files = [_files(folder, rank, workers) for rank in range(workers)]
        tokens = [self._tokens(share(len(pairs), rank, workers)) for rank in range(workers)]
        self.parts = [
            Halves(np.memmap(values, np.float16, "r", shape=(count, width)), np.memmap(powers, np.int8, "r"))
            if count
            else Halves(np.empty((0, width), np.float16), np.empty(0, np.int8))
            for (values, powers), count in zip(files, tokens, strict=True)
        ]

    def _tokens(self, rows: slice) -> int:
        return int(self.first[2 * rows.stop] - self.first[2 * rows.start])

    def __getitem__(self, numbers: np.ndarray) -> list[Float[Tensor, "tokens d"]]:
        """The states of the chosen sides of pairs by their numbers, then those of the rejected ones."""
        rows = np.searchsorted(self.numbers, numbers)
        return [self._side(int(row), side) for side in (0, 1) for row in rows]

    def _side(self, row: int, side: int) -> Tensor:
        owner = int(np.searchsorted(self.bounds, row, side="right")) - 1
        base = self.first[2 * self.bounds[owner]]
        start, stop = self.first[2 * row + side] - base, self.first[2 * row + side + 1] - base
        values, exponents = self.parts[owner]
        return from_halves(Halves(values[start:stop], exponents[start:stop]))


def frozen_states(
    reward: RewardModel, pairs: TrainingPairs, workers: Workers, gigabytes: float | None = None
) -> FrozenStates:
    """Compute, each worker its share of the pairs, what the frozen blocks of a model give; what is there stays.

    Raises:
        UserError: it takes more than so many gigabytes, or than the disk has.
        TooLargeError: sequences that do not fit the memory.
    """
    folder, width = workers.state / FOLDER, reward.hidden_size
    own = share(len(pairs), workers.rank, workers.size)
    lengths = pairs.side_lengths
    known = {"layer": reward.frozen_layers, "width": width, "pairs": len(pairs), "tokens": pairs.checksum}
    account, files = folder / f"{workers.rank}-of-{workers.size}.json", _files(folder, workers.rank, workers.size)
    # Their content, too: what is damaged is computed again, where training on it would go unnoticed.
    missing = _read(account) != known | {"files": [checksum(file) for file in files]}
    if workers.sum(torch.tensor([float(missing)]))[0] > 0:
        _check_room(folder, reward, len(pairs), int(lengths.sum()), gigabytes)
    if missing:
        make_folder(folder)
        account.unlink(missing_ok=True)
        with files[0].open("wb") as numbers, files[1].open("wb") as powers:
            for rows in _chunks(lengths[own].sum(axis=1), own.start, max(1, AT_ONCE // (4 * width))):
                sides = both_sides(pairs[rows])
                for states in trunk_states(reward, [unpacked(side.ids, side.types) for side in sides]):
                    halves = to_halves(states)
                    numbers.write(halves.values.tobytes())
                    powers.write(halves.exponents.tobytes())
            for file in (numbers, powers):  # before the account that says so
                file.flush()
                os.fsync(file.fileno())
        write_json(known | {"files": [checksum(file) for file in files]}, account)
    workers.sum(torch.zeros(1))  # all wait for all
    return FrozenStates(folder, pairs, width, workers.size)


def _read(account: Path) -> Any:
    """Return what an account says; None where there is none, or a torn one."""
    try:
        return json.loads(account.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _check_room(folder: Path, reward: RewardModel, pairs: int, tokens: int, gigabytes: float | None) -> None:
    needed = tokens * (2 * reward.hidden_size + 1) / 1e9
    free = shutil.disk_usage(folder.parent).free / 1e9
    allowed = FREE_SHARE * free if gigabytes is None else gigabytes
    what = (
        f"reward: what {reward.frozen_layers} frozen blocks give of {pairs:,} pairs ({tokens:,} tokens of width "
        f"{reward.hidden_size}) takes {needed:,.3g} GB in {folder}"
    )
    remedy = "lower reward.max_length, train on fewer pairs, or set reward.frozen_layers: 0"
    if gigabytes is not None and needed > gigabytes:
        raise UserError(f"{what}, and reward.frozen_states_gb is {gigabytes:g}; raise it, {remedy}")
    if needed > allowed:
        raise UserError(f"{what}, and {free:,.3g} GB are free there; free some, {remedy}")
    log.info("%s, of %.3g GB", what, allowed)


def _chunks(tokens: np.ndarray, first: int, at_once: int) -> Iterator[np.ndarray]:
    """Rows from `first` on, in turn, so many tokens at a time or a row that has more."""
    start, held = 0, 0
    for row, count in enumerate(tokens.tolist()):
        if held and held + count > at_once:
            yield np.arange(first + start, first + row)
            start, held = row, 0
        held += count
    if len(tokens):
        yield np.arange(first + start, first + len(tokens))


def _files(folder: Path, rank: int, workers: int) -> tuple[Path, Path]:
    return folder / f"{rank}-of-{workers}.float16", folder / f"{rank}-of-{workers}.exponents"
