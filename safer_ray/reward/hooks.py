"""Reading a model on its way: what blocks give, what a head reads, and where a pass begins and ends.

A hook belongs to a module, which several threads may run at once; each of these hears its own thread's passes alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn


class LayerReachedError(Exception):
    """Ends a forward pass at the last layer wanted."""


def states_of(output: Any) -> Tensor:
    """Return the hidden states in what a block gives, which many put first in a tuple or a list of several things."""
    return output[0] if isinstance(output, tuple | list) else output


def with_states(output: Any, states: Tensor) -> Any:
    """Return what a block gives with other hidden states in it, in the type that they had.

    States of fewer tokens than the block's are those of the first ones: some models lengthen a batch on their way, and
    mask what they add.
    """
    own = states_of(output)
    states = states.to(own)
    if states.shape[1] < own.shape[1]:
        states = torch.cat([states, own[:, states.shape[1] :]], dim=1)
    if isinstance(output, tuple | list):
        return type(output)([states, *output[1:]])
    return states


@contextmanager
def before(module: nn.Module, change: Callable[[tuple[Any, ...]], tuple[Any, ...] | None]) -> Iterator[None]:
    """Inside, `change` sees what `module` is given by place; what it returns, if anything, is given instead."""
    # The thread that sets the hook is the one whose passes it is for.
    mine = get_ident()
    handle = module.register_forward_pre_hook(
        lambda _module, inputs: change(inputs) if get_ident() == mine else None  # with names, threads would race
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def after(module: nn.Module, change: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, `change` sees what `module` gives; what it returns, if anything, is given instead."""
    mine = get_ident()
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: change(output) if get_ident() == mine else None
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def capture_output(module: nn.Module, found: dict[int, Tensor], number: int, *, end: bool) -> Iterator[None]:
    """Inside, what block `number` gives is put into `found`, and ends the pass if it is the `end`."""

    def catch(output: Any) -> None:
        found[number] = states_of(output)
        # An exception is the one way out of a forward pass that asks the model's code for nothing.
        if end:
            raise LayerReachedError

    with after(module, catch):
        yield


@contextmanager
def compute_only_at(module: nn.Module, index: tuple[Tensor, Tensor]) -> Iterator[None]:
    """Inside, a module that takes each token by itself runs on the tokens at `index` (row, column) alone; it gives
    zeros for all others. It is given them as one sequence, since mixtures of experts want a batch."""
    shape: list[int] = []

    def gather(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        # Kept for `scatter`, which sees the gathered tokens alone; indices do not tell how many tokens there were.
        shape[:] = inputs[0].shape[:-1]
        return (inputs[0][index][None], *inputs[1:])

    def scatter(output: Tensor) -> Tensor:
        whole = output.new_zeros((*shape, output.shape[-1]))
        whole[index] = output[0]
        return whole

    with before(module, gather), after(module, scatter):
        yield
