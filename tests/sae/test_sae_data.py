"""The order in which vectors are read for training: every row once an epoch, whoever reads."""

from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safer_ray import schema
from safer_ray.config.sections import SaeConfig
from safer_ray.errors import UserError
from safer_ray.sae import data as sae_data
from safer_ray.sae.data import Order, held_out_vectors, open_vectors, sample
from safer_ray.sae.model import standardise
from safer_ray.storage.artifacts import part_name
from safer_ray.storage.background import prefetch
from safer_ray.storage.files import write_parquet

WIDTH = 4
CONFIG = SaeConfig(latents=8, k=2, batch_size=64, validation_percent=10)


def numbered(n, start=0):
    """Rows that carry their number in their vector; four of a pair, two pairs of a prompt."""
    row = np.arange(start, start + n)
    x = np.stack([row % 1024, row // 1024, np.ones(n), np.zeros(n)], axis=1).astype(np.float16)
    columns = {
        "pair_id": [f"p{i // 4}" for i in row],
        "group": [f"g{i // 8}" for i in row],
        "side": ["chosen"] * n,
        "token": np.zeros(n, np.int32),
        "end": np.zeros(n, np.int32),
    }
    columns |= {name: np.ones(n, np.float32) for name in ("norm", "mean", "std")}
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), WIDTH)
    return pa.table({**columns, "x": lists}, schema=schema.activations(WIDTH))


def number_of(x):
    return (x[:, 0].astype(int) + 1024 * x[:, 1].astype(int)).tolist()


def write(table, directory, rows=500, group_rows=512):
    for number, start in enumerate(range(0, len(table), rows)):
        write_parquet(table.slice(start, rows), directory / part_name(number), group_rows)
    return directory


def with_column(table, name, values):
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(name), pa.array(values, table.schema.field(name).type))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sae_data, "BLOCK", 60)
    monkeypatch.setattr(sae_data, "WINDOW", 4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write(numbered(1500), tmp_path_factory.mktemp("activations"), rows=370, group_rows=100)


@pytest.fixture
def vectors(directory):
    return open_vectors(directory, CONFIG)


def taken(order, count, step=0):
    """So many batches from a step on."""
    with order.batches(step) as batches:
        return list(islice(batches, count))


def epoch_of(order, epoch=0):
    """The rows of each batch of an epoch, as this worker sees them."""
    return [number_of(batch.x) for batch in taken(order, order.per_epoch, epoch * order.per_epoch)]


@settings(max_examples=12)
@given(workers=st.integers(1, 7), batch_size=st.integers(7, 400), epoch=st.integers(0, 2))
def test_every_row_comes_once_an_epoch_for_any_number_of_workers(directory, workers, batch_size, epoch):
    vectors = open_vectors(directory, CONFIG.model_copy(update={"batch_size": batch_size}))
    seen = []
    for rank in range(workers):
        seen += [row for batch in epoch_of(Order(vectors, batch_size, 0, rank, workers), epoch) for row in batch]
    assert sorted(seen) == np.flatnonzero(vectors.train).tolist()


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_a_batch_has_the_same_rows_for_any_number_of_workers(vectors, workers):
    whole = epoch_of(Order(vectors, 64, 0))
    shares = [epoch_of(Order(vectors, 64, 0, rank, workers)) for rank in range(workers)]
    for number, rows in enumerate(whole):
        assert sorted(rows) == sorted(row for share in shares for row in share[number])
    sizes = [len(batch) for share in shares for batch in share]
    assert max(sizes) < 3 * 64 / workers


def test_batches_of_an_epoch_differ_by_a_row_at_most_and_say_how_many_they_are(vectors):
    order = Order(vectors, 64, 0)
    sizes = [len(batch) for batch in epoch_of(order)]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= 64
    said = [batch.rows for batch in taken(Order(vectors, 64, 0, 1, 3), order.per_epoch)]
    assert said == sizes


def test_any_step_is_reached_as_if_all_before_it_had_been_taken(vectors):
    order = Order(vectors, 64, 3, 1, 2)
    all_of_them = [batch.x for batch in taken(order, 3 * order.per_epoch)]
    for step in (1, 5, order.per_epoch - 1, order.per_epoch, 2 * order.per_epoch + 3):
        (there,) = taken(order, 1, step)
        assert np.array_equal(there.x, all_of_them[step])


def test_epochs_and_seeds_have_orders_of_their_own(vectors):
    orders = [epoch_of(Order(vectors, 64, seed), epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_a_batch_mixes_rows_from_afar(vectors):
    spread = [np.ptp(batch) for batch in epoch_of(Order(vectors, 64, 0))]
    assert min(spread) > 120


def test_how_rows_lie_in_files_and_row_groups_changes_nothing(vectors, tmp_path):
    other = open_vectors(write(numbered(1500), tmp_path, rows=1000, group_rows=37), CONFIG)
    assert epoch_of(Order(other, 64, 0)) == epoch_of(Order(vectors, 64, 0))
    assert np.array_equal(sample(other, 0, 50), sample(vectors, 0, 50))


def test_a_batch_larger_than_a_window_is_whole(vectors):
    rows = epoch_of(Order(vectors, 900, 0))
    assert [len(batch) for batch in rows] == [vectors.train.sum() // 2, -(-vectors.train.sum() // 2)]


def test_a_worker_whose_share_of_a_batch_is_empty_gets_an_empty_one(vectors):
    batches = taken(Order(vectors, 2, 0, 0, 2), 200)
    assert min(len(batch.x) for batch in batches) == 0
    assert all(batch.x.shape[1] == WIDTH for batch in batches)


def test_all_vectors_of_a_prompt_fall_on_one_side(vectors):
    held = number_of(np.concatenate(list(held_out_vectors(vectors, 0))))
    assert held == np.flatnonzero(vectors.held).tolist()
    assert {row // 8 for row in held}.isdisjoint(row // 8 for row in np.flatnonzero(vectors.train))
    assert 60 < len(held) < 240


def test_vectors_without_a_prompt_are_split_by_pair(directory, vectors, tmp_path):
    table = with_column(numbered(1500), "group", [None] * 1500)
    held = np.flatnonzero(open_vectors(write(table, tmp_path), CONFIG).held)
    assert set(np.flatnonzero(vectors.held)) != set(held)
    assert {row // 4 for row in held}.isdisjoint(set(range(375)) - {row // 4 for row in held})
    assert len(held) % 4 == 0


def test_of_many_held_out_vectors_some_blocks_are_taken(vectors):
    some = np.concatenate(list(held_out_vectors(vectors, 0, limit=40)))
    assert 40 <= len(some) < vectors.held.sum()
    assert set(number_of(some)) <= set(np.flatnonzero(vectors.held))


def test_outliers_are_left_out_and_counted(tmp_path):
    norm = np.ones(400)
    norm[[5, 100, 301]] = 11
    vectors = open_vectors(write(with_column(numbered(400), "norm", norm), tmp_path), CONFIG)
    assert vectors.outliers == 3
    assert not (vectors.train | vectors.held)[[5, 100, 301]].any()
    assert vectors.train.sum() + vectors.held.sum() == 397


def test_a_nan_norm_is_named_by_row_and_pair(tmp_path):
    norm = np.ones(300)
    norm[41] = np.nan
    table = with_column(numbered(300), "norm", norm)
    with pytest.raises(UserError, match=r"row 41 \(pair 'p10'\) is NaN or infinite; rebuild stage `activations`"):
        open_vectors(write(table, tmp_path), CONFIG)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_vector_that_is_not_finite_is_named_when_it_is_read(tmp_path, value):
    table = numbered(600)
    x = np.stack(table["x"].to_pylist()).astype(np.float16)
    x[407, 3] = value
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), WIDTH)
    at = table.schema.get_field_index("x")
    vectors = open_vectors(write(table.set_column(at, table.schema.field(at), column), tmp_path), CONFIG)
    with pytest.raises(UserError, match=r"row 407 \(pair 'p101'\) is NaN or infinite"):
        epoch_of(Order(vectors, 64, 0))


def test_fewer_vectors_than_a_batch_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"wanted at least 64 and 1; lower sae.batch_size or harvest more pairs"):
        open_vectors(write(numbered(40), tmp_path), CONFIG)


def test_vectors_narrower_than_k_are_refused(directory):
    with pytest.raises(UserError, match=r"are 4 wide, narrower than k 5; lower sae.k"):
        open_vectors(directory, CONFIG.model_copy(update={"k": 5}))


def test_a_file_without_vectors_is_refused_by_name(tmp_path):
    write_parquet(numbered(10).drop_columns(["x"]), tmp_path / part_name(0))
    with pytest.raises(UserError, match=r"part-00000000.parquet has no column `x` of vectors"):
        open_vectors(tmp_path, CONFIG)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), WIDTH)])
def test_a_file_of_raw_vectors_from_outside_is_standardised_as_it_is_read(tmp_path, kind):
    raw = np.random.default_rng(0).normal(3, 2, size=(500, WIDTH))
    raw[7] *= 100
    write_parquet(pa.table({"x": pa.array(raw.tolist(), kind)}), tmp_path / "mine.parquet")
    vectors = open_vectors(tmp_path / "mine.parquet", CONFIG)
    assert vectors.outliers == 1
    assert 20 < vectors.held.sum() < 90
    x = vectors.block(0, vectors.train)
    rows = np.flatnonzero(vectors.train[:60])
    wanted = standardise(torch.from_numpy(raw[rows].astype(np.float32))).x
    np.testing.assert_allclose(x, wanted.numpy(), atol=2e-3)


def test_vectors_of_several_widths_are_refused(tmp_path):
    write_parquet(pa.table({"x": [[1.0, 2.0, 3.0, 4.0]] * 200 + [[1.0, 2.0]]}), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=r"wanted 4 each; mend the file"):
        open_vectors(tmp_path / "mine.parquet", CONFIG)


def test_what_is_made_ahead_comes_in_order_and_errors_come_where_they_are():
    def items():
        yield from range(5)
        raise ValueError("the sixth")

    with prefetch(items(), 2) as made:
        assert list(islice(made, 5)) == list(range(5))
        with pytest.raises(ValueError, match="the sixth"):
            next(made)
    with prefetch(range(3), 2) as made:
        assert list(made) == [0, 1, 2]


def test_no_more_is_made_than_is_wanted_ahead_and_nothing_after_the_end():
    made_so_far = []

    def items():
        for i in range(1000):
            made_so_far.append(i)
            yield i

    with prefetch(items(), 2) as made:
        assert next(made) == 0
    assert len(made_so_far) <= 4


@pytest.mark.parametrize("held", [0, 10**9])
def test_blocks_that_fit_in_memory_are_decoded_once(vectors, monkeypatch, held):
    decoded, block = [], sae_data.Vectors.block

    def counted(self, number, mask):
        decoded.append(number)
        return block(self, number, mask)

    order = Order(vectors, 64, 0)
    plain = [epoch_of(order, epoch) for epoch in (0, 1)]
    monkeypatch.setattr(sae_data, "KEPT", held)
    monkeypatch.setattr(sae_data.Vectors, "block", counted)
    kept = Order(vectors, 64, 0)
    assert [epoch_of(kept, epoch) for epoch in (0, 1)] == plain
    assert (len(decoded) == len(set(decoded))) == bool(held)
