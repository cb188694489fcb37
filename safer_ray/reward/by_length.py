"""Models that read a sequence otherwise once it is long, and keep in their modules how they read the last one."""

from typing import Any

from torch import Tensor, nn


def reads_otherwise_past(config: Any) -> int | None:
    """Return the tokens past which the model of a config reads a whole batch otherwise; None: length changes nothing.

    Positions of some models (longrope, dynamic) turn at other frequencies, and BigBird attends by blocks.
    """
    text = config.get_text_config()
    found = []
    if getattr(text, "attention_type", None) == "block_sparse":  # as transformers counts what such attention needs
        found.append((5 + 2 * text.num_random_blocks) * text.block_size)
    ropes = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    ropes = ropes if isinstance(ropes, dict) else {}
    for rope in (ropes, *ropes.values()):  # some models have one for each kind of layer
        kind = str(rope.get("rope_type") or rope.get("type")) if isinstance(rope, dict) else ""
        if kind in ("longrope", "su") or "dynamic" in kind:
            named = rope.get("original_max_position_embeddings")
            found.append(named or getattr(text, "original_max_position_embeddings", 0) or text.max_position_embeddings)
    return min(found, default=None)


def forget_last_sequence(model: nn.Module) -> None:
    """Make a model read its next sequence as if it were the first, whose length then decides alone."""
    for module in list(model.modules()):  # of those that were set with what holds them, nothing is left to do
        config = getattr(module, "config", None)
        kind = getattr(config, "attention_type", None)
        set_attention: Any = getattr(module, "set_attention_type", None)
        if set_attention is not None and module.attention_type != kind:
            set_attention(kind)
        first = getattr(module, "original_max_seq_len", None)
        for name, buffer in list(module.named_buffers(recurse=False)):
            # Names of transformers' `dynamic_rope_update` (5.x): it keeps the first frequencies under this one, and the
            # length that the present ones are for under `max_seq_len_cached`.
            start = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
            changing = name.endswith("inv_freq") and "original" not in name and first is not None
            if changing and isinstance(start, Tensor):
                setattr(module, name, start.to(buffer.device, copy=True))
                setattr(module, name.replace("inv_freq", "max_seq_len_cached"), first)
