"""A whole tiny run: what it leaves, that it adds up, and that it can be had again."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support.tiny_run import POISONED, VARIANTS, audited, every, finished, tables, tiny_config

from safer_ray import schema
from safer_ray.config.sections import PairsConfig, ScoresConfig, SourceConfig
from safer_ray.detection.evaluation import PairedTest
from safer_ray.detection.grouped import holm
from safer_ray.errors import UserError
from safer_ray.features.bundle import read_features
from safer_ray.features.scoring import pair_scores, suspicion
from safer_ray.pipeline import feature_stages, model_stages
from safer_ray.pipeline.run import STAGES, run
from safer_ray.pipeline.runner import LocalRunner
from safer_ray.pipeline.stage import StageContext
from safer_ray.pipeline.summary import conclusions
from safer_ray.reward.checkpoints import load_pair_tokenizer
from safer_ray.storage.artifacts import Place, open_artifact, part_files, read_parts
from safer_ray.storage.contents import check_whole
from safer_ray.storage.marks import RED_TEAM_MARK
from safer_ray.storage.quarantine import quarantine_rows

DETECTORS = {"safer", "reward_margin", "random", "length"}
MANIFEST_KEYS = {
    "stage",
    "name",
    "version",
    "config",
    "inputs",
    "packages",
    "seed",
    "rows",
    "metrics",
    "wall_seconds",
    "licence",
    "red_team",
    "content_sha256",
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return finished(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def summary(tiny):
    return json.loads((tiny.directory / "summary.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def again(tiny, tmp_path_factory):
    """The same config in another root."""
    return run(tiny_config(tmp_path_factory.mktemp("again")), LocalRunner())


def context_in(folder):
    return StageContext(Place(folder), LocalRunner())


def by_id(table):
    return {row["pair_id"]: row for row in table.to_pylist()}


def numbers(column):
    """Values without their nesting, and the lengths of each level of lists."""
    array, lengths = column.combine_chunks(), []
    while pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        lengths.append(array.value_lengths().to_pylist())
        array = array.flatten()
    return array, lengths


def assert_rows_agree(one, other, where):
    """Equal but for 1e-5 in numbers that a forward pass gave."""
    assert one.schema.equals(other.schema), where
    assert len(one) == len(other), where
    for name in one.column_names:
        (a, shape), (b, other_shape) = numbers(one[name]), numbers(other[name])
        assert shape == other_shape, (where, name)
        if pa.types.is_floating(a.type):
            tolerance = 2e-3 if pa.types.is_float16(a.type) else 1e-5
            np.testing.assert_allclose(
                a.to_numpy(zero_copy_only=False), b.to_numpy(zero_copy_only=False), rtol=tolerance, atol=tolerance
            )
        elif not pa.types.is_struct(a.type):
            assert a.equals(b), (where, name)


# The summary


def test_the_summary_has_the_agreed_keys(summary):
    assert set(summary) == {
        "pairs",
        "quarantined",
        "truncated",
        "reward",
        "sae",
        "selected_features",
        "detection",
        "sections",
        "tests",
        "seconds",
        "artifacts",
        "licences",
        "red_team",
    }
    assert set(summary["reward"]) == {"accuracy"}
    assert set(summary["sae"]) == {"nmse", "explained_variance", "l0", "dead_share"}
    assert set(summary["selected_features"]) == {"safe", "unsafe"}
    assert set(summary["detection"]) == {"planted", "auroc", "precision_at_planted"}
    assert set(summary["detection"]["auroc"]) == set(summary["detection"]["precision_at_planted"]) == DETECTORS
    assert set(summary["sections"]) == {"clean", *VARIANTS}
    assert all(set(values) == {"safety", "chat"} for values in summary["sections"].values())


def test_every_variant_is_tested_against_the_base_and_safer_against_its_random_twin(summary):
    assert set(summary["tests"]) == {f"{name} vs clean" for name in VARIANTS} | {"flip_safer_5 vs flip_random_5"}
    for by_section in summary["tests"].values():
        for test in by_section.values():
            assert set(test) == {*PairedTest._fields, "p_holm"}
            assert 0 < test["p"] <= test["p_holm"] <= 1
            assert test["gained"] + test["lost"] <= test["n"] == 60
            assert test["differ"] <= test["groups"] <= test["n"]
            assert test["low"] <= test["change"] <= test["high"]
    told = [test for by_section in summary["tests"].values() for test in by_section.values()]
    assert [test["p_holm"] for test in told] == pytest.approx(holm([test["p"] for test in told]))


def test_conclusions_go_by_the_p_of_all_tests_together():
    test = {"change": -0.02, "low": -0.035, "high": -0.005, "p": 0.03, "p_holm": 0.06}
    summary = {"detection": {"auroc": {}}, "sections": {"clean": {}, "new": {}}, "tests": {"new vs clean": {"a": test}}}
    (said,) = conclusions(summary, "clean")
    assert said == (
        "new moves a by -2.0 points [-3.5, -0.5] (p = 0.06 by sign flips of prompts, Holm over the run's 1 tests; "
        "within chance)."
    )


def test_the_summarys_numbers_lie_in_their_ranges(summary):
    shares = [summary["reward"]["accuracy"], summary["sae"]["dead_share"]]
    shares += summary["detection"]["auroc"].values()
    shares += summary["detection"]["precision_at_planted"].values()
    shares += [value for section in summary["sections"].values() for value in section.values()]
    assert all(0 <= share <= 1 for share in shares)
    assert summary["pairs"] == 320
    assert summary["quarantined"] == 8
    assert summary["detection"]["planted"] == 8  # 5% of 160 pairs of safety
    assert 0 < summary["sae"]["l0"] <= 4
    assert summary["selected_features"]["safe"] + summary["selected_features"]["unsafe"] > 0


def test_the_summary_tells_the_time_of_every_stage_and_names_every_artifact(tiny, summary):
    assert set(summary["seconds"]) == set(STAGES) - {"report", "detector"}
    assert all(seconds >= 0 for seconds in summary["seconds"].values())
    assert set(summary["artifacts"].values()) == set(every(tiny))


def test_accuracies_are_those_of_the_evaluation_rows(tiny, summary):
    for model, artifact in tiny.evaluations.items():
        rows = read_parts(artifact.path).to_pylist()
        for section, accuracy in summary["sections"][model].items():
            right = [row["reward_margin"] > 0 for row in rows if row["section"] == section]
            assert accuracy == pytest.approx(np.mean(right)), (model, section)


# Accounts


def test_the_accounts_of_the_pairs_close(tiny):
    rows = tiny.artifacts["pairs"].manifest["rows"]
    assert rows["read"] == rows["pairs"] + rows["quarantined"] + rows["left_out"] == 328


def test_every_broken_row_is_in_the_quarantine_with_its_reason(tiny):
    refused = quarantine_rows(tiny.artifacts["pairs"].path)
    assert len(refused) == 8
    reasons = [reason.split(":")[0] for reason in refused["reason"].to_pylist()]
    assert len(set(reasons)) >= 7, reasons  # one for each kind of fault; two kinds may share a name
    lines = (tiny.artifacts["corpus"].path / "train.jsonl").read_bytes().split(b"\n")
    broken = {number for number, line in enumerate(lines) if b'"id": "broken-' in line}
    named = set(refused["position"].to_pylist())
    assert len(broken - named) == 0
    assert len(named) == 8  # the eighth repeats the id of a good row
    assert set(refused["stage"].to_pylist()) == {"pairs"}


def test_a_pair_goes_through_every_stage_once(tiny):
    ids = sorted(read_parts(tiny.artifacts["pairs"].path, ["pair_id"])["pair_id"].to_pylist())
    assert len(set(ids)) == 320
    for stage in ("codes", "scores"):
        assert sorted(read_parts(tiny.artifacts[stage].path, ["pair_id"])["pair_id"].to_pylist()) == ids
    for curated in tiny.curated.values():
        assert sorted(read_parts(curated.path / "decisions", ["pair_id"])["pair_id"].to_pylist()) == ids


# Manifests


def test_every_manifest_is_complete(tiny):
    for name, artifact in every(tiny).items():
        manifest = json.loads((artifact.path / "manifest.json").read_text(encoding="utf-8"))
        assert set(manifest) == MANIFEST_KEYS | ({"red_team_from"} if manifest["red_team"] else set()), name
        assert manifest["name"] == name == artifact.path.name
        assert name.startswith(f"{manifest['stage']}-")
        assert {"safer_ray", "torch", "transformers", "pyarrow"} <= set(manifest["packages"])
        assert manifest["rows"], name
        assert all(count >= 0 for count in manifest["rows"].values())
        assert manifest["wall_seconds"] >= 0
        assert len(manifest["content_sha256"]) == 64
        assert manifest["licence"] == ["synthetic"], name


def test_inputs_in_manifests_are_names_of_artifacts(tiny):
    known = set(every(tiny))
    for artifact in every(tiny).values():
        for value in artifact.manifest["inputs"].values():
            assert value.split("/")[0] in known, (artifact.name, value)


def test_rows_equal_the_hash_in_their_manifest(tiny):
    for artifact in every(tiny).values():
        check_whole(artifact)


def test_nothing_unfinished_is_left(tiny):
    assert not list(tiny.directory.glob(".partial-*"))
    assert not (tiny.directory / "run.lock").exists()
    assert not [p for a in every(tiny).values() for p in a.path.rglob("*") if p.name in ("journal", "state")]


# Having it again


def test_a_second_run_makes_nothing_and_says_the_same(tiny):
    before = (tiny.directory / "summary.json").read_bytes()
    stamps = {name: artifact.path.stat().st_mtime_ns for name, artifact in every(tiny).items()}
    seen = []
    second = run(tiny.config, LocalRunner(), on_stage=lambda name, artifact: seen.append((name, artifact)))
    assert len(seen) >= len(stamps)
    assert all(artifact is not None for _, artifact in seen)
    assert {name: artifact.path.stat().st_mtime_ns for name, artifact in every(second).items()} == stamps
    assert (tiny.directory / "summary.json").read_bytes() == before


def test_the_same_config_elsewhere_gives_the_same_artifacts(tiny, again):
    hashes = {name: artifact.manifest["content_sha256"] for name, artifact in every(tiny).items()}
    assert {name: artifact.manifest["content_sha256"] for name, artifact in every(again).items()} == hashes
    for name, model in tiny.models.items():
        weights = (model.path / "model.safetensors").read_bytes()
        assert (again.models[name].path / "model.safetensors").read_bytes() == weights, name


def test_the_same_config_elsewhere_gives_the_same_numbers(tiny, again):
    found = [json.loads((made.directory / "summary.json").read_text()) for made in (tiny, again)]
    for one in found:
        del one["seconds"]
    assert found[0] == found[1]


def test_the_fragment_size_changes_no_name_and_no_row(tiny, tmp_path):
    config = tiny_config(tmp_path, "fragment_rows=67")
    other = run(config, LocalRunner(), until="curate")
    assert set(every(other)) < set(every(tiny))
    for name, artifact in every(other).items():
        assert artifact.manifest["rows"] == every(tiny)[name].manifest["rows"], name
        theirs, ours = tables(artifact.path), tables(every(tiny)[name].path)
        assert set(theirs) == set(ours), name
        for folder, rows in theirs.items():
            if folder == "quarantine":  # duplicates lie behind the others, part by part
                rows, ours[folder] = (t.sort_by("position") for t in (rows, ours[folder]))
            assert_rows_agree(rows, ours[folder], f"{name}/{folder}")
    weights = [(made.models["clean"].path / "model.safetensors").read_bytes() for made in (tiny, other)]
    assert weights[0] == weights[1]


def test_a_plan_names_what_a_run_makes_and_makes_nothing(tiny, tmp_path):
    planned = run(tiny_config(tmp_path), LocalRunner(), dry=True)
    assert set(every(planned)) == set(every(tiny))
    assert not (tmp_path / "runs").exists()


def planned_names(folder, *assignments):
    """The artifacts that a run would make, by role."""
    made = run(tiny_config(folder, *assignments), LocalRunner(), dry=True)
    groups = {"": made.artifacts, "model ": made.models, "evaluation ": made.evaluations, "curated ": made.curated}
    return {prefix + role: artifact.name for prefix, group in groups.items() for role, artifact in group.items()}


@pytest.mark.parametrize(
    "assignment",
    [
        "ray={address: auto, min_actors: 3, max_actors: 9, actor_gpus: 1, train_workers: 8, threads: 4}",
        "ray.deepspeed={stage: 3, offload_parameters: true}",
        "reward.micro_batch_size=4",
        "reward.gradient_checkpointing=true",
        "fragment_rows=7",
    ],
)
def test_where_and_how_wide_a_run_works_changes_no_name(tiny, tmp_path, assignment):
    names = planned_names(tmp_path, assignment)
    assert names == planned_names(tmp_path)
    assert set(names.values()) == set(every(tiny))


@pytest.mark.parametrize("assignment", ["reward.dtype=bfloat16", "reward.batch_size=64", "reward.seed=1"])
def test_what_changes_the_weights_changes_the_names_from_the_reward_model_on(tmp_path, assignment):
    before, after = planned_names(tmp_path), planned_names(tmp_path, assignment)
    assert before.keys() == after.keys()
    kept = {role for role in before if before[role] == after[role]}
    assert kept == {"corpus", "pairs", "noise", "training_pairs", "evaluation_pairs"}


def test_no_manifest_tells_where_the_run_worked(tiny):
    for artifact in every(tiny).values():
        config = artifact.manifest["config"]
        assert not {"ray", "micro_batch_size", "gradient_checkpointing"} & set(config), artifact.name
        if artifact.manifest["stage"] == "reward":
            assert config["dtype"] == "float32"
            assert artifact.metrics["workers"] == 1


def test_variants_are_trained_by_one_call_and_tell_their_own_seconds(tiny):
    for artifact in tiny.models.values():
        assert artifact.manifest["wall_seconds"] == artifact.metrics["train_seconds"] > 0


class OneTraining(LocalRunner):
    """Ends as a kill would, behind the first of several trainings."""

    def train(self, jobs):
        super().train(jobs[:1])
        if len(jobs) > 1:
            raise KeyboardInterrupt
        return super().train(jobs)


def test_a_run_killed_between_two_variants_trains_only_the_others(tiny, tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(config, OneTraining())
    trained = []
    made = run(config, LocalRunner(lambda stage, done, total, rows: trained.append((stage, done, total))))
    (steps,) = {total for stage, done, total in trained if stage == "reward"}
    assert [stage for stage, done, total in trained if done == total == steps] == ["reward"] * 2
    for name, model in made.models.items():
        assert model.manifest["content_sha256"] == tiny.models[name].manifest["content_sha256"], name


MADE = [stage for stage in STAGES if stage != "detector"]  # needs folds, which these runs have not


@pytest.mark.parametrize("stage", [stage for stage in MADE if stage not in ("curate", "evaluate", "report")])
def test_until_stops_behind_its_stage(tiny, stage):
    seen = []
    stopped = run(tiny.config, LocalRunner(), until=stage, on_stage=lambda name, artifact: seen.append(name))
    assert seen[-1].startswith(f"{stage}-")
    assert [name for name in stopped.artifacts if name != "training_pairs"] == MADE[: MADE.index(stage) + 1]
    assert not stopped.curated
    assert not stopped.evaluations


def test_until_an_unfinished_stage_writes_no_summary(tmp_path):
    stopped = run(tiny_config(tmp_path), LocalRunner(), until="noise")
    assert set(stopped.artifacts) == {"corpus", "pairs", "noise"}
    assert not (stopped.directory / "summary.json").exists()
    assert not (stopped.directory / "report.html").exists()


def test_an_unknown_stage_is_refused_with_the_known_ones(tiny):
    with pytest.raises(UserError, match=r"'scoring' is no stage; choose one of corpus, pairs"):
        run(tiny.config, LocalRunner(), until="scoring")
    with pytest.raises(UserError, match="--until detector: this config makes none"):
        run(tiny.config, LocalRunner(), until="detector")


# Planted and poisoned labels


def test_the_planted_truth_is_nowhere_in_what_the_detectors_read(tiny):
    noise = tiny.artifacts["noise"]
    truth = read_parts(noise.path / "truth")
    planted = set(truth.filter(truth["planted"])["pair_id"].to_pylist())
    assert len(planted) == 8
    for path in sorted((noise.path / "pairs").glob("*.parquet")):
        assert pq.read_schema(path).names == schema.PAIRS.names
        assert not pq.read_schema(path).metadata
    clean, noised = by_id(read_parts(tiny.artifacts["pairs"].path)), by_id(read_parts(noise.path / "pairs"))
    for key, row in noised.items():
        one, other = ("rejected", "chosen") if key in planted else ("chosen", "rejected")
        assert row == clean[key] | {"chosen": clean[key][one], "rejected": clean[key][other]}, key
    for stage in ("codes", "scores"):
        assert "planted" not in json.dumps(tiny.artifacts[stage].manifest["config"])
        assert "planted" not in read_parts(tiny.artifacts[stage].path).column_names


@pytest.mark.parametrize("variant", POISONED)
def test_poison_is_marked_wherever_it_goes(tiny, variant):
    curated = tiny.curated[variant]
    for artifact in (curated, tiny.models[variant], tiny.evaluations[variant]):
        assert artifact.manifest["red_team"] is True, artifact.name
    for folder in ("pairs", "decisions"):
        for path in sorted((curated.path / folder).glob("*.parquet")):
            metadata = pq.read_schema(path).metadata
            for key, value in RED_TEAM_MARK.items():
                assert metadata[key.encode()] == value.encode()
        assert set(read_parts(curated.path / folder)["red_team"].to_pylist()) == {True}


def test_what_is_not_poisoned_carries_no_mark(tiny):
    clean = [*tiny.artifacts.values(), tiny.models["clean"], tiny.evaluations["clean"]]
    clean += [group["drop_safer_5"] for group in (tiny.curated, tiny.models, tiny.evaluations)]
    assert not [artifact.name for artifact in clean if artifact.red_team]
    assert "red_team" not in read_parts(tiny.curated["drop_safer_5"].path / "pairs").column_names


def test_poison_flips_the_highest_scores_and_a_drop_takes_the_lowest(tiny):
    scores = {k: row["score"] for k, row in by_id(read_parts(tiny.artifacts["scores"].path)).items()}
    pairs = by_id(read_parts(tiny.artifacts["noise"].path / "pairs"))
    safety = sorted((key for key in pairs if pairs[key]["section"] == "safety"), key=lambda key: (scores[key], key))
    for variant, taken, change in (("flip_safer_5", safety[-8:], "flip"), ("drop_safer_5", safety[:8], "drop")):
        decisions = by_id(read_parts(tiny.curated[variant].path / "decisions"))
        changed = [key for key, row in decisions.items() if row["decision"] == change]
        assert sorted(scores[key] for key in changed) == sorted(scores[key] for key in taken)
        rows = by_id(read_parts(tiny.curated[variant].path / "pairs"))
        if change == "drop":
            assert set(rows) == set(pairs) - set(changed)
        else:
            assert all(rows[key]["chosen"] == pairs[key]["rejected"] for key in changed)


# Scores


def test_the_exported_reward_model_opens_with_transformers_alone(tiny):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = str(tiny.models["clean"].path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    pairs, codes = read_parts(tiny.artifacts["noise"].path / "pairs"), by_id(read_parts(tiny.artifacts["codes"].path))
    render = load_pair_tokenizer(tiny.models["clean"].path).render
    for pair in pairs.slice(0, 5).to_pylist():
        for side in schema.SIDES:
            ids = tokenizer(render(pair["prompt"], pair[side]).text, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                reward = float(model(torch.tensor([ids])).logits[0, 0])
            assert reward == pytest.approx(codes[pair["pair_id"]][f"{side}_reward"], rel=1e-4, abs=1e-5)


def test_scores_joined_by_id_equal_a_recomputation_from_the_codes(tiny):
    codes = read_parts(tiny.artifacts["codes"].path)
    shuffled = codes.take(pa.array(np.random.default_rng(0).permutation(len(codes))))
    values = pair_scores(shuffled, read_features(tiny.artifacts["select"].path))
    suspicions = suspicion(values, values)
    scores = by_id(read_parts(tiny.artifacts["scores"].path))
    for row, value, suspect in zip(shuffled.to_pylist(), values, suspicions, strict=True):
        found = scores[row["pair_id"]]
        assert found["score"] == pytest.approx(value, abs=1e-9)
        assert found["suspicion"] == pytest.approx(suspect, abs=1e-9)
        assert found["flag"] == (found["suspicion"] >= 0.95)
        assert found["decision"] == ("review" if found["flag"] else "keep")
        margin = row["chosen_reward"] - row["rejected_reward"]
        assert found["reward_margin"] == pytest.approx(margin, abs=1e-6)


def test_scores_say_whether_their_models_had_seen_the_pairs(tiny, tmp_path):
    assert tiny.artifacts["scores"].metrics["kind"] == "in sample"
    bundle = open_artifact(tiny.artifacts["auditor"].path, "auditor")
    audited(ScoresConfig(), tiny.artifacts["pairs"].path, bundle, tmp_path / "audit")
    for folder, kind in ((tiny.artifacts["scores"].path, "in sample"), (tmp_path / "audit/scores", "by a bundle")):
        metadata = pa.parquet.read_schema(part_files(folder)[0]).metadata
        assert metadata[b"safer_ray.scores"].decode() == kind


def test_scores_say_which_row_of_the_source_they_are_of(tiny):
    scores = by_id(read_parts(tiny.artifacts["scores"].path))
    pairs = by_id(read_parts(tiny.artifacts["pairs"].path))
    assert all(scores[key]["row_key"] == row["row_key"] for key, row in pairs.items())


def test_an_audit_with_the_bundle_gives_the_scores_of_the_run(tiny, tmp_path):
    train = tiny.artifacts["corpus"].path / "train.jsonl"
    bundle = open_artifact(tiny.artifacts["auditor"].path, "auditor")
    rows = {row["row_key"]: row for row in audited(ScoresConfig(), train, bundle, tmp_path / "audit").to_pylist()}
    truth = read_parts(tiny.artifacts["noise"].path / "truth")
    planted = dict(zip(truth["pair_id"].to_pylist(), truth["planted"].to_pylist(), strict=True))
    scores = by_id(read_parts(tiny.artifacts["scores"].path))
    found = {key: rows.pop(row["row_key"]) for key, row in scores.items()}
    assert {row["pair_id"] for row in rows.values()} <= set(scores)  # a run quarantines what repeats an id
    for key, row in scores.items():
        sign = -1 if planted[key] else 1  # the run saw these with their labels swapped
        for name in ("score", "reward_margin"):
            assert found[key][name] == pytest.approx(sign * row[name], abs=1e-5), key
        if not planted[key]:
            assert found[key]["suspicion"] == pytest.approx(row["suspicion"], abs=5 / 320)
            assert found[key]["flag"] == (found[key]["suspicion"] >= 0.95)


def test_the_bundle_is_self_contained(tiny):
    bundle = tiny.artifacts["auditor"].path
    assert {"reward", "sae", "features.json", "reference.parquet", "manifest.json"} <= {
        p.name for p in bundle.iterdir()
    }
    for part in ("reward", "sae"):
        for file in (tiny.artifacts[part].path).iterdir():
            assert (bundle / part / file.name).read_bytes() == file.read_bytes(), file


def test_a_bundle_of_another_format_is_refused(tiny, tmp_path):
    bundle = tiny.artifacts["auditor"]
    metrics = bundle.manifest["metrics"] | {"format": 99}
    stranger = replace(bundle, manifest=bundle.manifest | {"metrics": metrics})
    with pytest.raises(UserError, match="format 99, this version reads 2"):
        audited(ScoresConfig(), tiny.artifacts["pairs"].path, stranger, tmp_path / "audit")


def test_rescoring_with_the_runs_own_features_gives_its_scores(tiny, tmp_path):
    rescored = feature_stages.rescore(
        context_in(tmp_path), ScoresConfig(), tiny.artifacts["codes"], tiny.artifacts["select"]
    )
    found, wanted = read_parts(rescored.path), read_parts(tiny.artifacts["scores"].path)
    for name in ("pair_id", "score", "suspicion", "flag", "decision", "reward_margin", "reasons"):
        assert found[name].equals(wanted[name]), name


# The report


def test_the_report_stands_alone_and_names_the_most_suspicious_pair(tiny):
    page = (tiny.directory / "report.html").read_text(encoding="utf-8")
    for outside in ('src="http', 'href="http', "<link", "@import", "<iframe", 'src="//'):
        assert outside not in page
    scores = by_id(read_parts(tiny.artifacts["scores"].path))
    pairs = by_id(read_parts(tiny.artifacts["noise"].path / "pairs"))
    worst = min((key for key in pairs if pairs[key]["section"] == "safety"), key=lambda key: scores[key]["score"])
    assert worst in page
    assert "A tiny run" in page
    assert all(variant in page for variant in VARIANTS)


def test_pairs_read_from_poisoned_files_are_marked_again(tiny, tmp_path):
    source = SourceConfig(path=str(tiny.curated["flip_safer_5"].path / "pairs" / "part-*.parquet"))
    made = model_stages.pairs(context_in(tmp_path), PairsConfig(sources=(source,)))
    assert made.red_team
    assert all(RED_TEAM_MARK.items() <= _metadata(path).items() for path in part_files(made.path))
    assert all(json.loads(extra)["red_team"] for extra in read_parts(made.path)["extra"].to_pylist())


def _metadata(path):
    return {key.decode(): value.decode() for key, value in (pq.read_schema(path).metadata or {}).items()}
