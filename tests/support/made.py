"""Pairs, codes and autoencoders that are made for a test."""

import hashlib
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from safer_ray import schema
from safer_ray.config.sections import TinyLlamaConfig
from safer_ray.sae.model import TopKSae
from safer_ray.storage.artifacts import part_name
from safer_ray.storage.files import write_parquet

SHARED = Path(__file__).parents[3] / "shared"


TINY = TinyLlamaConfig(hidden=32, layers=3, heads=2, intermediate=48, vocabulary=400, positions=128)


SUBJECTS = ("bread", "a bicycle", "the old lock", "my garden", "this recipe", "the report", "a violin", "the engine")


def shared(name: str) -> Path:
    """A file or folder of the data beside the repository; the test skips where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def messages(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def make_pair(pair_id: str, prompt: str, chosen: str, rejected: str, **more: object) -> dict[str, object]:
    """One row of a pairs table."""
    return {
        "pair_id": pair_id,
        "row_key": f"made.jsonl#{pair_id}",
        "prompt": messages("user", prompt) if prompt else [],
        "chosen": messages("assistant", chosen),
        "rejected": messages("assistant", rejected),
        "source": "made",
        "section": "safety",
        "group": hashlib.sha256(prompt.encode()).hexdigest()[:16],
        "labels": [],
    } | more


def make_pairs(n: int) -> pa.Table:
    """Pairs with an easy rule: the chosen response is polite, the rejected one is not."""
    rows = []
    for i in range(n):
        subject = SUBJECTS[i % len(SUBJECTS)]
        rows.append(
            make_pair(
                f"pair-{i:03}",
                f"How do I take care of {subject}, number {i}? I have tried a few things already.",
                f"Gladly, here is what helps with {subject}. Start slowly, then look again. Thank you for asking!",
                f"Who cares about {subject} at all. Go away, you fool. Stop asking me about number {i}!",
                section="safety" if i % 2 else "chat",
                label_margin=float(i),
            )
        )
    return schema.table(rows, schema.PAIRS)


def write_parts(table: pa.Table, directory: Path, rows: int) -> Path:
    """A table as parts of at most `rows` rows."""
    for number, start in enumerate(range(0, len(table), rows)):
        write_parquet(table.slice(start, rows), directory / part_name(number))
    return directory


def make_codes(rows: list[dict[str, object]]) -> pa.Table:
    """A codes table; each side is a list of `(token, {feature: value})`, behind `n_prompt_tokens` the response's; `end`
    is ten times the token."""
    columns = []
    for number, row in enumerate(rows):
        made = {"pair_id": row.get("pair_id", f"p{number}")}
        for side in schema.SIDES:
            entries = row.get(side, [])
            made |= {
                f"{side}_token": [token for token, _ in entries],
                f"{side}_end": [10 * token for token, _ in entries],
                f"{side}_features": [sorted(values) for _, values in entries],
                f"{side}_values": [[values[f] for f in sorted(values)] for _, values in entries],
                f"{side}_fallback": row.get(f"{side}_fallback", False),
                f"{side}_prompt_tokens": row.get("n_prompt_tokens", 0),
                f"{side}_truncated": False,
                f"{side}_reward": row.get(f"{side}_reward"),
            }
        columns.append(made)
    return schema.table(columns, schema.CODES)


def random_sae(d: int, latents: int, k: int, seed: int = 0) -> TopKSae:
    """An SAE with random weights and biases, its decoder of unit norm."""
    sae = TopKSae(d, latents, k)
    generator = torch.Generator().manual_seed(seed)
    sae.initialise(torch.randn(64, d, generator=generator), seed)
    with torch.no_grad():
        sae.W_enc += 0.1 * torch.randn(d, latents, generator=generator)
        sae.b_enc += 0.1 * torch.randn(latents, generator=generator)
    return sae


EXCHANGE = (
    "- {{id: e{i}, category: c, kind: {kind}, prompt: 'How {i}?', safe: 'Gladly, {i}. Thanks!', unsafe: 'Go {i}.'}}"
)


# Prompt tokens are those below 10. Feature 3 fires in the prompt only.
HAND = [
    {
        "n_prompt_tokens": 10,
        "chosen": [(5, {3: 9.0}), (12, {0: 1.0, 1: 2.0}), (20, {0: 3.0})],
        "rejected": [(5, {3: 9.0}), (12, {1: 4.0})],
    },
    {
        "n_prompt_tokens": 10,
        "chosen": [(15, {2: 2.0})],
        "chosen_fallback": True,
        "rejected": [(12, {}), (18, {0: 1.0})],
    },
]
