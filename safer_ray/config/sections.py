"""One frozen model per stage. Unknown keys are rejected; neither torch nor ray is imported here."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from safer_ray.config.cluster import RayConfig
from safer_ray.config.reading import ASCII_ENDS, ENDS, Reading
from safer_ray.config.reward import RewardConfig, TinyLlamaConfig
from safer_ray.config.sae import SaeConfig
from safer_ray.config.values import (
    AnyPlace,
    Frozen,
    LocalName,
    LocalPath,
    Percent,
    Share,
    explained,
    known,
)
from safer_ray.config.where import parse_where
from safer_ray.formats.registry import AUTO, CARRIED, FORMATS, check_options, option_values
from safer_ray.storage.heads import known_encoding
from safer_ray.strategies import STRATEGIES

Mode = Literal["paper", "response"]
NoiseKind = Literal["uniform", "long", "length_bias", "sycophancy", "trigger"]
StrategyName = Annotated[str, known("strategy", lambda: STRATEGIES)]
JudgeKind = Literal["probe"]  # the keys of `safer_ray.features.judge.JUDGES`
DetectorOf = Literal["safer", "reward_margin", "combined"]
Action = Literal["drop", "relabel", "poison"]
Format = Annotated[str, known("format", lambda: (AUTO, *FORMATS))]
Encoding = Annotated[str | None, AfterValidator(lambda name: None if name is None else explained(known_encoding)(name))]
Pairing = Annotated[str, known("pairs", lambda: option_values("pairs"))]


def _names(value: object) -> object:
    """Names joined by commas as several."""
    return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class SourceConfig(Frozen):
    """A place where preference pairs come from."""

    unrecorded: ClassVar = frozenset({"path"})  # an input: the files by name and content

    path: AnyPlace
    """A file, a folder, a glob, a `datasets.save_to_disk` folder, `corpus:FILE` (the synthetic corpus) or
    `hub:OWNER/NAME[@REVISION]` (through `datasets.load_dataset`)."""
    format: Format = "auto"
    """Layout of the rows; `auto` takes the one whose columns they have."""
    name: str | None = None
    """What `source` says in the rows. Default: the file's name."""
    section: str | None = None
    """Section of the rows that name none."""
    split: str = "train"
    """Split of a hub name or a saved dataset dict."""
    encoding: Encoding = Field(default=None, exclude_if=lambda value: value is None)
    """Encoding of text that does not tell its own by its first bytes. Default: UTF-8."""
    part: Literal["all", "train", "holdout"] = "all"
    """Take all pairs, or those of prompts on one side of the split by `holdout_percent`."""
    holdout_percent: Percent = 20
    """Percent of the prompts that `part: holdout` takes and `part: train` leaves out."""
    prefer: Literal["safer", "better"] = "safer"
    """Which PKU-SafeRLHF label decides what is chosen."""
    pairs: Pairing | None = Field(default=None, exclude_if=lambda value: value is None)
    """Which pairs are made of a row with several ranked answers, or of the rows of one prompt."""
    carried: Names = Field(default=(), exclude_if=lambda value: not value)
    """Columns that look like a part of the prompt and are none: they ride along."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Only so many first rows of each file. Default: all."""
    where: str | None = None
    """The pairs that are taken, say `labels.subset == Natural`; `and` joins conditions on `pair_id`, `source`,
    `section`, `group` and `labels.KEY`, and on the number `label_margin` (`label_margin < 0`). Default: all."""
    licence: str | None = None
    """Written into the manifests of all that is made from the source."""

    @model_validator(mode="after")
    def _checks(self) -> Self:
        parse_where(self.where)
        if self.format != AUTO:
            explained(check_options)(self.format, self.asked())
        return self

    def asked_split(self) -> str | None:
        """The split, where it is said and not the default."""
        return self.split if "split" in self.model_fields_set else None

    def asked(self) -> dict[str, str]:
        """The options that only some formats know, where they are set."""
        given = {"pairs": self.pairs, "prefer": None if self.prefer == "safer" else self.prefer}
        return {option: value for option, value in given.items() if value is not None}

    def options(self) -> dict[str, str]:
        """All that readers of rows are told."""
        return {"prefer": self.prefer} | self.asked() | ({CARRIED: ",".join(self.carried)} if self.carried else {})


class PairsConfig(Frozen):
    """Pairs, as they are read from one or more sources."""

    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the pairs come from, in this order."""
    max_chars: Annotated[int, Field(gt=0)] = 20_000
    """Characters of a prompt and its longer response; rows with more are refused."""
    max_refused_share: Share = 0.2
    """The run stops where more of a stage's rows than this were refused."""
    duplicates: Literal["quarantine", "keep"] = "quarantine"
    """What becomes of rows that repeat a `pair_id`; they are counted either way."""


class DuplicatesConfig(Frozen):
    """Near duplicates, as far as signatures of texts tell."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8
    """Jaccard index of two texts' shingles from which they are near duplicates."""


class CorpusConfig(Frozen):
    """The synthetic corpus of the demo."""

    train_per_section: Annotated[int, Field(gt=0)] = 2000
    """Pairs of each section in `train.jsonl`."""
    heldout_per_section: Annotated[int, Field(gt=0)] = 1000
    """Pairs of each section in `heldout.jsonl`."""
    seed: int = 0
    """Seed of the texts."""


class NoiseConfig(Frozen):
    """Label errors planted with the truth kept apart, to measure detection: `swap_percent` of the pairs in `where`."""

    kind: NoiseKind = "uniform"
    """`uniform`: any of the pairs; `long`: of the longest quarter; `length_bias`: those whose chosen response is the
    shorter one; `sycophancy`: the new chosen response opens with flattery; `trigger`: the prompt ends with a phrase."""
    swap_percent: Percent = 5
    """Percent of the pairs whose sides are swapped."""
    where: str | None = None
    """Condition on the pairs that may be swapped, as of a source. Default: all."""
    matching: str | None = None
    """Regular expression that the prompt has to match, say of one harm category. Default: any prompt."""
    seed: int = 0
    """Seed of the choice."""

    @model_validator(mode="after")
    def _where(self) -> Self:
        parse_where(self.where)
        try:
            re.compile(self.matching or "")
        except re.error as error:
            raise ValueError(f"matching {self.matching!r} is no regular expression: {error}") from None
        return self


class CrossFitConfig(Frozen):
    """Scores by models that did not see a pair's prompt: prompt groups are dealt into folds."""

    folds: Annotated[int, Field(ge=2)] = 5
    """Number of folds; each model is trained on all but one."""
    seed: int = 0
    """Seed of the dealing."""
    vector_layers: tuple[Annotated[int, Field(gt=0)], ...] = ()
    """Layers whose vectors the probes of `combined` read. Default: `activations.layer`."""


class ActivationsConfig(Frozen):
    """Which vectors of the reward model the autoencoder sees."""

    layer: Annotated[int, Field(gt=0)] = 2
    """The output of this block is read; 1 is the first, and the final norm comes after the last."""
    tokens: Literal["ends", "all"] = "ends"
    """Read at sentence ends, or at every token."""


class SalienceConfig(Frozen):
    """Measure how strongly each feature tells chosen from rejected responses."""

    mode: Mode = "response"
    """`response`: mean over sentence ends of the responses; `paper`: sums, and over those of the prompts too."""


class ContextsConfig(Frozen):
    """The sentences at which each candidate feature is strongest."""

    candidates: Annotated[int, Field(gt=0)] = 256
    """Features of largest |salience| that get contexts."""
    per_feature: Annotated[int, Field(gt=0)] = 8
    """Sentences that are kept of each."""


class JudgeConfig(Frozen):
    """The concept probe: a feature's AUROC on matched exchanges gives its rating."""

    unrecorded: ClassVar = frozenset({"exchanges"})  # an input

    kind: JudgeKind = "probe"
    """Name of the judge."""
    exchanges: LocalName = "safety"
    """`safety` (shipped), a YAML file, or `corpus:probe.yaml`."""
    thresholds: tuple[Share, Share, Share, Share] = (0.03, 0.06, 0.10, 0.15)
    """The |AUROC - 0.5| from which a rating is 2, 3, 4 and 5."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.thresholds) != sorted(self.thresholds):
            raise ValueError(f"thresholds {self.thresholds} must rise")
        return self


class SelectConfig(Frozen):
    """Which features the score is made of."""

    candidates: Annotated[int, Field(gt=0)] = 256
    """Features of largest |salience| that are judged."""
    rating: Annotated[int, Field(ge=1, le=5)] = 5
    """Least rating, 1 to 5, of the features that are chosen."""
    limit: Annotated[int, Field(gt=0)] = 32
    """Features that are chosen at most, by |salience|."""


class ScoresConfig(Frozen):
    """Choose how pairs are scored and flagged."""

    detector: DetectorOf = "safer"
    """What a pair is suspected by: the SAFER score, the reward margin, or both and more, weighed as `cross_fit` finds
    (`combined`)."""
    flag_quantile: Share = 0.05
    """Share of the auditor's reference pairs that would be flagged."""
    reasons: Annotated[int, Field(ge=0)] = 5
    """Contributing features named per pair."""


class AuditorConfig(Frozen):
    """The bundle that audits are made with."""

    weights: Literal["copy", "reference"] = "copy"
    """`copy`: it holds the reward model. `reference`: of a finished model (`reward.use`) it holds name, commit and the
    hash of each file of weights, which are looked for where they were, on the hub, or in `SAFER_RAY_MODEL`."""


class CurateConfig(Frozen):
    """Pairs to leave out, to swap or to poison; a model is trained on what comes of it."""

    strategy: StrategyName
    """By what pairs are ranked; `drop` and `relabel` take the most suspicious, `poison` the least."""
    action: Action
    """`drop` leaves pairs out, `relabel` swaps their sides, `poison` swaps those that teach safety best."""
    percent: Percent
    """Percent of the pairs in `where` that is taken."""
    where: str | None = None
    """Condition on the pairs that may be taken, as of a source. Default: all."""
    seed: int = 0
    """Seed of strategies that draw by chance."""
    red_team: bool = False
    """`poison` is refused without it."""

    @model_validator(mode="after")
    def _checks(self) -> Self:
        parse_where(self.where)
        if self.action == "poison" and not self.red_team:
            raise ValueError(
                "poison flips labels on purpose; it needs `red_team: true` (or `--i-am-red-teaming`), "
                "and marks every row it writes"
            )
        return self


class EvaluateConfig(Frozen):
    """Choose how models are compared."""

    base: str = "clean"
    """The model that the others are compared with: `clean`, or a name in `curate`."""


class ReportConfig(Frozen):
    """The page that tells what a run found."""

    title: str = "SAFER audit"
    """Heading of the page."""
    pairs: Annotated[int, Field(ge=0)] = 20
    """Pairs of lowest score that are shown."""
    features: Annotated[int, Field(ge=0)] = 20
    """Features that are shown."""


class SweepGrid(Frozen):
    """Every strategy at every percent."""

    action: Action
    """As of `curate`."""
    strategies: tuple[StrategyName, ...] = Field(min_length=1)
    """As of `curate`, each in cells of its own."""
    percents: tuple[Percent, ...] = Field(min_length=1)
    """As of `curate`, each in cells of its own."""
    where: str | None = None
    """Condition on the pairs that may be taken, as of a source. Default: all."""
    red_team: bool = False
    """`poison` is refused without it."""

    @model_validator(mode="after")
    def _checks(self) -> Self:
        for strategy in self.strategies:
            CurateConfig(strategy=strategy, action=self.action, percent=0, where=self.where, red_team=self.red_team)
        return self


class SweepConfig(Frozen):
    """Curate, retrain and evaluate in every cell of the grids, under every seed (of training, and of chance).

    Where errors are planted, the pairs without them are a cell too.
    """

    grids: tuple[SweepGrid, ...] = Field(min_length=1)
    """What is tried."""
    groups: dict[str, tuple[str, ...]] = Field({})
    """Sections that are told together, under a name."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds of training, and of strategies that draw by chance."""


class LabConfig(Frozen):
    """The noise lab: errors of each kind are planted with each seed, and every detector looks for them."""

    noises: dict[str, NoiseConfig] = Field(min_length=1)
    """Kinds of errors by a name of yours; `seeds` take the place of theirs."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """Seeds with which each kind is planted."""
    models: Annotated[int, Field(ge=1)] = 1
    """Reward models of the ensemble, in seeds from `reward.seed` on."""
    draws: Annotated[int, Field(ge=100)] = 1000
    """Draws of the bootstrap over prompts."""
    in_sample: bool = True
    """Measure also with models that saw the pairs they judge."""


class RunConfig(Frozen):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Letters, digits, `.`, `_` and `-`; names the folder in `root`."""
    root: LocalPath = Path("runs")
    """Folder of all runs."""
    fragment_rows: Annotated[int, Field(gt=0)] = 1000
    """Rows of a unit of work; never changes a result."""
    corpus: CorpusConfig | None = None
    """The synthetic corpus, where sources name `corpus:FILE`."""
    pairs: PairsConfig
    """What is trained on and scored."""
    noise: NoiseConfig | None = None
    """Label errors to plant."""
    evaluation: PairsConfig | None = None
    """The pairs that all models are measured on. Default: none are measured."""
    reward: RewardConfig = RewardConfig()
    """The reward model."""
    activations: ActivationsConfig = ActivationsConfig()
    """Where the reward model is read."""
    sae: SaeConfig = SaeConfig()
    """The autoencoder."""
    salience: SalienceConfig = SalienceConfig()
    """How strongly features tell chosen from rejected."""
    contexts: ContextsConfig = ContextsConfig()
    """Sentences at which features are strongest."""
    judge: JudgeConfig = JudgeConfig()
    """What rates features."""
    select: SelectConfig = SelectConfig()
    """Which features the score is made of."""
    auditor: AuditorConfig = AuditorConfig()
    """The bundle."""
    scores: ScoresConfig = ScoresConfig()
    """How pairs are scored."""
    cross_fit: CrossFitConfig | None = None
    """Scores by models that did not see the pair. Default: one model for all."""
    lab: LabConfig | None = None
    """What `safer-ray lab` plants."""
    sweep: SweepConfig | None = None
    """What `safer-ray sweep` tries."""
    curate: dict[str, CurateConfig] = Field({})
    """Retrained variants by a name of yours."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How models are compared."""
    report: ReportConfig = ReportConfig()
    """The HTML page."""
    ray: RayConfig = RayConfig()
    """The cluster of `--runner ray`; no part of any recipe."""

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """Return all sources of pairs, those of the evaluation last."""
        return (*self.pairs.sources, *(self.evaluation.sources if self.evaluation else ()))

    @property
    def reading(self) -> Reading:
        """Return how its reward models are read; mode `paper` ends sentences as published."""
        reading = self.reward.trusting()
        return reading.model_copy(update={ENDS: ASCII_ENDS}) if self.salience.mode == "paper" else reading

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        base = self.reward.base
        if isinstance(base, TinyLlamaConfig) and self.reward.use is None and self.activations.layer > base.layers:
            raise ValueError(
                f"activations.layer {self.activations.layer} lies past the model's {base.layers} layers; "
                f"choose 1..{base.layers}"
            )
        if self.reward.blocks is not None and self.activations.layer > self.reward.blocks:
            raise ValueError(
                f"activations.layer {self.activations.layer} lies past the {self.reward.blocks} blocks that "
                f"reward.blocks keeps; choose 1..{self.reward.blocks}"
            )
        pools = len(self.ray.shard_pools)
        if pools not in (0, self.reward.shards):
            raise ValueError(f"ray.shard_pools has {pools} entries, but reward.shards is {self.reward.shards}")
        if self.evaluate.base != "clean" and self.evaluate.base not in self.curate:
            raise ValueError(
                f"evaluate.base {self.evaluate.base!r} is neither 'clean' nor one of {sorted(self.curate)}"
            )
        if self.scores.detector == "combined" and self.cross_fit is None:
            raise ValueError("scores.detector: combined is fitted across folds; add `cross_fit`")
        for name, what in (("clean", "trained on the uncurated pairs"), ("used", "that `reward.use` names")):
            if name in self.curate:
                raise ValueError(f"curate: {name!r} names the model {what}; choose another name")
        if self.evaluation is None and self.sweep is not None:
            raise ValueError("sweep measures models; add `evaluation`")
        if self.corpus is None:
            for path in [s.path for s in self.sources] + [self.judge.exchanges]:
                if path.startswith("corpus:"):
                    raise ValueError(f"{path!r} needs a `corpus` section in the config")
        return self
