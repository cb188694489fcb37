"""Tokenised pairs as Arrow columns: nothing is lost on the way, and the model sees the same."""

import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.made import make_pair

from safer_ray import schema
from safer_ray.errors import UserError
from safer_ray.features.encoder import Encoder
from safer_ray.features.passes import EncodeActivations, EncodePairs, RewardPairs, tokens_of
from safer_ray.reward.text import PairTokens, Side
from safer_ray.reward.tokens import TEXTS, TokenisePairs, read_tokens, token_count, with_tokens
from safer_ray.sae.formats import load_sae
from safer_ray.storage.files import read_parquet, write_parquet

COLUMNS = {
    **{f"{side}_{name}": pa.list_(pa.int32()) for side in schema.SIDES for name in ("ids", "token", "end", "types")},
    **{f"{side}_prompt_tokens": pa.int32() for side in schema.SIDES},
    **{f"{side}_{name}": pa.bool_() for side in schema.SIDES for name in ("fallback", "truncated")},
}


def assert_equal_tokens(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.pair_id == b.pair_id
        for left, right in ((a.chosen, b.chosen), (a.rejected, b.rejected)):
            assert (left.fallback, left.n_prompt, left.truncated) == (right.fallback, right.n_prompt, right.truncated)
            assert (left.types is None) == (right.types is None)
            assert left.types is None or np.array_equal(left.types, right.types)
            for name in ("ids", "token", "end"):
                found, wanted = getattr(left, name), getattr(right, name)
                assert found.dtype == wanted.dtype, name
                assert np.array_equal(found, wanted), name


@pytest.fixture(scope="module")
def tokenise(reward_dir):
    return TokenisePairs(reward_dir)


@pytest.fixture(scope="module")
def tokenised(tokenise, pairs):
    return tokenise(pairs)


@st.composite
def sides(draw):
    ids = draw(st.lists(st.integers(0, 2**31 - 1), max_size=8))
    ends = draw(st.lists(st.integers(0, 300), max_size=4))
    token = [min(end, max(0, len(ids) - 1)) for end in ends]
    arrays = np.array(ids, np.int64), np.array(token, np.int32), np.array(ends, np.int32)
    types = draw(st.none() | st.just(np.arange(len(ids), dtype=np.int64) % 2))
    return Side(*arrays, draw(st.booleans()), draw(st.integers(0, 99)), draw(st.booleans()), types)


@given(st.lists(st.builds(PairTokens, st.text(max_size=5), sides(), sides())))
def test_tokens_come_back_as_they_were(tokens):
    rows = pa.table({"pair_id": pa.array([t.pair_id for t in tokens], pa.string())})
    written = with_tokens(rows, tokens)
    assert_equal_tokens(read_tokens(written), tokens)
    assert token_count(written) == sum(len(t.chosen.ids) + len(t.rejected.ids) for t in tokens)
    assert {name: written.schema.field(name).type for name in COLUMNS} == COLUMNS


def test_tokens_take_the_place_of_the_texts_and_other_columns_stay(tokenised, pairs):
    assert not set(TEXTS) & set(tokenised.column_names)
    kept = [name for name in pairs.column_names if name not in TEXTS]
    assert tokenised.column_names == [*kept, *[name for name in tokenised.column_names if name in COLUMNS]]
    assert tokenised.select(kept).equals(pairs.select(kept))


def test_tokenising_gives_what_the_model_itself_would_read(tokenised, reward, pairs):
    assert_equal_tokens(read_tokens(tokenised), reward.pairs(pairs.to_pylist()))
    assert_equal_tokens(tokens_of(reward, tokenised), tokens_of(reward, pairs))


def test_slices_chunks_and_files_read_back(tokenise, tokenised, pairs, tmp_path):
    wanted = read_tokens(tokenised)
    assert_equal_tokens(read_tokens(tokenised.slice(11, 5)), wanted[11:16])
    assert_equal_tokens(
        read_tokens(pa.concat_tables([tokenised.slice(40), tokenised.slice(0, 3)])), [*wanted[40:], *wanted[:3]]
    )
    assert_equal_tokens(read_tokens(tokenise(pairs.slice(7, 9))), wanted[7:16])
    write_parquet(tokenised, tmp_path / "rows.parquet")
    assert_equal_tokens(read_tokens(read_parquet(tmp_path / "rows.parquet")), wanted)
    assert token_count(tokenised.slice(11, 5)) == sum(len(t.chosen.ids) + len(t.rejected.ids) for t in wanted[11:16])


def test_no_rows_have_the_columns_but_no_tokens(tokenise, tokenised):
    nothing = tokenise(schema.PAIRS.empty_table())
    assert len(nothing) == 0
    assert nothing.schema.equals(tokenised.schema)
    assert read_tokens(nothing) == read_tokens(tokenised.slice(0, 0)) == []
    assert token_count(nothing) == 0
    assert len(read_tokens(pa.concat_tables([nothing, tokenised]))) == len(tokenised)


def test_rows_that_are_not_tokenised_count_no_tokens(pairs):
    assert token_count(pairs) == 0


def test_a_pair_without_a_sentence_end_keeps_its_fallback(tokenise):
    rows = schema.table([make_pair("p", "", "no end here", "This one has an end, and then some more.")], schema.PAIRS)
    (tokens,) = read_tokens(tokenise(rows))
    assert tokens.chosen.fallback
    assert not tokens.rejected.fallback
    assert tokens.chosen.token.tolist() == [len(tokens.chosen.ids) - 1]


# The model sees the same


@pytest.fixture(params=["codes", "activations", "all tokens", "rewards"])
def function(request, reward_dir, sae_dir):
    """Each batch function that reads pairs through the model."""
    return {
        "codes": lambda: EncodePairs(reward_dir, sae_dir),
        "activations": lambda: EncodeActivations(reward_dir, 2, "ends"),
        "all tokens": lambda: EncodeActivations(reward_dir, 1, "all"),
        "rewards": lambda: RewardPairs(reward_dir),
    }[request.param]()


def test_tokenised_rows_give_the_same_as_raw_ones(function, tokenised, pairs):
    wanted = function(pairs)
    assert len(wanted) >= len(pairs)
    assert function(tokenised).equals(wanted)


def test_an_engine_reads_tokenised_rows_as_raw_ones(reward, sae_dir, tokenised, pairs):
    encoder = Encoder(reward, 2, load_sae(sae_dir))
    found, wanted = (encoder.encode_tokens(tokens_of(reward, rows.slice(3, 2))) for rows in (tokenised, pairs))
    assert np.array_equal(found.rewards, wanted.rewards)
    assert_equal_tokens(found.tokens, wanted.tokens)


# Without the model


def test_tokenising_needs_no_weights(reward_dir, tokenised, pairs, tmp_path):
    copy = shutil.copytree(reward_dir, tmp_path / "model")
    (copy / "model.safetensors").unlink()
    assert TokenisePairs(copy)(pairs).equals(tokenised)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no model in"):
        TokenisePairs(tmp_path / "none")


def test_a_broken_tokenizer_is_one_line(reward_dir, tmp_path):
    copy = shutil.copytree(reward_dir, tmp_path / "model")
    (copy / "config.json").write_text('{"model_type": "no such model"}')
    with pytest.raises(UserError, match="cannot read the tokenizer of") as caught:
        TokenisePairs(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["config", "tokenizer"])
def test_a_damaged_model_folder_is_one_line(reward_dir, tmp_path, damage):
    copy = shutil.copytree(reward_dir, tmp_path / "model")
    (copy / f"{damage}.json").write_text("{ no")
    with pytest.raises(UserError) as caught:
        TokenisePairs(copy)
    assert "\n" not in str(caught.value)
