"""Repeated texts and contradicting labels are found, whatever the pairs are cut into."""

import random

import numpy as np
import pyarrow as pa
import pytest

from safer_ray import schema
from safer_ray.config.sections import DuplicatesConfig
from safer_ray.config.where import where_mask
from safer_ray.data import near_duplicates
from safer_ray.data.conflicts import conflicts, cycles, numbered
from safer_ray.data.duplicates import counted, find
from safer_ray.data.near_duplicates import bands_for, joined
from safer_ray.data.signatures import SIGNATURES, SignTexts, signatures
from safer_ray.pipeline import duplicate_stage
from safer_ray.pipeline.duplicate_stage import duplicates
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage.artifacts import Artifact, Place, part_name, read_parts
from safer_ray.storage.files import write_parquet

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnoprstuvw", k=6)) for i in range(4000)]


def text(seed, words=60):
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def nearly(said, seed=0):
    words = said.split()
    words[random.Random(seed).randrange(len(words))] = "another"
    return " ".join(words)


def pair_table(rows):
    """Pairs (prompt, chosen, rejected) named p0, p1, …"""
    return pa.Table.from_pylist(
        [
            {
                "pair_id": f"p{i}",
                "row_key": f"k#{i}",
                "prompt": [{"role": "user", "content": prompt}] if prompt else [],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "labels": [("kind", "made")],
            }
            for i, (prompt, chosen, rejected) in enumerate(rows)
        ],
        schema=schema.PAIRS,
    )


def write(table, folder, rows=1000):
    for number, start in enumerate(range(0, len(table), rows)):
        write_parquet(table.slice(start, rows), folder / part_name(number))
    return Artifact(folder, f"pairs-{rows}")


def found(table, folder, rows=1000, threshold=0.8):
    ctx = StageContext(Place(folder / "runs"), LocalRunner())
    return duplicates(ctx, DuplicatesConfig(threshold=threshold), write(table, folder / f"pairs-{rows}", rows))


def rows_of_kind(made, kind):
    rows = read_parts(made.path / "found").to_pylist()
    return {(row["pair_id"], row["side"], row["other"]) for row in rows if row["kind"] == kind}


PLANTED = [
    (text("q0"), text("a0"), text("b0")),
    (text("q1"), text("a1"), text("b1")),
    (f"{text('q0')}  ", f"\n{text('a0')}", text("b0")),  # p0 but for whitespace
    (nearly(text("q1")), nearly(text("a1")), nearly(text("b1"))),  # nearly p1
    (text("q4"), text("a4"), nearly(text("a4"))),  # both sides nearly the same
    (text("q5"), text("a0"), text("b5")),  # a response of p0
    (text("q0"), text("b0"), text("a0")),  # p0 labelled otherwise
    *((text("q7"), text(f"{a}7"), text(f"{b}7")) for a, b in ("AB", "BC", "CA", "AD")),
]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return found(pair_table(PLANTED), tmp_path_factory.mktemp("planted"), rows=4)


def test_exact_duplicates_are_listed(planted):
    assert rows_of_kind(planted, "pair_exact") == {("p0", None, "p2"), ("p2", None, "p0")}
    prompts = {(f"p{i}", "prompt", f"p{j}") for i, j in [(0, 2), (2, 0), (6, 0), (7, 8), (8, 7), (9, 7), (10, 7)]}
    assert rows_of_kind(planted, "prompt_exact") == prompts
    responses = rows_of_kind(planted, "response_exact")
    assert {
        ("p0", "chosen", "p2"),
        ("p5", "chosen", "p0"),
        ("p6", "rejected", "p0"),
        ("p8", "chosen", "p7"),
    } <= responses


def test_near_duplicates_are_listed(planted):
    assert rows_of_kind(planted, "pair_near") == {("p1", None, "p3"), ("p3", None, "p1")}
    assert rows_of_kind(planted, "prompt_near") == {("p1", "prompt", "p3"), ("p3", "prompt", "p1")}
    near = rows_of_kind(planted, "response_near")
    assert {("p1", "chosen", "p3"), ("p3", "rejected", "p1")} <= near
    assert {("p4", "chosen", "p4"), ("p4", "rejected", "p4")} <= near  # of one pair


def test_pairs_labelled_both_ways_are_listed(planted):
    assert rows_of_kind(planted, "conflict") == {("p0", None, "p6"), ("p2", None, "p6"), ("p6", None, "p0")}


def test_responses_that_beat_each_other_in_a_circle_are_listed(planted):
    assert rows_of_kind(planted, "cycle") == {("p7", None, "p8"), ("p8", None, "p7"), ("p9", None, "p7")}


def test_labels_say_what_filters_want(planted):
    pairs = read_parts(planted.path / "pairs")
    assert pairs.drop_columns(["labels"]).equals(pair_table(PLANTED).drop_columns(["labels"]))
    labels = [dict(row) for row in pairs["labels"].to_pylist()]
    assert all(row["kind"] == "made" for row in labels)
    assert {i: row["repeats_pair"] for i, row in enumerate(labels) if "repeats_pair" in row} == {2: "exact", 3: "near"}
    assert {i for i, row in enumerate(labels) if "label_conflict" in row} == {0, 2, 6}
    assert {i for i, row in enumerate(labels) if "label_cycle" in row} == {7, 8, 9}
    assert labels[4] == {"kind": "made"}  # its two sides are no repetition of another pair
    assert labels[5]["repeats_response"] == "exact"
    kept = where_mask(pairs, "labels.label_conflict != yes and labels.repeats_pair != near")
    assert np.flatnonzero(~kept).tolist() == [0, 2, 3, 6]


def test_the_summary_counts_clusters_and_pairs(planted):
    told = planted.metrics["found"]
    assert told["conflict"] == {"clusters": 1, "pairs": 3}
    assert told["cycle"] == {"clusters": 1, "pairs": 3}
    assert told["pair_near"] == {"clusters": 1, "pairs": 2}
    assert planted.manifest["rows"]["pairs"] == len(PLANTED)
    assert not (planted.path / "state").exists()


def corpus(count, seed):
    """Pairs of which every tenth says nearly what the one before says."""
    rows = []
    for i in range(count):
        if i % 10 == 9:
            rows.append(tuple(nearly(part, f"{seed}{i}") for part in rows[-1]))
        else:
            rows.append(tuple(text(f"{seed}-{i}-{part}", 30 + i % 40) for part in "qab"))
    return pair_table(rows)


def test_planted_near_duplicates_are_found_and_nothing_else(tmp_path):
    table = corpus(1000, 1)
    made = found(table, tmp_path)
    near = rows_of_kind(made, "pair_near")
    planted = {(f"p{i}", None, f"p{i - 1}") for i in range(9, 1000, 10)}
    assert len(planted & near) >= 0.97 * len(planted)
    assert near <= planted | {(other, side, first) for first, side, other in planted}
    assert made.metrics["found"]["prompt_exact"]["pairs"] == 0


@pytest.mark.parametrize("script", ["\u4e00", "\u0e01", "\u3042"])
def test_scripts_without_spaces_are_compared_by_characters(tmp_path, script):
    def said(seed):
        return "".join(chr(ord(script) + random.Random(f"{seed}{i}").randrange(40)) for i in range(80))

    rows = [(said(f"{i}q"), said(f"{i}a"), said(f"{i}b")) for i in range(30)]
    rows.append(tuple(each[:40] + script + each[41:] for each in rows[3]))
    made = found(pair_table(rows), tmp_path, threshold=0.7)
    assert rows_of_kind(made, "pair_near") == {("p3", None, "p30"), ("p30", None, "p3")}


@pytest.mark.parametrize("sizes", [{"PARTITION_ROWS": 500, "BUFFERED_ROWS": 1500, "PENDING": 30, "AT_ONCE": 7}])
def test_the_result_is_the_same_for_any_cut(tmp_path, monkeypatch, sizes):
    table = corpus(300, 2)
    whole = found(table, tmp_path / "whole")
    for name, value in sizes.items():
        monkeypatch.setattr(near_duplicates, name, value)
    cut = found(table, tmp_path / "cut", rows=17)
    for folder in ("found", "pairs"):
        one, other = (sorted(read_parts(made.path / folder).to_pylist(), key=repr) for made in (whole, cut))
        assert one == other
    assert whole.metrics == cut.metrics


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_run_that_was_cut_off_signs_no_text_again(tmp_path, monkeypatch):
    signed = []
    sign = SignTexts.__call__
    monkeypatch.setattr(SignTexts, "__call__", lambda self, rows: signed.append(len(rows)) or sign(self, rows))
    with monkeypatch.context() as patch:
        patch.setattr(duplicate_stage, "find", interrupt)
        with pytest.raises(KeyboardInterrupt):
            found(corpus(100, 3), tmp_path, rows=20)
    assert sum(signed) == 100
    again = found(corpus(100, 3), tmp_path, rows=20)
    assert sum(signed) == 100
    assert again.metrics == found(corpus(100, 3), tmp_path / "whole", rows=20).metrics


def test_many_copies_in_a_bucket_are_one_cluster(tmp_path):
    said = text("common", 80)
    rows = [(text(f"q{i}"), nearly(said, i), text(f"b{i}")) for i in range(60)]
    made = found(pair_table(rows), tmp_path)
    assert made.metrics["found"]["response_near"] == {"clusters": 1, "pairs": 60}


def test_pairs_without_a_prompt_repeat_no_prompt(tmp_path):
    made = found(
        pair_table([("", text("a"), text("b")), ("", text("c"), text("d")), ("", text("b"), text("a"))]), tmp_path
    )
    assert made.metrics["found"]["prompt_exact"]["pairs"] == 0
    assert rows_of_kind(made, "conflict") == {("p0", None, "p2"), ("p2", None, "p0")}


def test_pairs_from_elsewhere_need_no_labels(tmp_path):
    made = found(pair_table(PLANTED).select(["pair_id", "prompt", "chosen", "rejected"]), tmp_path)
    assert dict(read_parts(made.path / "pairs")["labels"].to_pylist()[6])["label_conflict"] == "yes"


def test_no_pairs_have_no_duplicates(tmp_path):
    write_parquet(SIGNATURES.empty_table(), tmp_path / "signatures" / part_name(0))
    nothing = find([tmp_path / "signatures" / part_name(0)], 0.8, tmp_path / "bands")
    assert nothing.pairs == 0
    assert all(not counts["pairs"] for counts in counted(nothing).values())


def test_short_and_empty_texts_have_signatures():
    signed = signatures(["", "a", "ab", "\u4f60\u597d", "abcdef", "abcdef"])
    assert signed.shape == (6, 120)
    assert (signed[4] == signed[5]).all()
    assert (signed[1] != signed[2]).mean() > 0.9
    assert signatures([]).shape == (0, 120)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_bands_find_what_lies_at_the_threshold(threshold):
    count, entries = bands_for(threshold)
    assert count * entries == 120
    assert 1 - (1 - threshold**entries) ** count >= 0.99


def test_signatures_estimate_the_share_of_common_shingles():
    said = text("long", 400)
    words = said.split()
    for share in (0.02, 0.1):
        other = " ".join("zzzzzz" if i < share * len(words) else word for i, word in enumerate(words))
        sets = [{each[i : i + 5] for i in range(len(each) - 4)} for each in (said, other)]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        one, two = signatures([said, other])
        assert (one == two).mean() == pytest.approx(jaccard, abs=0.13)


def test_clusters_are_joined_by_their_least_members():
    clusters = joined(np.arange(6), np.array([5, 3]), np.array([3, 4]))
    assert clusters.tolist() == [0, 1, 2, 3, 3, 3]
    assert joined(clusters, np.array([1]), np.array([5])).tolist() == [0, 1, 2, 1, 1, 1]
    assert joined(clusters, np.array([], dtype=int), np.array([], dtype=int)) is clusters


def test_rows_are_numbered_by_the_first_of_their_kind():
    assert numbered(np.array([3, 1, 3, 1]), np.array([0, 0, 0, 1])).tolist() == [0, 1, 0, 3]
    assert numbered(np.array([], dtype=int)).tolist() == []


def test_conflicts_and_circles_are_of_one_prompt():
    prompt = np.array([0, 1, 0, 0, 0])
    chosen, rejected = np.array([1, 2, 2, 3, 3]), np.array([2, 1, 3, 1, 4])
    assert conflicts(prompt, chosen, rejected).tolist() == [-1] * 5  # 1 > 2 and 2 > 1 under two prompts
    assert cycles(prompt, chosen, rejected).tolist() == [0, -1, 0, 0, -1]
    both = np.array([0, 0]), np.array([1, 2]), np.array([2, 1])
    assert conflicts(*both).tolist() == [0, 0]
    assert cycles(*both).tolist() == [-1, -1]


def test_labels_of_the_same_name_are_replaced_and_told(tmp_path, caplog):
    first = found(pair_table(PLANTED), tmp_path / "first")
    again = found(read_parts(first.path / "pairs"), tmp_path / "again")
    assert "9 pairs had labels of the names that are written here; theirs are replaced" in caplog.text
    one, other = (sorted(read_parts(made.path / "pairs").to_pylist(), key=repr) for made in (first, again))
    assert one == other


def test_the_command_prints_what_it_found(safer, tmp_path):
    write(pair_table(PLANTED), tmp_path / "pairs")
    code, told, err = safer("duplicates", "--pairs", tmp_path / "pairs", "--out", tmp_path / "out")
    assert code == 0, err
    assert "conflict" in told
    assert "1 clusters" in told
    code, _, err = safer("duplicates", "--pairs", tmp_path / "pairs", "--out", tmp_path / "x", "--threshold", 0.2)
    assert code == 2
    assert "0.5" in err
