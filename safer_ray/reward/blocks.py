"""Some of a model's blocks: what its config is then, and which tensors are theirs."""

import re
from typing import Any

BLOCK = re.compile(r"\blayers?\.(\d{1,9}+)(?=\.)")  # model.layers.3.…, bert.encoder.layer.3.…


def keep_blocks(config: Any, start: int, stop: int) -> Any:
    """Return the config of a model that is blocks start+1..stop of this one; its lists with an entry a block are cut
    alike."""
    tree = config.to_dict()
    count = int(config.num_hidden_layers)
    for name, value in tree.items():
        if "layer" in name and isinstance(value, list) and len(value) == count:
            tree[name] = value[start:stop]
    kept = type(config)(**tree | {"num_hidden_layers": stop - start})
    kept.num_hidden_layers = stop - start
    return kept


def lies_behind(tensor: str, stop: int) -> bool:
    """Return whether a tensor belongs to a block after the first `stop`."""
    block = BLOCK.search(tensor)
    return block is not None and int(block[1]) >= stop
