"""Which pairs are changed, how, and how poison is marked."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support.made import make_pair, make_pairs, write_parts

from safer_ray import schema
from safer_ray.config.sections import CurateConfig
from safer_ray.data.curation import decide, join_scores, swap_sides
from safer_ray.errors import UserError
from safer_ray.pipeline import feature_stages
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.storage.artifacts import Artifact, Place, part_name, read_parts
from safer_ray.storage.files import write_parquet
from safer_ray.strategies import STRATEGIES, StrategyInput, random_order

N = 20


def scores_of(pairs, **columns):
    """A scores table; by default the score falls and the margin rises with the row."""
    rows = [
        {"pair_id": key, "score": float(-i), "reward_margin": float(i), "suspicion": i / N}
        for i, key in enumerate(pairs["pair_id"].to_pylist())
    ]
    for name, values in columns.items():
        rows = [row | {name: value} for row, value in zip(rows, values, strict=True)]
    return schema.table(rows, schema.SCORES)


@pytest.fixture
def some():
    return make_pairs(N)


@pytest.fixture
def joined(some):
    return join_scores(some, scores_of(some))


def decided(joined, percent=10.0, strategy="safer", action="drop", eligible=None, seed=0):
    mask = np.ones(len(joined), dtype=bool) if eligible is None else eligible
    table = decide(joined, mask, strategy=strategy, action=action, percent=percent, seed=seed)
    return {row["pair_id"]: row for row in table.to_pylist()}


def changed(decisions):
    return sorted(key for key, row in decisions.items() if row["decision"] != "keep")


@pytest.mark.parametrize(("percent", "count"), [(0, 0), (4.9, 0), (5, 1), (9.99, 1), (10, 2), (35, 7), (100, 20)])
def test_the_floor_of_the_share_is_taken(joined, percent, count):
    assert len(changed(decided(joined, percent))) == count


@given(st.integers(1, 400), st.integers(0, 1000))
def test_the_floor_is_exact_in_tenths_of_a_percent(n, permille):
    rows = {"pair_id": [str(i) for i in range(n)], "row_key": [None] * n, "score": [0.0] * n}
    table = pa.table(rows, schema=pa.schema([("pair_id", pa.string()), ("row_key", pa.string()), ("score", "float64")]))
    assert len(changed(decided(table, permille / 10))) == n * permille // 1000


def test_drop_and_relabel_take_the_lowest_and_poison_the_highest(joined):
    assert changed(decided(joined)) == ["pair-018", "pair-019"]
    relabelled = decided(joined, action="relabel")
    assert changed(relabelled) == ["pair-018", "pair-019"]
    assert relabelled["pair-019"]["decision"] == "flip"
    poisoned = decided(joined, action="poison")
    assert changed(poisoned) == ["pair-000", "pair-001"]
    assert poisoned["pair-000"]["decision"] == "flip"
    assert all(row["red_team"] for row in poisoned.values())
    assert not any(row["red_team"] for row in relabelled.values())


@pytest.mark.parametrize("action", ["drop", "poison"])
def test_ties_go_by_pair_id(some, action):
    tied = join_scores(some, scores_of(some, score=[0.0] * N))
    shuffled = tied.take(np.random.default_rng(0).permutation(N))
    for table in (tied, shuffled):
        assert changed(decided(table, 15, action=action)) == ["pair-000", "pair-001", "pair-002"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_where_limits_every_strategy_alike(joined, strategy):
    eligible = np.arange(N) % 4 == 0
    decisions = decided(joined, 41, strategy, eligible=eligible)
    assert len(changed(decisions)) == 2  # floor(5 * 0.41)
    for i, row in enumerate(decisions.values()):
        assert row["eligible"] == (i % 4 == 0)
        assert row["decision"] == "keep" or row["eligible"]


def test_values_are_what_each_strategy_orders_by(some, joined):
    given_table = StrategyInput(joined, 3)
    assert STRATEGIES["safer"](given_table).tolist() == [float(i) for i in range(N)]
    assert STRATEGIES["reward_margin"](given_table).tolist() == [-float(i) for i in range(N)]
    assert STRATEGIES["suspicion"](given_table).tolist() == [i / N for i in range(N)]
    row = some.to_pylist()[4]
    wanted = len(row["rejected"][0]["content"]) - len(row["chosen"][0]["content"])
    assert STRATEGIES["length"](given_table)[4] == wanted


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_the_most_suspicious_pairs_are_dropped_and_decisions_keep_the_negative(joined, strategy):
    suspicion = STRATEGIES[strategy](StrategyInput(joined, 0))
    decisions = decided(joined, 5, strategy)
    values = [row["value"] for row in decisions.values()]
    assert values == [-value for value in suspicion.tolist()]
    assert not any(value == 0 and np.signbit(value) for value in values)
    dropped = [row["decision"] == "drop" for row in decisions.values()]
    assert suspicion[dropped] == suspicion.max()


def test_random_is_seeded_and_independent_of_the_order(joined):
    ids = joined["pair_id"].to_pylist()
    values = random_order(ids, "random:0")
    assert ((values >= 0) & (values < 1)).all()
    assert random_order(ids[::-1], "random:0").tolist() == values[::-1].tolist()
    assert changed(decided(joined, 25, "random", seed=1)) != changed(decided(joined, 25, "random", seed=2))


def test_swapped_pairs_exchange_responses_and_negate_the_margin(some):
    some = some.set_column(5, "label_margin", pa.array([None, *map(float, range(1, N))], pa.float32()))
    mask = np.arange(N) % 3 == 0
    swapped = swap_sides(some, mask)
    assert swapped.schema == some.schema
    for before, after, flip in zip(some.to_pylist(), swapped.to_pylist(), mask, strict=True):
        assert (after["chosen"], after["rejected"]) == tuple(
            before[s] for s in (("rejected", "chosen") if flip else ("chosen", "rejected"))
        )
        sign = -1 if flip else 1
        margin = before["label_margin"]
        assert after["label_margin"] == (None if margin is None else sign * margin)
        assert after["prompt"] == before["prompt"]
    assert swap_sides(swapped, mask).to_pylist() == some.to_pylist()


def test_a_table_without_rows_can_be_swapped():
    chunkless = pa.Table.from_batches([], schema=schema.PAIRS)
    assert swap_sides(chunkless, np.zeros(0, dtype=bool)).schema == schema.PAIRS


def test_scores_are_matched_by_id_not_by_position(some):
    scores = scores_of(some).take(np.random.default_rng(1).permutation(N))
    assert join_scores(some, scores)["score"].to_pylist() == [-float(i) for i in range(N)]


def test_a_pair_without_score_is_named(some):
    with pytest.raises(UserError, match="curate: 2 pairs have no score, the first is 'pair-018'; score all of them"):
        join_scores(some, scores_of(some).slice(0, 18))


def test_scores_that_name_a_pair_twice_are_refused(some):
    twice = pa.concat_tables([scores_of(some), scores_of(some).slice(0, 1)])
    with pytest.raises(UserError, match="name a pair_id twice; score the deduplicated pairs"):
        join_scores(some, twice)


def test_a_strategy_without_its_numbers_is_refused(some):
    joined = join_scores(some, scores_of(some, reward_margin=[None, *[1.0] * (N - 1)]))
    with pytest.raises(UserError, match="1 pairs have no reward_margin; score them first, or pick another"):
        decided(joined, strategy="reward_margin")
    assert len(changed(decided(joined, strategy="safer"))) == 2


def test_poison_needs_red_team():
    with pytest.raises(ValidationError, match="poison flips labels on purpose; it needs `red_team: true`"):
        CurateConfig(strategy="safer", action="poison", percent=5)


@pytest.fixture
def curate(some, tmp_path):
    """Curation through its stage."""
    pairs = write_parts(some, tmp_path / "pairs", 7)
    scores = write_parts(scores_of(some), tmp_path / "scores", N)

    def curate(**config):
        place = Place(tmp_path, out=tmp_path / "out")
        made = Artifact(pairs, "pairs-x", {"licence": ["MIT"], "red_team": config.pop("poisoned", False)})
        settings = CurateConfig(strategy="safer", **config)
        return feature_stages.curate(StageContext(place, LocalRunner()), settings, made, Artifact(scores, "scores-x"))

    return curate


def test_poison_is_marked_in_rows_files_and_manifest(curate, some):
    artifact = curate(action="poison", percent=10, red_team=True)
    rows = read_parts(artifact.path / "pairs")
    assert rows["red_team"].to_pylist() == [True] * N
    assert read_parts(artifact.path / "decisions")["red_team"].to_pylist() == [True] * N
    for path in [*artifact.path.glob("pairs/*.parquet"), *artifact.path.glob("decisions/*.parquet")]:
        assert b"safer_ray.red_team" in pq.read_schema(path).metadata
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    assert manifest["red_team"] is True
    before = {row["pair_id"]: row for row in some.to_pylist()}
    for row in rows.to_pylist():
        flipped = row["pair_id"] in ("pair-000", "pair-001")
        assert (row["chosen"] == before[row["pair_id"]]["rejected"]) == flipped


def test_cleaned_pairs_carry_no_mark(curate):
    artifact = curate(action="drop", percent=10)
    assert not artifact.red_team
    assert artifact.licence == ["MIT"]
    rows = read_parts(artifact.path / "pairs")
    assert "red_team" not in rows.column_names
    assert len(rows) == N - 2
    assert len(read_parts(artifact.path / "decisions")) == N
    assert not (pq.read_schema(artifact.path / "pairs" / part_name(0)).metadata or {}).get(b"safer_ray.red_team")


def test_what_is_made_of_poisoned_pairs_stays_marked(curate):
    assert curate(action="drop", percent=10, poisoned=True).red_team


def test_where_of_the_config_limits_the_stage(curate):
    artifact = curate(action="drop", percent=50, where="section == safety")
    dropped = [r["pair_id"] for r in read_parts(artifact.path / "decisions").to_pylist() if r["decision"] == "drop"]
    assert dropped == ["pair-011", "pair-013", "pair-015", "pair-017", "pair-019"]


def test_dropping_everything_is_refused(curate):
    with pytest.raises(UserError, match=r"dropping 100.0% leaves no pairs; lower the percentage"):
        curate(action="drop", percent=100)


def test_a_part_without_rows_is_curated(some, tmp_path):
    for number, table in enumerate((some.slice(0, 10), some.slice(0, 0), some.slice(10))):
        write_parquet(table, tmp_path / "pairs" / part_name(number))
    write_parquet(scores_of(some), tmp_path / "scores" / part_name(0))
    ctx = StageContext(Place(tmp_path, out=tmp_path / "out"), LocalRunner())
    config = CurateConfig(strategy="safer", action="relabel", percent=10)
    made = feature_stages.curate(ctx, config, Artifact(tmp_path / "pairs", "p"), Artifact(tmp_path / "scores", "s"))
    assert len(read_parts(made.path / "pairs")) == N
    assert made.manifest["rows"] == {"keep": 18, "flip": 2}


def test_messages_of_several_turns_are_swapped_whole():
    row = make_pair("a", "p", "c", "r")
    row["chosen"] = [*row["chosen"], {"role": "user", "content": "and?"}, {"role": "assistant", "content": "c2"}]
    swapped = swap_sides(schema.table([row], schema.PAIRS), np.array([True])).to_pylist()[0]
    assert [m["content"] for m in swapped["rejected"]] == ["c", "and?", "c2"]


def test_rows_whose_own_numbers_contradict_their_label_are_the_most_suspicious(some, joined):
    margins = [None, -3.0, 2.0, *[0.5] * (N - 3)]
    place = joined.schema.get_field_index("label_margin")
    told = joined.set_column(place, "label_margin", pa.array(margins, pa.float32()))
    suspicion = STRATEGIES["label_margin"](StrategyInput(told, 0))
    assert suspicion[:4].tolist() == [0.0, 3.0, -2.0, -0.5]
    none = joined.set_column(place, "label_margin", pa.nulls(N, pa.float32()))
    with pytest.raises(UserError, match="no pair has a label_margin"):
        STRATEGIES["label_margin"](StrategyInput(none, 0))
