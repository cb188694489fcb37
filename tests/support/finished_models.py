"""Finished reward models that nobody trained here, and the smallest run that uses one."""

import json
from pathlib import Path

from safer_ray.config.sections import RunConfig
from support.made import EXCHANGE, make_pairs
from support.reward_models import save_reward_model_of

LAYERS = 3


def finished_model(folder: Path, kind: str = "Llama 3") -> Path:
    """A tiny random reward model as anybody would save it, with a chat template or of an encoder."""
    return save_reward_model_of(kind, folder)


def altered(folder: Path, name: str, change) -> Path:
    """The folder of a model after `change` of one of its tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_rows(path: Path, count: int, start: int = 0) -> Path:
    """Pairs as lines, each with a prompt of its own."""
    names = ("pair_id", "prompt", "chosen", "rejected", "section")
    rows = make_pairs(start + count).to_pylist()[start:]
    path.write_text("".join(json.dumps({name: row[name] for name in names}) + "\n" for row in rows), encoding="utf-8")
    return path


def write_probe(path: Path) -> Path:
    """A probe of few exchanges."""
    lines = [EXCHANGE.format(i=i, kind=("harmful", "benign")[i % 2]) for i in range(12)]
    path.write_text("concept: made\nexchanges:\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_of(folder: Path, model: str | Path, pairs: int = 60, **more) -> RunConfig:
    """The config of a run of seconds that uses a finished model; a judge that finds everything worth a 5."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = {
        "name": "made",
        "root": str(folder / "runs"),
        "pairs": {"sources": [{"path": str(write_rows(folder / "pairs.jsonl", pairs)), "licence": "MIT"}]},
        "reward": {"use": str(model)},
        "activations": {"layer": 2},
        "sae": {"latents": 64, "k": 4, "steps": 10, "batch_size": 32, "spliced_pairs": 4, "validation_percent": 20},
        "judge": {"exchanges": str(write_probe(folder / "probe.yaml")), "thresholds": [0, 0, 0, 0]},
        "report": {"pairs": 2, "features": 2},
    }
    for key, value in more.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return RunConfig.model_validate(tree)
