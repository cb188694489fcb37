"""A run's numbers in one JSON file, and the view of it that the report renders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from safer_ray import schema
from safer_ray.config.sections import RunConfig, StrategyName
from safer_ray.config.where import where_mask
from safer_ray.data.curation import JOINED, have_scores, join_scores
from safer_ray.detection.evaluation import Detection, PairedTest, detection, on_the_same, paired_tests
from safer_ray.detection.grouped import holm
from safer_ray.pipeline.stage import pairs_of
from safer_ray.report import run_report as report
from safer_ray.reward.sentences import SideSentences
from safer_ray.storage.artifacts import Artifact, read_parts
from safer_ray.storage.files import write_json, write_text
from safer_ray.storage.marks import together

DETECTORS: tuple[StrategyName, ...] = ("safer", "reward_margin", "random", "length")
SAE_METRICS = ("nmse", "explained_variance", "l0", "dead_share")


class Compared(NamedTuple):
    """One of a run's tests: a model against another on one section."""

    model: str
    rival: str
    section: str
    test: PairedTest
    p_holm: float  # its p by Holm over all tests of the run

    def to_tree(self) -> dict[str, float]:
        """Return the test as the summary has it."""
        return {**self.test._asdict(), "p_holm": self.p_holm}


@dataclass(frozen=True)
class RunView:
    """The complete artifacts of a run."""

    config: RunConfig
    artifacts: dict[str, Artifact]
    models: dict[str, Artifact]
    evaluations: dict[str, Artifact]
    curated: dict[str, Artifact]

    def rows(self) -> pa.Table:
        """Training pairs joined with their scores; without those that a model quarantined."""
        pairs = read_parts(pairs_of(self.artifacts["training_pairs"]))
        scores = read_parts(self.artifacts["scores"].path, ["pair_id", *JOINED])
        scored = have_scores(pairs, scores, self.config.pairs.max_refused_share)
        return join_scores(pairs.filter(pa.array(scored)), scores)

    def truncated(self) -> float:
        """Return the share of the scored pairs of which a side is longer than the model reads, and was cut."""
        cut = schema.truncated(read_parts(self.artifacts["scores"].path, list(schema.TRUNCATED)))
        return float(cut.mean()) if len(cut) else 0.0

    def planted(self, rows: pa.Table) -> np.ndarray | None:
        """Per row whether its label was swapped on purpose; None where nothing was planted."""
        noise = self.artifacts.get("noise")
        if noise is None:
            return None
        truth = read_parts(noise.path / "truth")
        known = dict(zip(truth["pair_id"].to_pylist(), truth["planted"].to_pylist(), strict=True))
        return np.array([known[key] for key in rows["pair_id"].to_pylist()], dtype=bool)

    def detections(self, rows: pa.Table) -> dict[str, Detection]:
        """Return how well each strategy finds planted swaps, among the pairs that could have been swapped."""
        planted = self.planted(rows)
        if planted is None or not planted.any():
            return {}
        assert self.config.noise is not None
        mask = where_mask(rows, self.config.noise.where)
        eligible = rows.filter(pa.array(mask))
        more: tuple[StrategyName, ...] = ("suspicion",) if self.config.scores.detector == "combined" else ()
        return {name: detection(eligible, planted[mask], name, self.config.noise.seed) for name in DETECTORS + more}

    def compared(self) -> list[Compared]:
        """Return the tests of every model against the base, and of each `safer` variant against the random one of the
        same action and share, by section."""
        base = self.config.evaluate.base
        # Without the base a finished model stands alone, or nothing is measured.
        others = [name for name in self.evaluations if name != base] if base in self.evaluations else []
        named = [(name, base) for name in others] + self._flips_against_random()
        columns = ["pair_id", "section", "group", "reward_margin"]
        rewards = {name: read_parts(artifact.path, columns) for name, artifact in self.evaluations.items()}
        found = [
            (model, rival, section, test)
            for model, rival in named
            for section, test in paired_tests(*on_the_same(rewards[model], rewards[rival])).items()
        ]
        adjusted = holm([test.p for *_, test in found])
        return [Compared(*each, p_holm) for each, p_holm in zip(found, adjusted, strict=True)]

    def _flips_against_random(self) -> list[tuple[str, str]]:
        """Return the names of each `safer` variant and of the random one of the same action and share."""
        found = []
        for name, config in self.config.curate.items():
            twin = config.model_copy(update={"strategy": "random"})
            rival = next((n for n, c in self.config.curate.items() if c == twin), None)
            if config.strategy == "safer" and rival is not None:
                found.append((name, rival))
        return found

    def seconds(self) -> dict[str, float]:
        """Wall time of each stage when it was made; stages that ran for several models are summed."""
        totals: dict[str, float] = {}
        unique = {a.name: a for a in self.every().values()}
        for artifact in unique.values():
            stage = artifact.manifest["stage"]
            totals[stage] = round(totals.get(stage, 0.0) + artifact.manifest["wall_seconds"], 3)
        return totals

    def every(self) -> dict[str, Artifact]:
        named = {**self.artifacts}
        for kind, group in (("curate", self.curated), ("reward", self.models), ("evaluate", self.evaluations)):
            named |= {f"{kind} {name}": artifact for name, artifact in group.items()}
        return named


def summarise(view: RunView) -> dict[str, Any]:
    """The numbers of a run: accuracies and shares in [0, 1], AUROC with 0.5 at chance, seconds by stage."""
    made = view.artifacts
    rows = view.rows()
    found = view.detections(rows)
    planted = view.planted(rows)
    selected = json.loads((made["select"].path / "features.json").read_text(encoding="utf-8"))
    sections = {name: a.metrics["sections"] for name, a in view.evaluations.items()}
    tests: dict[str, dict[str, dict[str, float]]] = {}
    for one in view.compared():
        tests.setdefault(f"{one.model} vs {one.rival}", {})[one.section] = one.to_tree()
    return {
        "pairs": made["pairs"].manifest["rows"]["pairs"],
        "quarantined": made["pairs"].manifest["rows"]["quarantined"],
        "truncated": view.truncated(),
        "reward": _reward(view, rows),
        "sae": {name: made["sae"].metrics[name] for name in SAE_METRICS},
        "selected_features": {"safe": len(selected["safe"]), "unsafe": len(selected["unsafe"])},
        "detection": {
            "planted": int(planted.sum()) if planted is not None else 0,
            "auroc": {name: d.auroc for name, d in found.items()},
            "precision_at_planted": {name: d.precision_at_planted for name, d in found.items()},
        },
        "sections": {name: {s: a["accuracy"] for s, a in values.items()} for name, values in sections.items()},
        "tests": tests,
        "seconds": view.seconds(),
        "artifacts": {name: artifact.name for name, artifact in view.every().items()},
        "licences": list(together(*(artifact.marks for artifact in view.every().values())).licence),
        "red_team": [name for name, artifact in view.every().items() if artifact.red_team],
    }


def _reward(view: RunView, rows: pa.Table) -> dict[str, float]:
    """Return the accuracy on held-out pairs of a model that was trained here; of a finished one, the share of the pairs
    whose label it agrees with."""
    metrics = view.artifacts["reward"].metrics
    if "validation_accuracy" in metrics:
        return {"accuracy": metrics["validation_accuracy"]}
    margins = rows["reward_margin"].to_numpy()
    return {"agreement": float((margins > 0).mean()) if len(margins) else 0.0}


def write_summary(view: RunView, path: Path) -> None:
    write_json(summarise(view), path)


def conclusions(summary: dict[str, Any], base: str) -> list[str]:
    """Return what the numbers say, in plain sentences."""
    said = []
    auroc = summary["detection"]["auroc"]
    if auroc:
        best = max(auroc, key=lambda name: auroc[name])
        said.append(
            f"Of {summary['detection']['planted']} planted label swaps, safer ranks a swapped pair below a clean one "
            f"with AUROC {auroc['safer']:.3f}; the best strategy here is {best} with {auroc[best]:.3f}."
        )
    number = sum(len(by_section) for by_section in summary["tests"].values())
    for name in summary["sections"]:
        for section, test in summary["tests"].get(f"{name} vs {base}", {}).items():
            points = "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * test[key] for key in ("change", "low", "high")))
            sure = f"p = {test['p_holm']:.2g} by sign flips of prompts, Holm over the run's {number} tests"
            verdict = "a change beyond chance" if test["p_holm"] < 0.05 else "within chance"
            said.append(f"{name} moves {section} by {points} ({sure}; {verdict}).")
    return said


def write_report(view: RunView, path: Path) -> None:
    """The HTML page of a run."""
    write_text(report.render_report(report_data(view)), path)


def report_data(view: RunView) -> report.ReportData:
    """Everything the page shows."""
    made, config = view.artifacts, view.config
    summary = summarise(view)
    rows = view.rows()
    salience = read_parts(made["salience"].path)
    order = np.argsort(salience["feature"].to_numpy())
    return report.ReportData(
        title=config.report.title,
        run=config.name,
        mode=config.salience.mode,
        rating=config.select.rating,
        detector=config.scores.detector,
        facts=_facts(view),
        conclusions=tuple(conclusions(summary, config.evaluate.base)),
        stages=tuple(_stage_views(view)),
        quarantine=made["pairs"].metrics["reasons"],
        reward={k: v for k, v in made["reward"].metrics.items() if isinstance(v, int | float)} | summary["reward"],
        reward_history=tuple(made["reward"].metrics.get("history", ())),
        sae=_sae_figures(made["sae"].metrics),
        sae_history=tuple(made["sae"].metrics["history"]),
        salience=salience["salience"].to_numpy()[order],
        features=tuple(_feature_cards(view, salience)),
        scores=rows["score"].to_numpy(),
        planted=view.planted(rows),
        pairs=tuple(_pair_views(view, rows)),
        detection=tuple(report.DetectionView(n, *d) for n, d in view.detections(rows).items()),
        sections=tuple(_section_views(view)),
        tests=tuple(_test_views(view)),
        red_team=tuple(name for name, artifact in view.models.items() if artifact.red_team),
        licences=tuple(summary["licences"]),
        sae_density=(made["sae"].metrics["density"]["counts"], made["sae"].metrics["density"]["edges"]),
        sae_spliced=made["sae"].metrics.get("spliced", {}),
    )


def _sae_figures(metrics: dict[str, Any]) -> dict[str, float]:
    """Single numbers about the autoencoder and its training."""
    known = {name: value for name, value in metrics.items() if not isinstance(value, dict | list)}
    return known | {"clustered_share": metrics["clusters"]["share"]}


def _facts(view: RunView) -> tuple[tuple[str, str], ...]:
    config = view.config
    base = config.reward.use or config.reward.base
    kept = f", its first {config.reward.blocks} blocks" if config.reward.blocks else ""
    first = f", first trained on {config.sae.warm_start.text}" if config.sae.warm_start else ""
    return (
        (
            "Reward model",
            f"{base}{kept}" if isinstance(base, str) else f"tiny Llama, {base.layers} layers of {base.hidden}",
        ),
        ("Layer read", str(config.activations.layer)),
        ("Autoencoder", f"{config.sae.variant.title}, {config.sae.latents:,} latents, k {config.sae.k}{first}"),
        ("Judge", f"concept probe {config.judge.exchanges}"),
        ("Suspected by", config.scores.detector),
        ("Scores are", _kind(view)),
        ("Pairs cut to what the model reads", f"{view.truncated():.1%}"),
    )


def _kind(view: RunView) -> str:
    """Return whether the models that scored the pairs had seen them."""
    facts = view.artifacts["scores"].metrics
    if "folds" not in facts and view.config.reward.use is not None:
        return "of a finished model; the features were chosen by these pairs, but for those that are held out"
    if "folds" not in facts:
        return "in sample: model and features were fitted on the pairs that they score"
    shared = " (the autoencoder is shared: it reads the frozen trunk and no label)" if facts["shared_sae"] else ""
    return f"out of fold: by models and features fitted on other prompts, {facts['folds']} folds{shared}"


def _stage_views(view: RunView) -> list[report.StageView]:
    stages = []
    for name, artifact in view.every().items():
        if name in ("training_pairs", "reward clean"):
            continue
        rows = artifact.manifest["rows"]
        count = rows.get("pairs", rows.get("written", sum(rows.values())))
        stages.append(report.StageView(name, count, artifact.manifest["wall_seconds"]))
    return stages


def _feature_cards(view: RunView, salience: pa.Table) -> list[report.FeatureCard]:
    made = view.artifacts
    selected = json.loads((made["select"].path / "features.json").read_text(encoding="utf-8"))
    signs = {**dict.fromkeys(selected["safe"], 1), **dict.fromkeys(selected["unsafe"], -1)}
    verdicts = {row["feature"]: row for row in read_parts(made["verdicts"].path).to_pylist()}
    contexts: dict[int, list[report.Context]] = {}
    for row in read_parts(made["contexts"].path).to_pylist():
        names = ("before", "sentence", "after", "value", "side", "pair_id")
        contexts.setdefault(row["feature"], []).append(report.Context(*(row[name] for name in names)))
    ranked = sorted(
        salience.slice(0, view.config.select.candidates).to_pylist(), key=lambda r: r["feature"] not in signs
    )
    return [
        report.FeatureCard(
            feature=row["feature"],
            salience=row["salience"],
            sign=signs.get(row["feature"], 0),
            rating=verdicts[row["feature"]]["rating"],
            reason=verdicts[row["feature"]]["reason"],
            n_chosen=row["n_chosen"],
            n_rejected=row["n_rejected"],
            contexts=tuple(contexts.get(row["feature"], ())),
        )
        for row in ranked[: view.config.report.features]
        if row["feature"] in verdicts
    ]


def _pair_views(view: RunView, rows: pa.Table) -> list[report.PairView]:
    """The most suspicious pairs of the sections that curation or planting looks at, worst first."""
    noise = view.config.noise
    where = noise.where if noise else next((c.where for c in view.config.curate.values()), None)
    shown = rows.filter(pa.array(where_mask(rows, where)))
    worst = shown.take(pa.array(np.argsort(shown["score"].to_numpy(), kind="stable")[: view.config.report.pairs]))
    scores = read_parts(view.artifacts["scores"].path)
    by_id = {key: i for i, key in enumerate(scores["pair_id"].to_pylist())}
    from safer_ray.reward.checkpoints import load_pair_tokenizer  # here, since it imports torch

    tokenizer = load_pair_tokenizer(view.artifacts["reward"].path, view.config.reading)
    planted = view.planted(worst)
    views = []
    for number, pair in enumerate(worst.to_pylist()):
        found = scores.slice(by_id[pair["pair_id"]], 1).to_pylist()[0]
        sentences = {side: SideSentences(tokenizer, pair, side) for side in ("chosen", "rejected")}
        views.append(
            report.PairView(
                pair_id=pair["pair_id"],
                section=pair["section"] or "",
                score=found["score"],
                suspicion=found["suspicion"],
                reward_margin=found["reward_margin"],
                prompt=tuple((m["role"], m["content"]) for m in pair["prompt"]),
                chosen=tuple((m["role"], m["content"]) for m in pair["chosen"]),
                rejected=tuple((m["role"], m["content"]) for m in pair["rejected"]),
                reasons=tuple(_reason_view(reason, sentences[reason["side"]]) for reason in found["reasons"]),
                planted=None if planted is None else bool(planted[number]),
            )
        )
    return views


def _reason_view(reason: dict[str, Any], sentences: SideSentences) -> report.ReasonView:
    sentence = sentences.ending_at(reason["end"])
    place = None if sentence is None else report.SentencePlace(*sentence)
    return report.ReasonView(reason["feature"], reason["sign"], reason["contribution"], reason["side"], place)


def _section_views(view: RunView) -> list[report.SectionView]:
    return [
        report.SectionView(model, section, a["n"], a["accuracy"], a["low"], a["high"])
        for model, artifact in view.evaluations.items()
        for section, a in artifact.metrics["sections"].items()
    ]


def _test_views(view: RunView) -> list[report.TestView]:
    return [
        report.TestView(
            model,
            rival,
            section,
            *(test.gained, test.lost, test.change, test.low, test.high),
            *(test.differ, test.groups, test.p, p_holm),
        )
        for model, rival, section, test, p_holm in view.compared()
    ]
