"""One micro-batch through a reward model: what blocks give where it is read, what the head reads, and the rewards."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safer_ray.errors import UserError
from safer_ray.reward import hooks
from safer_ray.reward.by_length import forget_last_sequence
from safer_ray.reward.heads import one_reward, own_outputs
from safer_ray.reward.model import RewardModel
from safer_ray.reward.packing import Index, Packed, alike, end_index, is_known, pack_batch, pad_batch, token_index
from safer_ray.reward.pretrained import runs_own_code
from safer_ray.reward.trunk import States


class ForwardRequest(NamedTuple):
    """The purpose of a forward pass."""

    layers: tuple[int, ...] = ()  # blocks, 1-based, whose outputs are wanted, side by side
    rewards: bool = True
    heads: bool = False  # what the reward head reads
    states: bool = False  # what the last block gives at every token, for the part of the model behind this one

    @property
    def reaches_head(self) -> bool:
        """Return whether the pass runs to the end of the model."""
        return self.rewards or self.heads


class MicroBatchResult(NamedTuple):
    """The results asked for of the sides of a micro-batch in turn, and of its rows."""

    hidden: Float[Tensor, "tokens width"] | None
    rewards: Float[Tensor, " sides"] | None
    heads: Float[Tensor, "sides d"] | None
    states: States  # of each row; empty where they were not asked for


@torch.inference_mode()
def run_micro_batch(
    reward: RewardModel,
    rows: Sequence[Packed],
    request: ForwardRequest,
    positions: Sequence[Sequence[np.ndarray]] | None = None,
    given: Sequence[Tensor] | None = None,
) -> MicroBatchResult:
    """Return what is asked for of rows that all have as many sides.

    `positions` are by row and side: tokens whose vectors are read. `given` are the states of each row behind the part
    of the model before this one.
    """
    if not reward.pads:
        forget_last_sequence(reward.model)
    batch = _inputs(reward, rows, reward.model.dtype)
    read = token_index(rows, positions, reward.device) if positions is not None else None
    ends = end_index(rows, reward.unread_at_end, reward.device)
    with contextlib.ExitStack() as stack:
        if given is not None:  # the first block here is handed them; some models scale embeddings before it
            states = pad_sequence(list(given), batch_first=True).to(reward.device)
            del batch["input_ids"]
            # For its shape, dtype and device, by which backbones make masks and positions; the hook puts the very
            # states in.
            batch["inputs_embeds"] = states
            stack.enter_context(hooks.before(reward.blocks()[0], lambda inputs: (states, *inputs[1:])))
        if is_known(reward.model.config):
            outputs, heads, rewards = _run_backbone(reward, batch, request, read, ends)
        else:
            outputs, heads, rewards = _run_whole_model(reward, batch, request, ends)
    # Each row without its padding: rows are batched anew in the next part, where others stand beside them.
    states_of_rows: States = []
    if request.states:
        for row, state in zip(rows, outputs[max(reward.numbered_blocks())], strict=True):
            states_of_rows.append(state[: len(row.ids)].cpu())
    return MicroBatchResult(
        _vectors(outputs, request.layers, read),
        rewards.float().cpu() if rewards is not None and request.rewards else None,
        heads.float().cpu() if heads is not None and request.heads else None,
        states_of_rows,
    )


def rewards_of(
    reward: RewardModel, rows: Sequence[Packed], run: Callable[..., Any] | None = None
) -> Float[Tensor, " sides"]:
    """Return the rewards of all sides of rows, each row's in turn; with gradients.

    The rows are one micro-batch, and all have as many sides. The whole model runs as it is patched now, by `run`
    where something wraps it.
    """
    device, config = reward.device.type, reward.model.config
    if len(rows) > 1 and not (reward.pads and len({alike(config, row) for row in rows}) == 1):
        return torch.cat([rewards_of(reward, [row], run) for row in rows])
    if not reward.pads:
        forget_last_sequence(reward.model)
    # Under autocast attention runs in the lower dtype, and a mask of float32's minimum would be infinite there.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else reward.model.dtype
    batch = _inputs(reward, rows, dtype)
    ends = end_index(rows, reward.unread_at_end, reward.device)
    outputs: list[Tensor] = []
    own_code = runs_own_code(config)
    with contextlib.ExitStack() as stack:
        if not own_code:
            # The head's own output: the model's logits are read at the last token of a row, which holds two sides.
            stack.enter_context(hooks.after(reward.head(), outputs.append))
        runs_again = any(getattr(module, "gradient_checkpointing", False) for module in reward.model.modules())
        if is_known(config) and not runs_again:  # blocks that backward runs a second time have lost their hooks by then
            stack.enter_context(hooks.compute_only_at(reward.blocks()[-1].get_submodule("mlp"), ends))
        given = (run or reward.model)(**batch)
    if own_code:
        return one_reward(own_outputs(reward.name, given), reward.weights, ends)
    output = outputs.pop()
    # A decoder's head gives its output at every token; behind any other, an activation may follow.
    return output[ends][:, 0] if output.ndim == 3 else given.logits[:, 0]


def _inputs(reward: RewardModel, rows: Sequence[Packed], dtype: torch.dtype) -> dict[str, Tensor]:
    if len(rows[0].lengths) > 1:
        return pack_batch(rows, reward.pad, reward.device, dtype)
    return pad_batch([row.ids for row in rows], reward.pad, reward.device, [row.types for row in rows])


def _run_backbone(
    reward: RewardModel, batch: dict[str, Tensor], request: ForwardRequest, read: Index | None, ends: Index
) -> tuple[dict[int, Tensor], Tensor | None, Tensor | None]:
    """Run a model of a known family: blocks' outputs, and at the ends alone what the head reads and the rewards."""
    outputs, output = _run(reward, reward.model.base_model, batch | {"use_cache": False}, request, read, ends)
    if output is None:
        return outputs, None, None
    heads = output.last_hidden_state[ends]
    return outputs, heads, reward.head()(heads)[:, 0]


def _run_whole_model(
    reward: RewardModel, batch: dict[str, Tensor], request: ForwardRequest, ends: Index
) -> tuple[dict[int, Tensor], Tensor | None, Tensor | None]:
    """Run any other model: blocks' outputs, and what its own head reads and gives."""
    own_code, inputs = runs_own_code(reward.model.config), []
    reads = reward.reads_states() if own_code else reward.head()
    with contextlib.ExitStack() as stack:
        if isinstance(reads, nn.Linear):
            stack.enter_context(hooks.before(reads, lambda given: inputs.append(given[0])))
        elif request.heads:
            stack.enter_context(hooks.after(reads, lambda given: inputs.append(given[0])))
        outputs, output = _run(reward, reward.model, batch, request)
    if output is None:
        return outputs, None, None
    values = inputs.pop() if inputs else None
    heads = values[ends] if values is not None and values.ndim == 3 else values
    if own_code:
        if request.heads and (heads is None or reads is reward.model):
            raise UserError(
                f"{reward.name}: its own code does not tell what it reads rewards from; use another detector"
            )
        return outputs, heads, one_reward(own_outputs(reward.name, output), reward.weights, ends)
    assert values is not None
    assert heads is not None
    if values.ndim != 3 or reward.unread == reward.pad:
        return outputs, heads, one_reward(output.logits, None, ends)
    # The model itself would look for the last token that is not the pad token that it runs with here.
    return outputs, heads, reward.head()(heads)[:, 0]


def _run(
    reward: RewardModel,
    module: Any,
    batch: dict[str, Any],
    request: ForwardRequest,
    read: Index | None = None,
    ends: Index | None = None,
) -> tuple[dict[int, Tensor], Any]:
    """Return what the blocks asked for give, and what the module does: None where it ends at one of them.

    Given where tokens are `read` and where sides end, the last block's feed-forward part, most of its work, runs
    there alone: nobody looks at what it makes of other tokens.
    """
    if not request.layers and not request.states and ends is None:  # also of models whose blocks nobody knows
        return {}, module(**batch)
    blocks = reward.numbered_blocks()
    captured = {layer for layer in request.layers if layer in blocks}
    if request.states:
        captured.add(max(blocks))
    leaves_at_block = request.states or not request.reaches_head  # what comes behind it is of no use
    last = max(captured) if leaves_at_block else max(blocks)  # block that runs
    looked_at = _looked_at(request, last, read, None if leaves_at_block else ends)
    tokens = batch["attention_mask"].shape[0] * batch["attention_mask"].shape[-1]
    outputs: dict[int, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for number in captured:
            leaves = leaves_at_block and number == last
            stack.enter_context(hooks.capture_output(blocks[number], outputs, number, end=leaves))
        if looked_at is not None and 2 * len(looked_at[0]) < tokens:  # else gathering costs more than it saves
            stack.enter_context(hooks.compute_only_at(blocks[last].get_submodule("mlp"), looked_at))
        try:
            return outputs, module(**batch)
        except hooks.LayerReachedError:
            return outputs, None


def _looked_at(request: ForwardRequest, last: int, read: Index | None, ends: Index | None) -> Index | None:
    """Return the tokens at which the output of the last block is looked at; None: at all of them, or nobody knows."""
    found = []
    if read is not None and last in request.layers:
        found.append(read)
    if ends is not None:
        found.append(ends)
    # The next part of the model attends to every token, so none may be left out.
    if request.states or not found:
        return None
    # A token may come twice, read and at an end: it is computed twice, and written twice with the same value.
    rows, columns = zip(*found, strict=True)
    return torch.cat(rows), torch.cat(columns)


def _vectors(
    outputs: dict[int, Tensor], layers: Sequence[int], read: Index | None
) -> Float[Tensor, "tokens width"] | None:
    """Return what the blocks of `layers` that ran here give at the tokens that are read, side by side by rising
    number."""
    if read is None:
        return None
    vectors = [outputs[layer][read].float().cpu() for layer in sorted(layers) if layer in outputs]
    return torch.cat(vectors, dim=-1) if vectors else torch.empty(len(read[0]), 0)
