"""A reward model cut by layers gives what the whole one gives, in one process and on a cluster."""

import json
import shutil
from dataclasses import replace
from functools import cache, partial

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.made import TINY, make_pair, make_pairs, messages, random_sae
from support.model_types import COMMON, FAMILIES
from support.same_rows import assert_same_rows, assert_same_tables

from safer_ray.config.cluster import PoolConfig, RayConfig
from safer_ray.config.sections import ActivationsConfig, RewardConfig, RunConfig
from safer_ray.distributed.ray_runner import RayRunner
from safer_ray.distributed.sharded import cut
from safer_ray.errors import UserError
from safer_ray.features.encoder import Encoder
from safer_ray.features.passes import EncodeActivations, EncodePairs, HeadPairs, MeanVectors, RewardPairs
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner, whole_function
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward.checkpoints import load_reward_model
from safer_ray.reward.forward import can_pack_pair, forward_pairs
from safer_ray.reward.text import both_sides
from safer_ray.reward.tokens import TokenisePairs, read_tokens
from safer_ray.sae.formats import save_sae
from safer_ray.sae.model import standardise
from safer_ray.schema import CODES, activations
from safer_ray.storage.artifacts import Place, open_artifact, part_fragments, read_fragment, read_parts
from safer_ray.storage.work import MapJob, Part

TURNS = [*messages("user", "Hi. Who are you?"), *messages("assistant", "A friend."), *messages("user", "Prove it!")]
ODD = [
    make_pair("no prompt", "", "Of course. Here is how.", "No."),
    make_pair("one token", "Yes or no?", "y", "n"),
    make_pair("equal", "Say it, please.", "Yes, here it is.", "Yes, here it is."),
    make_pair("prompt cut", "Why? " * 60, "Because. I say so.", "I do not know, and I do not care."),
    make_pair("responses cut", "Why? " * 60, "Because. " * 90, "Since I say so, and I do not like it. " * 30),
    make_pair("turns", "Prove it!", "Look: 3.14...", "No, I will not.") | {"prompt": TURNS},
    make_pair("other scripts", "你好。你是谁", "Café, naïve; 我是朋友。", "مرحبا! 😀😀 ok."),
]
PAIRS = pa.concat_tables([make_pairs(9), pa.Table.from_pylist(ODD, schema=make_pairs(1).schema)])


@pytest.fixture(scope="module", params=list(FAMILIES))
def family_dir(request, reward_dir, tmp_path_factory):
    """A tiny model of each family, with the tokenizer of the tiny Llama."""
    import transformers

    directory = tmp_path_factory.mktemp("family")
    for file in reward_dir.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, directory)
    settings = json.loads((directory / "safer_ray.json").read_text()) | {"max_length": 200}
    (directory / "safer_ray.json").write_text(json.dumps(settings))
    name = request.param
    config = getattr(transformers, name.split()[0])(**COMMON | FAMILIES[name] | {"vocab_size": 410})
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for called, parameter in model.named_parameters():
            if "norm" not in called:
                parameter.normal_(0, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def sae4_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sae") / "sae"
    save_sae(random_sae(COMMON["hidden_size"], 64, 4), directory, model="tiny", layer=3)
    return directory


def codes_with_means(reward, sae, **part):
    function = EncodePairs(reward, sae, **part)
    function.add_means((1, 2, 4))
    return function


def functions(reward, sae):
    return {
        "codes and means": lambda **part: codes_with_means(reward, sae, **part),
        "codes": lambda **part: EncodePairs(reward, sae, **part),
        "activations": lambda **part: EncodeActivations(reward, 4, "ends", **part),
        "all tokens": lambda **part: EncodeActivations(reward, 4, "all", **part),
        "vectors": lambda **part: MeanVectors(reward, (1, 3, 4), **part),
        "rewards": lambda **part: RewardPairs(reward, **part),
        "heads": lambda **part: HeadPairs(reward, **part),
    }


def in_parts(make, shards):
    return whole_function(MapJob("any", None, make, None, shards=shards))


@pytest.mark.parametrize(
    "kind", ["codes", "codes and means", "activations", "all tokens", "vectors", "rewards", "heads"]
)
def test_parts_give_what_the_whole_model_gives(family_dir, sae4_dir, kind):
    rows = TokenisePairs(family_dir)(PAIRS)
    make = functions(family_dir, sae4_dir)[kind]
    whole = make()
    wanted = pa.concat_tables([whole(rows.slice(i, 1)) for i in range(len(rows))])  # each pair alone
    for shards in (1, 2, 4):
        assert_same_rows(in_parts(make, shards)(rows), wanted, f"{kind} in {shards} parts")


def test_codes_and_means_of_one_pass_are_those_of_two(family_dir, sae4_dir):
    rows = TokenisePairs(family_dir)(PAIRS)
    both = codes_with_means(family_dir, sae4_dir)(rows)
    codes = EncodePairs(family_dir, sae4_dir)(rows)
    means = MeanVectors(family_dir, (1, 2, 4))(rows)
    assert_same_rows(both.select(codes.column_names), codes, "codes")
    assert_same_rows(both.select(means.column_names), means, "means")


@torch.inference_mode()
def test_odd_pairs_are_what_plain_transformers_makes_of_each_sequence_alone(family_dir):
    from transformers import AutoModelForSequenceClassification

    plain = AutoModelForSequenceClassification.from_pretrained(family_dir)
    reward = load_reward_model(family_dir)
    tokens = reward.pairs(PAIRS.to_pylist())
    assert {t.pair_id for t in tokens if t.chosen.truncated or t.rejected.truncated} == {"prompt cut", "responses cut"}
    found = Encoder(reward, 3).encode_tokens(tokens, all_tokens=True)
    for i, side in enumerate(both_sides(tokens)):
        output = plain(input_ids=torch.from_numpy(side.ids)[None], output_hidden_states=True)
        raw = output.hidden_states[3][0]
        torch.testing.assert_close(torch.tensor(found.rewards[i]), output.logits[0, 0], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.vectors[i].x, standardise(raw).x, rtol=1e-5, atol=1e-4)


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40)
ROW = st.tuples(TEXT, TEXT.filter(str.strip), TEXT.filter(str.strip))


@settings(max_examples=20, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=5), st.integers(20, 400), st.integers(1, 3))
def test_any_texts_give_the_same_in_any_batches_and_parts(reward_dir, reward, texts, budget, shards):
    rows = [make_pair(f"p{i}", *row) for i, row in enumerate(texts)]
    tokens = reward.pairs(rows)
    alone = [forward_pairs(reward, [pair]) for pair in tokens]
    wanted = torch.cat([found.rewards for found in alone])
    torch.testing.assert_close(forward_pairs(reward, tokens, budget=budget).rewards, wanted, rtol=1e-5, atol=1e-5)
    found = None
    for number in range(shards):
        part = part_of(reward_dir, number, shards)
        found = forward_pairs(part, tokens, before=found, states=number < shards - 1, budget=budget)
    torch.testing.assert_close(found.rewards, wanted, rtol=1e-5, atol=1e-5)


@cache
def part_of(directory, number, shards):
    return load_reward_model(directory, part=Part(number, shards))


def test_whether_a_pair_is_packed_is_decided_once(family_dir):
    """By the window of the whole model, though a part has other layers."""
    whole = load_reward_model(family_dir)
    rows = TokenisePairs(family_dir)(PAIRS)
    tokens = read_tokens(rows)
    first = load_reward_model(family_dir, part=Part(0, 4))
    assert [can_pack_pair(first, pair) for pair in tokens] == [can_pack_pair(whole, pair) for pair in tokens]
    states = forward_pairs(first, tokens, states=True).states
    assert [len(own) == 1 for own in states] == [can_pack_pair(whole, pair) for pair in tokens]


def test_each_part_holds_its_own_blocks_alone(family_dir):
    parts = [load_reward_model(family_dir, part=Part(i, 3)) for i in range(3)]
    assert [(len(p.blocks()), p.before) for p in parts] == [(1, 0), (1, 1), (2, 2)]
    early = [load_reward_model(family_dir, layers=3, part=Part(i, 2)) for i in range(2)]
    assert [(len(p.blocks()), p.before) for p in early] == [(1, 0), (2, 1)]


def test_too_many_parts_are_refused(reward_dir):
    with pytest.raises(UserError, match=r"3 blocks cannot be cut into 4 parts; lower reward\.shards"):
        load_reward_model(reward_dir, part=Part(0, 4))


def test_an_encoder_is_not_cut(bert_dir):
    with pytest.raises(UserError, match=r"a bert is not known to split up by layers; use reward\.shards: 1"):
        load_reward_model(bert_dir, part=Part(1, 2))


def test_pieces_are_the_rows_in_their_order(reward_dir):
    rows = TokenisePairs(reward_dir)(PAIRS)
    lengths = [len(t.chosen.ids) + len(t.rejected.ids) for t in read_tokens(rows)]
    for tokens in (1, 100, 200, 10**6):
        pieces = list(cut(rows, tokens))
        assert pa.concat_tables(pieces).equals(rows)
        start = 0
        for piece in pieces:
            held = lengths[start : start + len(piece)]
            assert len(piece) == 1 or sum(held) <= tokens
            start += len(piece)
    assert list(cut(rows.slice(0, 0), 100)) == []


def test_no_part_is_without_a_block(reward_dir, pairs_dir, tmp_path):
    """Activations of a low layer want fewer parts than the whole model."""
    pairs, reward = open_artifact(pairs_dir), open_artifact(reward_dir)
    made = [
        model_stages.activations(
            StageContext(Place(tmp_path / str(shards)), LocalRunner(), shards=shards),
            ActivationsConfig(layer=1),
            pairs,
            reward,
        )
        for shards in (1, 3)
    ]
    assert_same_rows(*(read_parts(artifact.path) for artifact in made), "activations")


def test_the_number_of_parts_is_no_part_of_a_recipe(reward_dir, pairs_dir, tmp_path):
    config = RewardConfig(base=str(reward_dir), epochs=0.1, max_length=64)
    names = set()
    for shards in (1, 3):
        ctx = StageContext(Place(tmp_path / str(shards)), LocalRunner(), shards=shards)
        made = model_stages.reward(ctx, config.model_copy(update={"shards": shards}), open_artifact(pairs_dir))
        names.add(made.name)
    assert len(names) == 1


def test_pools_are_as_many_as_parts():
    assert RayConfig(max_actors=5).pools(2) == [RayConfig(max_actors=5)] * 2
    small, large = PoolConfig(max_actors=1), PoolConfig(min_actors=2, max_actors=3, actor_cpus=2)
    assert RayConfig(shard_pools=(small, large)).pools(2) == [small, large]
    pairs = {"sources": [{"path": "pairs.jsonl"}]}
    run = {"name": "x", "pairs": pairs, "evaluation": pairs, "judge": {"exchanges": "safety"}}
    with pytest.raises(ValueError, match=r"ray\.shard_pools has 2 entries, but reward\.shards is 3"):
        RunConfig.model_validate(run | {"reward": {"shards": 3}, "ray": {"shard_pools": [{}, {}]}})


# On a cluster


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("kind", "shards"),
    [
        ("codes", 2),
        pytest.param("codes", 3, marks=pytest.mark.long),
        pytest.param("activations", 2, marks=pytest.mark.long),
        pytest.param("activations", 3, marks=pytest.mark.long),
    ],
)
def test_pools_of_actors_give_the_rows_of_one_process(tmp_path, pairs_dir, reward_dir, sae_dir, kind, shards):
    pools = tuple(PoolConfig(min_actors=1 + i % 2, max_actors=2) for i in range(shards))
    make, written = {
        "codes": (partial(EncodePairs, reward_dir, sae_dir), CODES),
        "activations": (partial(EncodeActivations, reward_dir, 3, "ends"), activations(TINY.hidden)),
    }[kind]
    job = MapJob(kind, read_fragment, make, written, prepare=partial(TokenisePairs, reward_dir), loads_model=True)
    in_pools = replace(job, shards=shards, piece_tokens=300)  # several pieces a fragment
    found = []
    for runner, what in ((LocalRunner(), job), (RayRunner(RayConfig(shard_pools=pools)), in_pools)):
        out = tmp_path / type(runner).__name__
        found.append(runner.map(what, part_fragments(pairs_dir), out))
    assert found[0] == found[1]
    assert_same_tables(tmp_path / "RayRunner", tmp_path / "LocalRunner")
    assert not list((tmp_path / "RayRunner/journal/pieces").iterdir())
