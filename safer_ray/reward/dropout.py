"""Find and disable what a model in training drops at random: rates of modules, and those that classes keep as numbers
for functions."""

from collections.abc import Iterator

from torch import nn


def dropout_rates(model: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    """Yield the rates above 0 at which a model drops values or whole layers: the module, the attribute, the rate."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            yield module, "p", float(module.p)
        for name, rate in vars(module).items():  # such as `attention_dropout`, `residual_dropout`, `layerdrop`
            if ("dropout" in name or name == "layerdrop") and isinstance(rate, float) and rate > 0:
                yield module, name, rate


def has_dropout(model: nn.Module) -> bool:
    """Return whether a model in training would drop what it computes at random."""
    return any(True for _ in dropout_rates(model))


def disable_dropout(model: nn.Module) -> None:
    """Set all rates to 0."""
    for module, name, _ in list(dropout_rates(model)):
        setattr(module, name, 0.0)
