"""RewardBench 1 and 2 and RM-Bench: their rows as pairs, and their arithmetic on figures worked out by hand."""

import json

import numpy as np
import pyarrow as pa
import pytest
from support.messages import short

from safer_ray import schema
from safer_ray.config.sections import SourceConfig
from safer_ray.data.benchmarks import (
    REWARDBENCH_COUNTS,
    REWARDBENCH_SECTIONS,
    TIES,
    benchmark_scores,
)
from safer_ray.data.sources import NormalisePairs, plan_sources, read_raw
from safer_ray.formats.benchmarks import rewardbench2, rm_bench
from safer_ray.formats.declaration import Refused
from safer_ray.formats.registry import expanded
from safer_ray.pipeline.inspection import inspect


def rewards(rows):
    """A REWARDS table of (pair_id, section, chosen, rejected)."""
    made = [
        {"pair_id": i, "section": s, "reward_chosen": c, "reward_rejected": r, "reward_margin": c - r}
        for i, s, c, r in rows
    ]
    return pa.Table.from_pylist(made, schema=schema.REWARDS)


def read(path, format="auto"):
    """The pairs of a file and the reasons of refused rows."""
    source = SourceConfig(path=str(path), format=format)
    tables = [NormalisePairs([source], 10_000)(read_raw(f, source)) for f in plan_sources([source])]
    rows = [short(row) for row in pa.concat_tables(tables).to_pylist()]
    return [row for row in rows if not row["refused"]], [row["refused"] for row in rows if row["refused"]]


def write(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# RewardBench 1


def whole_set(share):
    """A made file of all 23 subsets with 20 pairs each, and rewards of which `share[subset]` are right."""
    rows = []
    for subset in REWARDBENCH_COUNTS:
        for i in range(20):
            right = i < 20 * share[subset]
            rows.append((f"rewardbench/{subset}/{i}", f"rewardbench/{subset}", 1.0, 0.0 if right else 2.0))
    return rewards(rows)


def test_the_sections_hold_every_subset_once():
    assert sorted(name for names in REWARDBENCH_SECTIONS.values() for name in names) == sorted(REWARDBENCH_COUNTS)
    assert len(REWARDBENCH_COUNTS) == 23
    assert sum(REWARDBENCH_COUNTS.values()) - 984 + 447 == 2985  # pairs of the filtered set


def test_sections_weight_their_subsets_by_the_published_counts():
    share = dict.fromkeys(REWARDBENCH_COUNTS, 1.0) | {
        "math-prm": 0.5,
        "mt-bench-hard": 0.0,
        "xstest-should-respond": 0.2,
    }
    found = benchmark_scores(whole_set(share))["rewardbench"]
    assert found.sections["Chat"] == 1
    assert found.sections["Chat Hard"] == pytest.approx(1 - 37 / 456)
    assert found.sections["Safety"] == pytest.approx(1 - 0.8 * 250 / 740)
    assert found.sections["Reasoning"] == pytest.approx(0.75)  # math counts as much as all of code
    assert found.overall == pytest.approx(np.mean([1, 1 - 37 / 456, 1 - 200 / 740, 0.75]))
    assert found.subsets["math-prm"] == 0.5


def test_a_tie_is_wrong():
    found = benchmark_scores(rewards([("rewardbench/hep-go/0", "rewardbench/hep-go", 1.0, 1.0)]))["rewardbench"]
    assert found.subsets == {"hep-go": 0.0}


def test_a_part_of_the_set_has_no_overall_score():
    found = benchmark_scores(rewards([("rewardbench/hep-go/0", "rewardbench/hep-go", 2.0, 1.0)]))["rewardbench"]
    assert found.overall is None
    assert found.sections == {"Reasoning": 1.0}


def test_a_file_of_rewardbench_is_read_by_subset(tmp_path):
    rows = [
        {
            "id": i,
            "prompt": "Hi",
            "chosen": f"a{i}",
            "chosen_model": "x",
            "rejected": "b",
            "rejected_model": "y",
            "subset": s,
        }
        for i, s in enumerate([*REWARDBENCH_COUNTS, "hep-go"])
    ]
    path = write(tmp_path, rows)
    assert inspect(str(path)).format == "rewardbench"
    pairs, refused = read(path)
    assert not refused
    assert {pair["section"] for pair in pairs} == {f"rewardbench/{subset}" for subset in REWARDBENCH_COUNTS}
    assert len({pair["pair_id"] for pair in pairs}) == 24


def test_other_pairs_are_no_benchmark():
    assert benchmark_scores(rewards([("a", "safety", 1.0, 0.0), ("b", None, 1.0, 0.0)])) == {}


# RewardBench 2


def test_rows_of_several_responses_are_cut_into_pairs(tmp_path):
    row = {"id": "7", "prompt": "Hi", "chosen": ["good"], "rejected": ["bad", "worse", "worst"], "subset": "Focus"}
    assert inspect(str(write(tmp_path, [row]))).format == "rewardbench2"
    path = write(tmp_path, [row, row | {"id": "8", "rejected": "bad"}, row | {"id": "9", "subset": None}])
    pairs, refused = read(path, "rewardbench2")
    assert [pair["pair_id"] for pair in pairs] == [f"rewardbench2/Focus/7/0-{j}" for j in range(3)]
    assert [pair["rejected"][0]["content"] for pair in pairs] == ["bad", "worse", "worst"]
    assert refused == ["wrong type: rejected is no list of several responses", "missing column: subset"]


def best_of(values):
    """Pairs of one correct response (reward 1) and the others' rewards."""
    return [
        (f"rewardbench2/Math/{n}/0-{j}", "rewardbench2/Math", 1.0, other)
        for n, others in enumerate(values)
        for j, other in enumerate(others)
    ]


def test_the_correct_response_must_beat_all_others():
    found = benchmark_scores(rewards(best_of([[0, 0, 0], [0, 0, 2], [0, 1, 0], [-1, 0.5, 0.9]])))["rewardbench2"]
    assert found.sections == {"Math": 0.5}
    assert found.overall is None


def published_ties(samples):
    """RewardBench 2's own arithmetic, as its repository has it, on {(kind, number): (correct, incorrect)}."""
    stats = {
        key: (min(c) > max(i), max(c) - min(c) if len(c) > 1 else None, min(c) - max(i))
        for key, (c, i) in samples.items()
    }
    ref = {n: s for (kind, n), s in stats.items() if kind == "ref"}
    tied = {n: s for (kind, n), s in stats.items() if kind == "tied"}
    both = sorted(set(ref) & set(tied))
    spread, gap, base = (np.array(v) for v in zip(*((tied[n][1], tied[n][2], ref[n][2]) for n in both), strict=True))
    margin = np.nan_to_num(np.tanh(np.minimum(base, gap) / spread - 1), nan=0.0)
    return (
        0.3 * np.mean([s[0] for s in tied.values()])
        + 0.3 * np.mean([s[0] for s in ref.values()])
        + 0.2 * np.mean(gap > spread)
        + 0.2 * np.mean(np.minimum(base, gap) > spread)
        + 0.01 * np.mean(margin)
    )


def test_ties_are_scored_as_published():
    rng = np.random.default_rng(0)
    samples = {}
    for n in range(8):
        samples["ref", n] = (list(rng.normal(1, 1, 1)), list(rng.normal(0, 1, 3)))
        samples["tied", n] = (list(rng.normal(1.5, 0.3, 4)), list(rng.normal(0, 1, 2)))
    rows = []
    for (kind, n), (correct, incorrect) in samples.items():
        row = {"id": f"{kind}:{n}", "prompt": "Hi", "chosen": correct, "rejected": incorrect, "subset": TIES}
        rows += [(p["id"], p["section"], p["chosen"], p["rejected"]) for p in rewardbench2(row, {})]
    found = benchmark_scores(rewards(rows))["rewardbench2"]
    assert found.subsets[TIES] == pytest.approx(published_ties(samples), abs=1e-6)


# RM-Bench


def test_the_matrix_of_styles_is_cut_into_easy_normal_and_hard():
    """Chosen responses in rising style have 1, 2, 3, rejected ones 1.5, 2.5, 2.9: style decides."""
    row = {"id": 0, "prompt": "Hi", "chosen": [1.0, 2.0, 3.0], "rejected": [1.5, 2.5, 2.9], "domain": "chat"}
    rows = [(p["id"], p["section"], p["chosen"], p["rejected"]) for p in rm_bench(row, {})]
    assert len(rows) == 9
    found = benchmark_scores(rewards(rows))["rm_bench"]
    assert found.subsets == {"chat/easy": 1.0, "chat/normal": pytest.approx(1 / 3), "chat/hard": 0.0}
    assert found.sections == {"Chat": pytest.approx((1 + 1 / 3) / 3)}


def test_safety_is_the_mean_of_its_halves():
    rows = []
    for domain, chosen in (
        ("safety-refuse", 1.0),
        ("safety-response", -1.0),
        ("chat", 1.0),
        ("code", 1.0),
        ("math", 1.0),
    ):
        row = {"id": 0, "prompt": "Hi", "chosen": [chosen] * 3, "rejected": [0.0] * 3, "domain": domain}
        rows += [(p["id"], p["section"], p["chosen"], p["rejected"]) for p in rm_bench(row, {})]
    found = benchmark_scores(rewards(rows))["rm_bench"]
    assert found.sections == {"Chat": 1.0, "Code": 1.0, "Math": 1.0, "Safety": 0.5}
    assert found.overall == pytest.approx(3.5 / 4)


def test_two_styles_are_refused():
    with pytest.raises(Refused, match="chosen is no list of 3 responses"):
        rm_bench({"id": 0, "domain": "chat", "chosen": ["a", "b"], "rejected": ["c", "d", "e"]}, {})


# HHH and LLMBar


@pytest.mark.parametrize("choices", [[], ["a"], ["a", "b", "c"], None, "ab"])
def test_an_hhh_row_without_two_choices_is_refused(choices):
    row = {"input": "q", "targets": {"choices": choices, "labels": [1, 0]}}
    with pytest.raises(Refused, match="targets is no two choices"):
        expanded(row, "hhh", {})


def test_hhh_and_llmbar_are_read_by_their_own_columns(tmp_path):
    rows = [
        {"input": "Hi", "targets": {"choices": ["good", "bad"], "labels": [1, 0]}},
        {"input": "Hi", "targets": {"choices": ["bad", "good"], "labels": [0, 1]}},
        {"input": "Hi", "targets": {"choices": ["bad", "good"], "labels": [1, 1]}},
    ]
    path = write(tmp_path, rows)
    assert inspect(str(path)).format == "hhh"
    pairs, refused = read(path)
    assert [pair["chosen"][0]["content"] for pair in pairs] == ["good", "good"]
    assert refused == ["wrong type: targets has no labels 1 and 0"]
    rows = [{"input": "Hi", "output_1": "one", "output_2": "two", "label": n, "why": "x"} for n in (1, 2, 3)]
    path = write(tmp_path, rows)
    assert inspect(str(path)).format == "llmbar"
    pairs, refused = read(path)
    assert [(p["chosen"][0]["content"], p["rejected"][0]["content"]) for p in pairs] == [("one", "two"), ("two", "one")]
    assert [json.loads(pair["extra"]) for pair in pairs] == [{"why": "x"}] * 2
    assert refused == ["unknown label: label is 3, wanted 1 or 2 for the better one"]
