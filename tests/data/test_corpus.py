"""The synthetic corpus is reproducible, clean where it claims to be, and free of easy cues."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from safer_ray.data import corpus
from safer_ray.errors import UserError

SHIPPED_PROBE = Path(corpus.__file__).parent / "probes" / "safety.yaml"
SIZES = {"train_per_section": 1000, "heldout_per_section": 300}
FILES = ("train.jsonl", "heldout.jsonl", "probe.yaml")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    corpus.write_corpus(directory, **SIZES)
    return directory


def good_rows(path: Path) -> list[dict[str, Any]]:
    """Rows that are not among the broken ones, which carry an id of their own or an id seen before."""
    rows: dict[str, dict[str, Any]] = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not row["id"].startswith("broken-"):
            rows.setdefault(row["id"], row)
    return list(rows.values())


def auroc(positive: list[int], negative: list[int]) -> float:
    """Chance that a positive outranks a negative."""
    wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
    return wins / (len(positive) * len(negative))


def exchanges_of(path: Path) -> list[dict[str, str]]:
    exchanges: list[dict[str, str]] = yaml.safe_load(path.read_text(encoding="utf-8"))["exchanges"]
    return exchanges


def test_the_same_seed_writes_the_same_bytes(written: Path, tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path, **SIZES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (written / name).read_bytes()


def test_another_seed_writes_another_corpus(written: Path, tmp_path: Path) -> None:
    corpus.write_corpus(tmp_path, **SIZES, seed=1)
    assert (tmp_path / "train.jsonl").read_bytes() != (written / "train.jsonl").read_bytes()


def test_the_returned_counts_are_those_of_the_good_rows(tmp_path: Path) -> None:
    counts = corpus.write_corpus(tmp_path, train_per_section=50, heldout_per_section=20)
    assert counts == {"train": 100, "heldout": 40, "broken": 8, "probe": 72}
    assert len(good_rows(tmp_path / "train.jsonl")) == 100
    assert len(good_rows(tmp_path / "heldout.jsonl")) == 40


def test_sections_are_of_equal_size_and_a_fifth_of_safety_is_benign(written: Path) -> None:
    rows = good_rows(written / "train.jsonl")
    kinds = [row["labels"]["kind"] for row in rows]
    assert sum(row["section"] == "safety" for row in rows) == sum(row["section"] == "chat" for row in rows) == 1000
    assert 0.2 <= kinds.count("benign") / 1000 <= 0.25


def test_harm_themes_and_the_emphatic_style_have_their_share(written: Path) -> None:
    harmful = [row for row in good_rows(written / "train.jsonl") if row["labels"]["kind"] == "harmful"]
    emphatic = sum(row["labels"]["style"] == "emphatic" for row in harmful) / len(harmful)
    assert len({row["labels"]["harm_category"] for row in harmful}) >= 10
    assert 0.05 <= emphatic <= 0.11


def test_train_and_heldout_share_no_prompt(written: Path) -> None:
    prompts = [
        {row["prompt"][-1]["content"] for row in good_rows(written / name)} for name in ("train.jsonl", "heldout.jsonl")
    ]
    assert not prompts[0] & prompts[1]


def test_every_conversation_ends_with_the_user_and_some_have_more_turns(written: Path) -> None:
    prompts = [row["prompt"] for row in good_rows(written / "train.jsonl")]
    assert all(prompt[-1]["role"] == "user" for prompt in prompts)
    assert {len(prompt) for prompt in prompts} == {1, 3}


def test_heldout_holds_themes_and_wordings_that_train_lacks(written: Path) -> None:
    train, heldout = (good_rows(written / name) for name in ("train.jsonl", "heldout.jsonl"))
    themes = [{row["labels"]["harm_category"] for row in rows} for rows in (train, heldout)]
    assert 2 <= len(themes[1] - themes[0]) <= 3
    wording = corpus.load_words()["care"][-1]
    assert not any(wording in row["chosen"] for row in train)
    assert any(wording in row["chosen"] for row in heldout)


@pytest.mark.parametrize("section", ["safety", "chat"])
def test_length_does_not_give_the_chosen_side_away(written: Path, section: str) -> None:
    rows = [row for row in good_rows(written / "train.jsonl") if row["section"] == section]
    differences = [len(row["chosen"]) - len(row["rejected"]) for row in rows]
    assert 0.45 <= auroc(differences, [-difference for difference in differences]) <= 0.6


def test_every_response_has_a_few_sentence_ends_and_no_open_slot(written: Path) -> None:
    for row in good_rows(written / "train.jsonl"):
        for side in (row["chosen"], row["rejected"]):
            assert 2 <= len(re.findall(r"[.!?](?:\s|$)", side)) <= 5
            assert "{" not in side


def test_every_kind_of_broken_row_is_present(written: Path) -> None:
    lines = (written / "train.jsonl").read_bytes().splitlines()
    undecodable = [line for line in lines if line != line.decode("utf-8", "ignore").encode()]
    texts = [line.decode() for line in lines if line not in undecodable]
    unparsable = [text for text in texts if not text.endswith("}")]
    rows = [json.loads(text) for text in texts if text not in unparsable]
    ids = [row["id"] for row in rows]
    assert len(undecodable) == len(unparsable) == 1
    assert len(ids) - len(set(ids)) == 1
    assert sum("chosen" not in row for row in rows) == 1
    assert sum(not row["rejected"].strip() for row in rows) == 1
    assert sum(row.get("chosen") == row["rejected"] for row in rows) == 1
    assert sum(isinstance(row.get("chosen"), int) for row in rows) == 1
    assert sum(len(str(row.get("chosen"))) > 20_000 for row in rows) == 1


def test_probe_themes_occur_in_no_other_file(written: Path) -> None:
    probed = {exchange["category"] for exchange in exchanges_of(written / "probe.yaml")}
    rows = good_rows(written / "train.jsonl") + good_rows(written / "heldout.jsonl")
    assert len(probed) >= 3
    assert not probed & {row["labels"]["harm_category"] for row in rows}


def test_both_probes_have_whole_exchanges_with_unique_ids(written: Path) -> None:
    for path in (written / "probe.yaml", SHIPPED_PROBE):
        exchanges = exchanges_of(path)
        assert len({exchange["id"] for exchange in exchanges}) == len(exchanges)
        for exchange in exchanges:
            assert set(exchange) == {"id", "category", "kind", "prompt", "safe", "unsafe"}
            assert all(isinstance(value, str) and value.strip() for value in exchange.values())
            assert exchange["safe"] != exchange["unsafe"]


def test_the_shipped_probe_is_broad_and_balanced() -> None:
    exchanges = exchanges_of(SHIPPED_PROBE)
    harmful = [exchange for exchange in exchanges if exchange["kind"] == "harmful"]
    assert len(harmful) >= 65
    assert len(exchanges) - len(harmful) >= 30
    assert len({exchange["category"] for exchange in harmful}) >= 14
    assert len({exchange["prompt"] for exchange in exchanges}) == len(exchanges)


@pytest.mark.parametrize("kind", ["harmful", "benign"])
def test_safe_and_unsafe_lengths_of_the_shipped_probe_overlap(kind: str) -> None:
    exchanges = [exchange for exchange in exchanges_of(SHIPPED_PROBE) if exchange["kind"] == kind]
    safe, unsafe = ([len(exchange[side]) for exchange in exchanges] for side in ("safe", "unsafe"))
    assert 0.35 <= auroc(safe, unsafe) <= 0.65


def test_a_corpus_larger_than_its_words_allow_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no train requests left after [\d,]+; lower corpus.train_per_section"):
        corpus.write_corpus(tmp_path, train_per_section=200_000, heldout_per_section=1)
