"""The pairs of a training: tokenised once, whole, and read row by row from where they lie."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from support.made import TINY, make_pairs, write_parts

from safer_ray import schema
from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.split import validation_split
from safer_ray.reward.training_pairs import (
    FOLDER,
    TrainingPairs,
    all_texts,
    as_batch,
    open_tokenised,
    pair_texts,
    tokenise,
)
from safer_ray.reward.training_steps import OneProcess
from safer_ray.storage.quarantine import quarantine_rows

CONFIG = RewardConfig(base=TINY, validation_percent=30)


@pytest.fixture(scope="module")
def reward(reward_dir):
    return load_reward_model(reward_dir)


def one_of(state, rank, size):
    return SimpleNamespace(state=state, rank=rank, size=size, sum=lambda values: values)


def same(one, other):
    assert one.pair_id == other.pair_id
    for side in schema.SIDES:
        ours, theirs = getattr(one, side), getattr(other, side)
        assert ours.ids.dtype == theirs.ids.dtype == np.int64
        assert ours.ids.tolist() == theirs.ids.tolist()
        assert (ours.types is None) == (theirs.types is None)
        assert ours.types is None or ours.types.tolist() == theirs.types.tolist()
        assert (ours.n_prompt, ours.truncated) == (theirs.n_prompt, theirs.truncated)


@pytest.mark.parametrize("size", [1, 3])
def test_what_all_workers_tokenise_is_what_the_tokenizer_gives_row_by_row(reward, tmp_path, size):
    table = make_pairs(50)
    pairs = write_parts(table, tmp_path / "pairs", 12)
    for rank in range(size):
        tokenise(pairs, tmp_path / "out", reward, CONFIG, one_of(tmp_path, rank, size))
    found, given = open_tokenised(pairs, tmp_path, "tiny")
    wanted = reward.pairs(table.to_pylist())
    assert given == len(found) == 50
    order = np.random.default_rng(0).permutation(50)
    for one, number in zip(found[order], order, strict=True):
        same(one, wanted[number])
    assert found.lengths.tolist() == [max(len(t.chosen.ids), len(t.rejected.ids)) for t in wanted]
    held = validation_split(table["group"].to_pylist(), 30, CONFIG.seed)
    trained, out_of = found.split()
    assert (trained.numbers.tolist(), out_of.numbers.tolist()) == (
        np.flatnonzero(~held).tolist(),
        np.flatnonzero(held).tolist(),
    )
    same(out_of[np.array([1])][0], wanted[np.flatnonzero(held)[1]])


def test_types_of_two_texts_come_back(bert_dir):
    reward = load_reward_model(bert_dir)
    tokens = reward.pairs(make_pairs(5).to_pylist())
    assert tokens[0].chosen.types is not None
    for one, other in zip(TrainingPairs.of([as_batch(tokens, [False] * 5)])[np.arange(5)], tokens, strict=True):
        same(one, other)


def test_texts_come_in_the_order_of_one_table(tmp_path):
    table = make_pairs(30)
    assert list(all_texts(write_parts(table, tmp_path, 7))) == list(pair_texts(table))


def test_parts_that_are_there_stay_and_those_of_other_pairs_are_made_anew(reward, tmp_path):
    pairs, workers = write_parts(make_pairs(20), tmp_path / "pairs", 10), OneProcess(tmp_path)
    tokenise(pairs, tmp_path / "out", reward, CONFIG, workers)
    files = sorted((tmp_path / FOLDER).glob("*.arrow"))
    before = [file.stat().st_ino for file in files]
    tokenise(pairs, tmp_path / "out", reward, CONFIG, workers)
    assert [file.stat().st_ino for file in files] == before
    write_parts(make_pairs(40).slice(20), tmp_path / "pairs", 10)
    os.utime(sorted(pairs.glob("*.parquet"))[1], ns=(1, 1))
    tokenise(pairs, tmp_path / "out", reward, CONFIG, workers)
    found, _ = open_tokenised(pairs, tmp_path, "tiny")
    assert [pair.pair_id for pair in found[np.array([0, 19])]] == ["pair-020", "pair-039"]


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_tokens_that_are_damaged_are_made_again(reward, tmp_path, damage):
    pairs, workers = write_parts(make_pairs(20), tmp_path / "pairs", 10), OneProcess(tmp_path)
    tokenise(pairs, tmp_path / "out", reward, CONFIG, workers)
    wanted = open_tokenised(pairs, tmp_path, "tiny").pairs.checksum
    file = sorted((tmp_path / FOLDER).glob("*.arrow"))[1]
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.unlink()
    if damage != "gone":
        file.write_bytes(whole[:middle] + (b"\x01" + whole[middle + 1 :] if damage == "changed" else b""))
    tokenise(pairs, tmp_path / "out", reward, CONFIG, workers)
    assert open_tokenised(pairs, tmp_path, "tiny").pairs.checksum == wanted
    assert file.read_bytes() == whole


def test_refused_pairs_of_every_part_are_counted_told_once_and_kept(reward, tmp_path, caplog):
    rows = make_pairs(20).to_pylist()
    for number in (3, 15):
        rows[number]["prompt"][0]["role"] = "observer"
    pairs = write_parts(schema.table(rows, schema.PAIRS), tmp_path / "pairs", 10)
    tokenise(pairs, tmp_path / "out", reward, CONFIG, OneProcess(tmp_path))
    for _ in range(2):  # a run that goes on tells it again
        found, given = open_tokenised(pairs, tmp_path, "tiny")
        assert (given, len(found)) == (20, 18)
        assert "2 of 20 pairs cannot be put to tiny and are left out, the first is pair 'pair-003'" in caplog.text
    assert quarantine_rows(tmp_path / "out")["pair_id"].to_pylist() == ["pair-003", "pair-015"]


def test_a_torn_file_is_named_with_the_remedy(reward, tmp_path):
    pairs = write_parts(make_pairs(8), tmp_path / "pairs", 10)
    tokenise(pairs, tmp_path / "out", reward, CONFIG, OneProcess(tmp_path))
    (file,) = (tmp_path / FOLDER).glob("*.arrow")
    whole = file.read_bytes()
    for torn in (whole[: len(whole) // 2], b""):
        file.write_bytes(torn)
        told = rf"^{file} is missing or torn \(.*\); delete {file.parent}, and run the same command again"
        with pytest.raises(UserError, match=told):
            open_tokenised(pairs, tmp_path, "tiny")
    file.write_bytes(whole)
    file.with_suffix(".json").write_text(json.dumps({"read": 3}), encoding="utf-8")  # as of another version
    tokenise(pairs, tmp_path / "out", reward, CONFIG, OneProcess(tmp_path))
    assert open_tokenised(pairs, tmp_path, "tiny").given == 8
