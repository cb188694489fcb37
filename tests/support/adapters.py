"""Adapters of tiny models, trained by nobody: their weights are drawn, so that each of them moves every reward."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification


def save_adapter(base: Path, folder: Path, *, rows: int | None = None, outputs: int = 1, **values: Any) -> Any:
    """Save an adapter of the classifier in `base` to a folder; the model that it makes of it, not merged."""
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=outputs, ignore_mismatched_sizes=True, dtype=torch.float32
    )
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    kind = values.pop("kind", LoraConfig)
    defaults = {"task_type": "SEQ_CLS"} | (
        {"r": 4, "target_modules": ["q_proj", "v_proj"]} if kind is LoraConfig else {}
    )
    with warnings.catch_warnings(action="ignore"):  # peft's, of names in transformers
        adapted = get_peft_model(model, kind(**defaults | values))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3 if "score" not in name else 1.0)
    with warnings.catch_warnings(action="ignore"):
        adapted.save_pretrained(str(folder))
    return adapted.eval()
