"""Find how long a sequence a model can read, by what its config and its class say of positions."""

import sys
from typing import Any

FROM_PAD = "create_position_ids_from_input_ids"  # what transformers calls it, as a function or a method


def longest_sequence(config: Any) -> int | None:
    """Return how many tokens the model of a config reads at most; None: it has no positions that end (ALiBi, distances
    between tokens), or does not say."""
    text = config.get_text_config()
    if has_no_last_position(text):
        return None
    positions = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(positions, int) or positions < 1:  # XLNet says -1
        return None
    if counts_positions_from_pad(text):
        # RoBERTa's embeddings begin at pad_token_id + 1, so that many of `max_position_embeddings` are no position of a
        # text.
        positions -= 1 + (text.pad_token_id if text.pad_token_id is not None else -1)
    return positions


def has_no_last_position(config: Any) -> bool:
    """Return whether a model adds nothing to a token for its position, and knows distances of any length."""
    by_distance = getattr(config, "relative_attention", False) and not getattr(config, "position_biased_input", True)
    return bool(getattr(config, "alibi", False) or by_distance)


def counts_positions_from_pad(config: Any) -> bool:
    """Return whether a model counts positions from behind the number of its pad token, as RoBERTa does, and so has that
    many fewer: whether the module of its class counts them by token ids."""
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        return False
    found = MODEL_MAPPING[type(config)]
    (model, *_) = found if isinstance(found, tuple | list) else (found,)
    # MODEL_MAPPING has imported it. What counts is in the code: no key of the config says how positions are counted.
    module = sys.modules[model.__module__]
    return any(hasattr(member, FROM_PAD) for member in (module, *vars(module).values()) if _own(member, module))


def _own(member: Any, module: Any) -> bool:
    return member is module or (isinstance(member, type) and member.__module__ == module.__name__)
