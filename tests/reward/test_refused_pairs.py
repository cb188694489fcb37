"""A pair that a model cannot read concerns that pair alone: the others have the values they have without it."""

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.made import make_pair, make_pairs, random_sae, write_parts
from support.model_types import COMMON, FAMILIES
from support.same_rows import assert_same_rows
from support.tiny_run import finished

from safer_ray.audit.estimate import estimate
from safer_ray.audit.run import Audit, audit_corpus
from safer_ray.audit.score import AuditPairs
from safer_ray.audit.summary import close_audit
from safer_ray.config.sections import ActivationsConfig, ScoresConfig, SourceConfig
from safer_ray.errors import TooLargeError, UserError
from safer_ray.features.passes import EncodeActivations, EncodePairs, HeadPairs, MeanVectors, RewardPairs
from safer_ray.pipeline import model_stages
from safer_ray.pipeline.runner import LocalRunner, whole_function
from safer_ray.pipeline.stage import StageContext
from safer_ray.reward import execution, packing
from safer_ray.reward.batches import NO_MEMORY
from safer_ray.reward.checkpoints import load_pair_tokenizer
from safer_ray.reward.forward import forward_pairs
from safer_ray.reward.tokens import TokenisePairs
from safer_ray.sae.formats import save_sae
from safer_ray.schema import split_refused
from safer_ray.service.api import FailedPair, ScoredPair
from safer_ray.service.request_limits import Limits
from safer_ray.service.request_parsing import Read, read_row
from safer_ray.service.service import LocalService
from safer_ray.storage.artifacts import Artifact, Place, open_artifact, read_parts
from safer_ray.storage.contents import artifact_hash
from safer_ray.storage.quarantine import quarantine_rows
from safer_ray.storage.work import MapJob

SNOW = "☃"  # no other pair holds its bytes
KINDS = ("codes", "activations", "all tokens", "vectors", "rewards", "heads")


def break_token(directory: Path, value: float = float("nan")) -> Path:
    """The model in `directory` from now on gives no finite value at a snowman, and behind it."""
    ids = load_pair_tokenizer(directory).tokenizer(SNOW, add_special_tokens=False)["input_ids"]
    weights = load_file(directory / "model.safetensors")
    (name,) = [name for name in weights if "embed_tokens" in name or "word_embeddings" in name]
    weights[name][ids[-1]] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def with_snow(n: int = 9) -> pa.Table:
    """Pairs of which the fifth has a snowman in its rejected response alone."""
    snow = make_pair(
        "snow", "What is outside? I see it there.", "Nothing, I am sorry. Look.", f"A {SNOW} is there. Yes."
    )
    rows = make_pairs(n).to_pylist()
    return pa.Table.from_pylist([*rows[:4], snow, *rows[4:]], schema=make_pairs(1).schema)


@pytest.fixture(scope="module", params=[*FAMILIES, "bert"])
def broken(request, reward_dir, tmp_path_factory):
    """A tiny model of each family that cannot read a snowman, and an SAE for it."""
    import transformers

    directory = tmp_path_factory.mktemp("broken") / "model"
    if request.param == "bert":
        shutil.copytree(request.getfixturevalue("bert_dir"), directory)
        width = 32
    else:
        shutil.copytree(reward_dir, directory)
        config = getattr(transformers, request.param.split()[0])(
            **COMMON | FAMILIES[request.param] | {"vocab_size": 410}
        )
        torch.manual_seed(0)
        transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(directory)
        width = COMMON["hidden_size"]
    save_sae(random_sae(width, 64, 4), directory.parent / "sae", model="tiny", layer=2)
    return break_token(directory) if request.param != "bert" else break_bert(directory)


def break_bert(directory: Path) -> Path:
    """As `break_token`; to this tokenizer a snowman is an unknown token like many, and so another word is broken."""
    weights = load_file(directory / "model.safetensors")
    ids = load_pair_tokenizer(directory).tokenizer("outside", add_special_tokens=False)["input_ids"]
    weights["bert.embeddings.word_embeddings.weight"][ids[0]] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def made(kind: str, directory: Path, shards: int = 1):
    make = {
        "codes": lambda **part: EncodePairs(directory, directory.parent / "sae", **part),
        "activations": lambda **part: EncodeActivations(directory, 2, "ends", **part),
        "all tokens": lambda **part: EncodeActivations(directory, 2, "all", **part),
        "vectors": lambda **part: MeanVectors(directory, (1, 2), **part),
        "rewards": lambda **part: RewardPairs(directory, **part),
        "heads": lambda **part: HeadPairs(directory, **part),
    }[kind]
    return whole_function(MapJob("any", None, make, None, shards=shards))


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_without_finite_values_is_refused_and_no_other_is_touched(broken, kind, shards):
    if shards > 1 and "bert" in json.loads((broken / "config.json").read_text())["model_type"]:
        pytest.skip("an encoder is not cut")
    rows = TokenisePairs(broken)(with_snow())
    good, refused = split_refused(made(kind, broken, shards)(rows))
    assert refused["pair_id"].to_pylist() == ["snow"]
    assert refused["row_key"].to_pylist() == ["made.jsonl#snow"]
    assert refused["refused"][0].as_py().startswith("NaN or infinite values: ")
    assert "snow" not in good["pair_id"].to_pylist()
    alone = made(kind, broken)
    wanted = pa.concat_tables([alone(rows.slice(i, 1)) for i in range(len(rows)) if i != 4])
    assert_same_rows(good.select(wanted.column_names), wanted, kind)


@pytest.mark.parametrize("value", [float("inf"), 1e25])
def test_infinite_values_and_vectors_without_a_length_are_refused_too(reward_dir, sae_dir, tmp_path, value):
    shutil.copytree(reward_dir, tmp_path / "model")
    shutil.copytree(sae_dir, tmp_path / "sae")
    break_token(tmp_path / "model", value)
    _, refused = split_refused(made("all tokens", tmp_path / "model")(with_snow()))
    assert refused["pair_id"].to_pylist() == ["snow"]


# Stages


@pytest.fixture
def odd(reward_dir, tmp_path) -> Path:
    shutil.copytree(reward_dir, tmp_path / "model")
    return break_token(tmp_path / "model")


def test_a_stage_quarantines_the_pair_and_keeps_the_others(odd, reward_dir, tmp_path):
    pairs = open_artifact(write_parts(with_snow(30), tmp_path / "pairs", 12))
    ctx = StageContext(Place(tmp_path / "runs"), LocalRunner())
    found = model_stages.evaluate(ctx, open_artifact(odd), pairs)
    assert found.manifest["rows"] == {"read": 31, "written": 30, "quarantined": 1}
    (row,) = quarantine_rows(found.path).to_pylist()
    assert (row["pair_id"], row["row_key"], row["stage"]) == ("snow", "made.jsonl#snow", "evaluate")
    assert row["reason"].startswith("NaN or infinite values: the reward of model;")
    vectors = model_stages.activations(ctx, ActivationsConfig(layer=2), pairs, open_artifact(odd))
    assert vectors.manifest["rows"]["quarantined"] == 1
    wanted = model_stages.evaluate(ctx, open_artifact(reward_dir), pairs)
    kept = read_parts(wanted.path).filter(pa.compute.field("pair_id") != "snow")
    assert_same_rows(read_parts(found.path), kept, "rewards")


def test_a_stage_ends_where_more_than_the_share_fails_and_a_larger_one_lets_it_go_on(odd, tmp_path):
    pairs = open_artifact(write_parts(with_snow(3), tmp_path / "pairs", 12))
    ctx = StageContext(Place(tmp_path / "runs"), LocalRunner())
    told = r"evaluate: 1 of 4 rows failed, more than pairs.max_refused_share 0.2, most with 'NaN or infinite values'"
    with pytest.raises(
        UserError,
        match=told
        + r", the first is pair 'snow' \(NaN or infinite values: the reward of model; .*\); see .*quarantine",
    ):
        model_stages.evaluate(ctx, open_artifact(odd), pairs)
    lenient = replace(ctx, max_refused_share=0.25)
    assert model_stages.evaluate(lenient, open_artifact(odd), pairs).manifest["rows"]["written"] == 3


def test_a_model_that_gives_nothing_else_ends_the_stage_in_one_line(reward_dir, pairs_dir, tmp_path):
    shutil.copytree(reward_dir, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["score.weight"][:, :3] = float("nan")
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    ctx = StageContext(Place(tmp_path / "runs"), LocalRunner())
    with pytest.raises(
        UserError, match=r"evaluate: 48 of 48 rows failed, .* most with 'NaN or infinite values'"
    ) as told:
        model_stages.evaluate(ctx, open_artifact(tmp_path / "model"), open_artifact(pairs_dir))
    assert "\n" not in str(told.value)


# Audits and the service


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Artifact:
    """The tiny run's bundle, with a model that cannot read a snowman."""
    folder = tmp_path_factory.mktemp("bundle") / "auditor"
    shutil.copytree(finished(tmp_path_factory.getbasetemp()).artifacts["auditor"].path, folder)
    break_token(folder / "reward")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"content_sha256": artifact_hash(folder)}))
    return open_artifact(folder, "auditor")


def lines(n: int, snow: int) -> str:
    rows = make_pairs(n).to_pylist() + with_snow().slice(4, 1).to_pylist() * snow
    return "".join(
        json.dumps({"id": f"{row['pair_id']}-{i}"} | {k: row[k] for k in ("prompt", "chosen", "rejected")}) + "\n"
        for i, row in enumerate(rows)
    )


def test_an_audit_quarantines_the_pair_with_its_text_and_scores_the_others(bundle, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(20, snow=2))
    audit = Audit(bundle, SourceConfig(path=str(tmp_path / "pairs.jsonl")), ScoresConfig(), fragment_rows=8)
    (tmp_path / "out").mkdir()
    counts = audit_corpus(audit, tmp_path / "out", LocalRunner())
    assert (counts.read, counts.written, counts.quarantined) == (22, 20, 2)
    summary = close_audit(audit, tmp_path / "out", counts, 1.0)
    assert summary["reasons"] == {"NaN or infinite values": 2}
    assert summary["max_refused_share"] == 0.5
    refused = quarantine_rows(tmp_path / "out").to_pylist()
    assert [row["position"] for row in refused] == [20, 21]
    assert all(SNOW in row["raw"] for row in refused)
    assert estimate(audit, 1).rows == 22


def test_an_audit_fails_above_its_share_and_goes_on_with_a_larger_one(bundle, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(lines(4, snow=2))
    audit = Audit(bundle, SourceConfig(path=str(tmp_path / "pairs.jsonl")), ScoresConfig(), max_refused_share=0.3)
    out = tmp_path / "out"
    out.mkdir()
    told = "2 of 6 rows could not be scored, more than --max-refused-share 0.3, most: 'NaN or infinite values'"
    with pytest.raises(UserError, match=told):
        audit_corpus(audit, out, LocalRunner())
    before = [path.stat().st_mtime_ns for path in (out / "scores").iterdir()]
    assert audit_corpus(audit._replace(max_refused_share=0.4), out, LocalRunner()).written == 4
    assert [path.stat().st_mtime_ns for path in (out / "scores").iterdir()] == before


def test_a_pair_whose_other_layers_are_not_finite_is_refused_where_mean_vectors_are_read(bundle, monkeypatch):
    score = AuditPairs(bundle, ScoresConfig(detector="safer", flag_quantile=0.3))
    score.add_means((1, 2))
    forward = AuditPairs._forward

    def spoiled(self, pairs, tokens):
        found = forward(self, pairs, tokens)
        found.hidden[0] = found.hidden[0].clone()
        found.hidden[0][0, 0] = torch.inf  # of the first pair's prompt, at a token that ends no sentence
        return found

    monkeypatch.setattr(AuditPairs, "_forward", spoiled)
    made, reasons = score.read(with_snow())
    assert sorted(reasons) == [0, 4]
    assert reasons[0].startswith("NaN or infinite values: layer 1, 2 of ")
    assert made["pair_id"].to_pylist() == [f"pair-{i:03}" for i in range(1, 9)]


def sent(row: dict) -> Read:
    return read_row({k: row[k] for k in ("prompt", "chosen", "rejected")}, row["pair_id"], Limits())


@pytest.mark.parametrize("explain", [False, True])
def test_the_service_tells_of_the_pair_in_its_place(bundle, explain):
    service = LocalService(bundle.path)
    pairs = [sent(row) for row in with_snow().to_pylist()]
    found = asyncio.run(service.score(pairs, explain))
    assert [type(result) for result in found] == [ScoredPair] * 4 + [FailedPair] + [ScoredPair] * 5
    assert found[4].error.detail.startswith("NaN or infinite values: ")
    without = asyncio.run(service.score([*pairs[:4], *pairs[5:]], explain))
    for result, wanted in zip([*found[:4], *found[5:]], without, strict=True):
        assert result.id == wanted.id
        assert result.score == pytest.approx(wanted.score, rel=1e-5, abs=1e-5)
        assert result.reward_chosen == pytest.approx(wanted.reward_chosen, rel=1e-5, abs=1e-5)
    (alone,) = asyncio.run(service.score(pairs[4:5], explain))
    assert isinstance(alone, FailedPair)


# Memory


@pytest.fixture
def starved(monkeypatch):
    """Models where passes of more than so many padded tokens do not fit the memory."""

    def limit(tokens: int, error: Exception) -> None:
        run = execution.run_micro_batch

        def limited(reward, rows, *more):
            if len(rows) * max(len(row.ids) for row in rows) > tokens:
                raise error
            return run(reward, rows, *more)

        monkeypatch.setattr("safer_ray.reward.forward.run_micro_batch", limited)

    return limit


NONE_LEFT = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), *map(RuntimeError, NO_MEMORY)]


@pytest.mark.parametrize("error", NONE_LEFT, ids=lambda error: f"{type(error).__name__}-{str(error)[:9]}")
def test_pairs_too_large_for_the_memory_are_refused_and_the_others_read(reward, starved, reward_dir, error):
    rows = make_pairs(7).to_pylist()
    long = [make_pair(f"long{i}", "Hi.", "word " * 60, "other " * 70) for i in range(2)]
    table = pa.Table.from_pylist([*rows[:3], long[0], *rows[3:], long[1]], schema=make_pairs(1).schema)
    wanted = RewardPairs(reward_dir)(pa.Table.from_pylist(rows, schema=table.schema))
    starved(120, error)
    good, refused = split_refused(RewardPairs(reward_dir)(table))
    assert_same_rows(good.select(wanted.column_names), wanted, "rewards")
    assert refused["pair_id"].to_pylist() == ["long0", "long1"]
    assert refused["refused"][0].as_py().startswith("too large for the memory: pair 'long0' has ")
    with pytest.raises(TooLargeError, match="pair 'long0' has"):
        forward_pairs(reward, reward.pairs(table.to_pylist()))


def test_nothing_fits_and_everything_is_refused(reward_dir, starved):
    starved(0, MemoryError())
    good, refused = split_refused(RewardPairs(reward_dir)(make_pairs(3)))
    assert len(good) == 0
    assert len(refused) == 3


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_pair_wider_than_a_micro_batch_has_no_mask_of_its_width_squared(reward, monkeypatch, spare):
    """Its sides run apart; the rewards are the same."""
    pairs = make_pairs(6).to_pylist()
    tokens = reward.pairs(pairs)
    widths = [len(packing.pack(t.chosen.ids, t.rejected.ids).ids) for t in tokens]
    wanted = forward_pairs(reward, tokens, layers=[2], positions=[s.token for t in tokens for s in t[1:]])
    seen = []
    pack_batch = packing.pack_batch

    def watched(rows, *more):
        seen.extend(len(row.ids) for row in rows)
        return pack_batch(rows, *more)

    monkeypatch.setattr("safer_ray.reward.execution.pack_batch", watched)
    budget = max(widths) + spare
    monkeypatch.setattr("safer_ray.reward.model.CPU_BUDGET", budget)
    found = forward_pairs(reward, tokens, layers=[2], positions=[s.token for t in tokens for s in t[1:]])
    assert sorted(seen) == sorted(width for width in widths if width <= budget)
    torch.testing.assert_close(found.rewards, wanted.rewards, rtol=1e-5, atol=1e-5)
    for one, other in zip(found.hidden, wanted.hidden, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
