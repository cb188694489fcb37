"""From what a model gives to one reward: the raw output, and never a sigmoid, whatever its config says."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from safer_ray.config.head import HeadConfig
from safer_ray.errors import UserError
from safer_ray.reward.loaded import check_loaded, is_of_head, outputs_of_head
from safer_ray.reward.pretrained import set_outputs

VALUE_HEAD = "v_head.summary"  # of a language model that TRL trained with a value head
HEAD_BIAS = "head_bias"  # in the config of a model exported here: its head has the bias that a value head had
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")  # modules of such classes
NAMES = ("score", "scores", "reward", "rewards", "logits")  # of rewards in what code of a checkpoint's own gives
CHOOSE = "choose a reward with head: {output: 0}, head: {weights: [...]}, or of two classes head: {difference: [1, 0]}"
log = logging.getLogger(__name__)

Opened = tuple[Any, dict[str, Any]]  # a model, and what transformers says of loading it


def open_with_head(
    name: str,
    open_with: Callable[[int], Opened],
    read: Callable[[str], Tensor],
    head: HeadConfig | None,
    *,
    outputs: int,
    whole: bool,
) -> Any:
    """Return a classifier of one output, whatever head its checkpoint has.

    `open_with` opens it with so many outputs, of which its config says `outputs`; `read` gives a tensor of its files.
    Several are one linear layer, of which `head` makes one with a single output. A model that is not `whole` may lack a
    head, and where several outputs are not chosen from, a new one is trained in their place.

    Raises:
        UserError: a head of several outputs that nobody chose from, or weights that are not there.
    """
    model, found = open_with(1 if head is None else outputs)
    several = outputs_of_head(model, found)
    if several and head is not None:
        model, found = open_with(several)
    tell_other_outputs(name, model, found, whole=whole)
    found = _adopt(name, model, found, read, head)
    check_loaded(name, model, found, whole=whole)
    if head is not None:
        _fold(name, model, head)
    return model


def tell_other_outputs(name: str, model: Any, found: dict[str, Any], *, whole: bool) -> None:
    """Tell of a checkpoint whose head has other outputs than its model, which are not read.

    Raises:
        UserError: a `whole` model was wanted.
    """
    several = outputs_of_head(model, found)
    if several and whole:
        raise UserError(f"cannot load a reward model from {name}: {of_outputs(several)}")
    if several:
        log.warning("%s has %d outputs: a new head of one output is trained in their place", name, several)


def of_outputs(several: int) -> str:
    """Return the words for a model with several outputs, and the remedy."""
    return f"it has {several} outputs, and a reward is one; {CHOOSE}"


def _adopt(
    name: str, model: Any, found: dict[str, Any], read: Callable[[str], Tensor], head: HeadConfig | None
) -> dict[str, Any]:
    """Give the head what its checkpoint has and its class does not foresee: TRL's value head, or the bias that such a
    one had where it was exported here. Any other bias is left out, as transformers leaves it out.

    Returns what transformers says of loading, without that.

    Raises:
        UserError: a value head of another width, or of several outputs that nobody chose from.
    """
    missing, strange = set(found["missing_keys"]), set(found["unexpected_keys"])
    prefix = "score"
    if missing == {"score.weight"} and f"{VALUE_HEAD}.weight" in strange:
        prefix = VALUE_HEAD
        model.score = _value_head(name, model, read(f"{VALUE_HEAD}.weight"))
        outputs = model.score.out_features
        if outputs > 1 and head is None:
            raise UserError(f"cannot load a reward model from {name}: {of_outputs(outputs)}")
        set_outputs(model.config, outputs)
        model.num_labels = outputs
        missing.clear()
        strange.discard(f"{VALUE_HEAD}.weight")
        setattr(model.config, HEAD_BIAS, f"{VALUE_HEAD}.bias" in strange)
    # transformers 5 drops a bias that the class does not have, and says only that it was unexpected.
    bias = f"{prefix}.bias"
    if bias in strange and getattr(model.config, HEAD_BIAS, None) is True and model.score.bias is None:
        values, layer = read(bias), model.score
        if tuple(values.shape) != (layer.out_features,):
            raise _misshapen(name, bias, values, (layer.out_features,))
        layer.bias = nn.Parameter(values.to(layer.weight.device, layer.weight.dtype))
        strange.discard(bias)
    return {**found, "missing_keys": missing, "unexpected_keys": strange}


def _value_head(name: str, model: Any, weight: Tensor) -> nn.Linear:
    """Return a layer of such a weight, in the place of the model's own.

    Raises:
        UserError: the weight does not fit the model.
    """
    own = model.score
    if weight.ndim != 2 or not len(weight) or weight.shape[1] != own.in_features:
        raise _misshapen(name, f"{VALUE_HEAD}.weight", weight, (1, own.in_features))
    layer = nn.Linear(own.in_features, len(weight), bias=False, device=own.weight.device, dtype=own.weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def _misshapen(name: str, weight: str, found: Tensor, wanted: tuple[int, ...]) -> UserError:
    return UserError(f"{name}: {weight} is {tuple(found.shape)}, by config.json {wanted}; copy both files again")


def _linear(model: Any) -> list[tuple[str, nn.Linear]]:
    """The linear layers behind the blocks, by name."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_of_head(f"{name}.weight", model)
    ]


def _fold(name: str, model: Any, head: HeadConfig) -> None:
    """Put a linear layer of one output into the place of the last one, whose outputs `head` weighs."""
    layers = _linear(model)
    if not layers:
        raise UserError(f"{name}: cannot find the head of a {type(model).__name__}, of which `head` is to choose")
    place, layer = layers[-1]
    weighed = chosen(name, head, layer.out_features)
    behind = _activation_behind(model, place)
    if behind is not None and sorted(weighed) != [0] * (len(weighed) - 1) + [1]:
        raise UserError(
            f"{name}: the outputs of a {type(model).__name__} go through {type(behind).__name__}, behind which they "
            "cannot be weighed; choose one, with head: {output: 0}"
        )
    # In float64: a difference of two like rows in a lower precision would lose digits, and be rounded twice.
    weights = torch.tensor([weighed], dtype=torch.float64, device=layer.weight.device)
    one = nn.Linear(layer.in_features, 1, bias=layer.bias is not None, dtype=layer.weight.dtype, device="meta")
    one.weight = nn.Parameter((weights @ layer.weight.detach().double()).to(layer.weight.dtype))
    if layer.bias is not None:
        one.bias = nn.Parameter((weights @ layer.bias.detach().double()).to(layer.bias.dtype))
    model.set_submodule(place, one)
    set_outputs(model.config, 1)
    model.num_labels = 1


def begin_anew(name: str, model: Any) -> None:
    """Draw new weights for the layers behind the blocks, as for a model that has no head yet.

    Raises:
        UserError: there are none.
    """
    layers = _linear(model)
    if not layers:
        raise UserError(f"{name}: cannot find the head of a {type(model).__name__}, in whose place a new one is to be")
    spread = float(getattr(model.config.get_text_config(), "initializer_range", None) or 0.02)
    for _, layer in layers:
        nn.init.normal_(layer.weight, std=spread)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _activation_behind(model: Any, place: str) -> nn.Module | None:
    """Return the activation through which the output of a layer goes in the module that it is a part of."""
    parent, _, own = place.rpartition(".")
    children = dict(model.get_submodule(parent).named_children())
    behind = list(children)[list(children).index(own) + 1 :]
    return next((children[name] for name in behind if type(children[name]).__module__ in ACTIVATIONS), None)


def chosen(name: str, head: HeadConfig, outputs: int) -> tuple[float, ...]:
    """Return the weight of each of a model's outputs in the reward.

    Raises:
        UserError: the model has other ones than `head` says.
    """
    try:
        return head.weights_of(outputs)
    except ValueError as error:
        raise UserError(f"{name}: {error}; write `head` for these") from None


def own_outputs(name: str, output: Any) -> Float[Tensor, "n *outputs"]:
    """Return the rewards in what code of a checkpoint's own gives, by the names that such code has for them; one output
    a sequence is preferred to several.

    Raises:
        UserError: it gives none.
    """
    if isinstance(output, Tensor):
        return output
    given = {key: output[key] if isinstance(output, dict) else getattr(output, key, None) for key in _names(output)}
    found = [value for value in given.values() if isinstance(value, Tensor)]
    single = [value for value in found if value.ndim == 1 or value.shape[-1] == 1]
    if not found:
        raise UserError(
            f"{name}: its code gives a {type(output).__name__} without any of {', '.join(NAMES)}; it is no reward "
            "model that can be read"
        )
    return (single or found)[0]


def _names(output: Any) -> list[str]:
    return [key for key in NAMES if (key in output if isinstance(output, dict) else hasattr(output, key))]


def one_reward(values: Tensor, weights: tuple[float, ...] | None, ends: tuple[Tensor, Tensor]) -> Float[Tensor, " n"]:
    """Return one reward a sequence of what a model gives: [n], [n, outputs], or the latter at every token, of which
    those at the `ends` are taken; `weights` are of the outputs."""
    if values.ndim == 3:
        values = values[ends]
    if values.ndim == 1:
        return values
    if weights is None:
        return values[:, 0]
    return (values.double() @ torch.tensor(weights, dtype=torch.float64, device=values.device)).to(values.dtype)
