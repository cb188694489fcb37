"""General text: every token of it becomes a vector."""

import gzip
import json

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from safer_ray.config.sae import WarmStartConfig
from safer_ray.config.sections import ActivationsConfig, SaeConfig
from safer_ray.errors import UserError
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.forward import forward
from safer_ray.reward.plain_text import TokeniseTexts, read_texts, text_fragments
from safer_ray.reward.tokens import read_tokens
from safer_ray.sae.model import standardise
from safer_ray.storage.artifacts import Artifact, Place, read_parts

LINES = ["Bread is baked.", "", "  The bicycle has two wheels, and a bell. ", "Why?", "x " * 300]


def texts_of(path, rows=2, limit=None):
    tables = [read_texts(fragment) for fragment in text_fragments(path, rows, limit)]
    return [row for table in tables for row in zip(*table.to_pydict().values(), strict=True)]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return path


def test_texts_are_lines_without_blank_ones_under_their_numbers(text):
    assert texts_of(text) == [(f"text.txt#{i}", LINES[i].strip()) for i in (0, 2, 3, 4)]
    assert texts_of(text, limit=3) == texts_of(text)[:2]


def test_compressed_lines_and_json_rows_are_read_too(text, tmp_path):
    packed, rows = tmp_path / "text.txt.gz", tmp_path / "text.jsonl"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES), encoding="utf-8")
    for path in (packed, rows):
        assert [said for _, said in texts_of(path)] == [said for _, said in texts_of(text)]


def test_a_row_without_text_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"body": "b"}\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"rows.jsonl: row 1 has no `text`; write it as a JSON object"):
        texts_of(path)


def test_text_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no text in .*gone.txt; pass a file with a text a line"):
        text_fragments(tmp_path / "gone.txt", 10)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_every_token_comes_once_however_texts_are_paired(reward, reward_dir, text, kept):
    (fragment,) = text_fragments(text, 100)
    rows = read_texts(fragment).slice(1, kept)
    tokens = read_tokens(TokeniseTexts(reward_dir)(rows))
    ids = np.concatenate([side.ids for pair in tokens for side in (pair.chosen, pair.rejected)])
    wanted = np.concatenate(
        [ids for own in reward.pairs.sequences(rows["text"].to_pylist()) for ids in own],
    )
    assert sorted(ids) == sorted(wanted)
    assert max(len(side.ids) for pair in tokens for side in (pair.chosen, pair.rejected)) <= reward.pairs.limit


@pytest.fixture
def ctx(tmp_path):
    return StageContext(Place(tmp_path / "runs"), LocalRunner(), fragment_rows=2)


def foreign(path, name):
    return Artifact(path, name)


def test_the_vectors_are_those_of_each_text_read_alone(ctx, text, reward, reward_dir):
    made = model_stages.text_activations(ctx, WarmStartConfig(text=str(text)), 2, foreign(reward_dir, "reward"))
    rows = read_parts(made.path)
    assert set(rows["side"].to_pylist()) == {"text"}
    assert rows["group"].null_count == len(rows)
    alone = reward.pairs.sequences([LINES[3]])[0][0]
    raw = forward(reward, [alone], layers=(2,), positions=[np.arange(len(alone))], rewards=False).hidden[0]
    wanted = standardise(raw)
    known = rows.filter(pc.equal(rows["token"], len(alone) - 1))
    found = torch.tensor(np.stack(known["x"].to_pylist()).astype(np.float32))
    assert (found - wanted.x[-1]).abs().amax(-1).min() < 2e-3
    whole = model_stages.text_activations(
        ctx, WarmStartConfig(text=str(text), limit=3), 2, foreign(reward_dir, "reward")
    )
    assert whole.name != made.name
    assert len(read_parts(whole.path)) < len(rows)


def test_an_sae_starts_on_text_and_goes_on_with_pairs(ctx, text, reward_dir, pairs_dir):
    text.write_text("".join(f"Line {i} says that {i * i} is a square.\n" for i in range(60)), encoding="utf-8")
    pairs, reward = foreign(pairs_dir, "pairs"), foreign(reward_dir, "reward")
    activations = model_stages.activations(ctx, ActivationsConfig(layer=2), pairs, reward)
    config = SaeConfig(
        latents=64,
        k=4,
        steps=20,
        batch_size=32,
        learning_rate=1e-3,
        validation_percent=20,
        warm_start=WarmStartConfig(text=str(text), steps=30, batch_size=16),
    )
    made = model_stages.sae_in_stages(ctx, config, activations, 2, pairs, reward)
    assert made.manifest["inputs"].keys() == {"activations", "start", "pairs", "reward"}
    first = next(path for path in ctx.place.root.glob("sae-*") if path.name == made.manifest["inputs"]["start"])
    assert made.metrics["steps"] == 20
    assert json.loads((first / "manifest.json").read_text())["metrics"]["steps"] == 30
    assert made.metrics["spliced"].keys() == {"sentence ends", "all tokens"}
    assert 0 < made.metrics["spliced"]["all tokens"]["pairs"] < 48
    alone = model_stages.sae_in_stages(
        ctx, config.model_copy(update={"warm_start": None}), activations, 2, pairs, reward
    )
    assert alone.name != made.name
