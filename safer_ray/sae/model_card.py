"""The model card beside a saved SAE: what it is, what it was trained on, how well it does, how to load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safer_ray.sae.variants.registry import variant_of
from safer_ray.storage.files import write_text

CARD = """---
library_name: saelens
tags: [sparse-autoencoder, reward-model, safer_ray]
---

# Sparse autoencoder of layer {layer} of {model}

| | |
|---|---|
| reads | the output of block {layer} (1-based), standardised over the hidden dimension |
| kind | {kind} |
| width, latents | {width}, {latents} |
{facts}
Load it with `safer_ray.sae.formats.load_sae(DIRECTORY)`, or with SAELens, which standardises by itself:

```python
from sae_lens import SAE

sae = SAE.load_from_disk("DIRECTORY")
codes = sae.encode(hidden_states)  # as the model gives them
```
{warning}"""


def write_model_card(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write `README.md` into an SAE's directory.

    `facts` are counts and held-out measures by name, as `train_sae` returns them; only numbers and texts are told.
    """
    config = json.loads((directory / "cfg.json").read_text(encoding="utf-8"))
    metadata = config["metadata"]
    variant = variant_of(config)
    assert variant is not None
    told = {name: value for name, value in facts.items() if isinstance(value, int | float | str)}
    card = CARD.format(
        layer=metadata["safer_ray_layer"],
        model=metadata["model_name"],
        kind=variant.told(config),
        width=config["d_in"],
        latents=f"{config['d_sae']:,}",
        facts="".join(f"| {name.replace('_', ' ')} | {_shown(value)} |\n" for name, value in told.items()),
        warning=variant.warning,
    )
    write_text(card, directory / "README.md")


def _shown(value: float | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else value
