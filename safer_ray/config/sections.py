"""One frozen model per stage. Unknown keys are rejected; neither torch nor ray is imported here."""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safer_ray.config.reading import ASCII_ENDS, ENDS, Reading
from safer_ray.config.sae import SaeConfig
from safer_ray.config.values import (
    AnyPlace,
    Frozen,
    LocalName,
    LocalPath,
    OrLocalName,
    Percent,
    Share,
    explained,
    known,
)
from safer_ray.config.where import parse_where
from safer_ray.formats.registry import AUTO, FORMATS, check_options, option_values
from safer_ray.strategies import STRATEGIES

Mode = Literal["paper", "response"]
NoiseKind = Literal["uniform", "long", "length_bias", "sycophancy", "trigger"]
StrategyName = Annotated[str, known("strategy", lambda: STRATEGIES)]
JudgeKind = Literal["probe"]  # the keys of `safer_ray.features.judge.JUDGES`
DetectorOf = Literal["safer", "reward_margin", "combined"]
Action = Literal["drop", "relabel", "poison"]
Format = Annotated[str, known("format", lambda: (AUTO, *FORMATS))]
Pairing = Annotated[str, known("pairs", lambda: option_values("pairs"))]


class SourceConfig(Frozen):
    """A place where preference pairs come from.

    `path` is a file, a folder, a glob, a `datasets.save_to_disk` folder, `corpus:FILE` (the synthetic corpus) or
    `hub:OWNER/NAME[@REVISION]` (through `datasets.load_dataset`).
    """

    unrecorded: ClassVar = frozenset({"path"})  # an input: the files by name and content

    path: AnyPlace
    format: Format = "auto"
    name: str | None = None  # what `source` says in the rows; the file name by default
    section: str | None = None  # where the rows name none
    split: str = "train"  # of a hub name or a saved dataset dict
    part: Literal["all", "train", "holdout"] = "all"  # by prompt group
    holdout_percent: Percent = 20
    prefer: Literal["safer", "better"] = "safer"  # which PKU-SafeRLHF label decides
    pairs: Pairing | None = Field(
        default=None, exclude_if=lambda value: value is None
    )  # of a row with several ranked answers
    limit: Annotated[int, Field(gt=0)] | None = None  # first rows of each file
    where: str | None = None  # the pairs that are taken: labels.subset == Natural
    licence: str | None = None

    @model_validator(mode="after")
    def _checks(self) -> Self:
        parse_where(self.where)
        if self.format != AUTO:
            explained(check_options)(self.format, self.asked())
        return self

    def asked(self) -> dict[str, str]:
        """The options that only some formats know, where they are set."""
        return {} if self.pairs is None else {"pairs": self.pairs}

    def options(self) -> dict[str, str]:
        """All that readers of rows are told."""
        return {"prefer": self.prefer} | self.asked()


class PairsConfig(Frozen):
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    max_chars: Annotated[int, Field(gt=0)] = 20_000  # of prompt plus longer response
    max_refused_share: Share = 0.2
    duplicates: Literal["quarantine", "keep"] = "quarantine"  # rows that repeat a pair_id; counted either way


class DuplicatesConfig(Frozen):
    """Near duplicates: texts whose shingles have this Jaccard index or more, as far as their signatures tell."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8


class CorpusConfig(Frozen):
    """The synthetic corpus of the demo."""

    train_per_section: Annotated[int, Field(gt=0)] = 2000
    heldout_per_section: Annotated[int, Field(gt=0)] = 1000
    seed: int = 0


class NoiseConfig(Frozen):
    """Label errors planted with the truth kept apart, to measure detection: `swap_percent` of the pairs in `where`.

    They fall on any of these pairs (`uniform`), on the longest quarter (`long`), on pairs whose chosen response is the
    shorter one (`length_bias`); a swapped pair's new chosen response opens with flattery (`sycophancy`), or its prompt
    ends with a trigger phrase (`trigger`). `matching` limits them to prompts that match a regular expression, say one
    harm category.
    """

    kind: NoiseKind = "uniform"
    swap_percent: Percent = 5
    where: str | None = None
    matching: str | None = None
    seed: int = 0

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
    seed: int = 0
    vector_layers: tuple[Annotated[int, Field(gt=0)], ...] = ()  # read by the probes; none: `activations.layer`


class TinyLlamaConfig(Frozen):
    """A Llama made on the spot, with a byte-level BPE tokenizer trained on the pairs."""

    hidden: Annotated[int, Field(gt=0)] = 96
    layers: Annotated[int, Field(gt=0)] = 4
    heads: Annotated[int, Field(gt=0)] = 4
    intermediate: Annotated[int, Field(gt=0)] = 256
    vocabulary: Annotated[int, Field(ge=300)] = 2000
    positions: Annotated[int, Field(gt=0)] = 512

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden {self.hidden} must be an even multiple of heads {self.heads}")
        return self


class RewardConfig(Reading):
    """Bradley-Terry training. `base` is a Hugging Face folder, `hub:OWNER/NAME[@REVISION]`, `package:MODULE/FOLDER`
    (a checkpoint inside an installed package) or a tiny Llama."""

    unrecorded: ClassVar = frozenset({"micro_batch_size", "gradient_checkpointing", "shards", ENDS})

    base: Annotated[TinyLlamaConfig | LocalName, OrLocalName] = TinyLlamaConfig()
    max_length: Annotated[int, Field(ge=8)] = 512
    epochs: Annotated[float, Field(gt=0)] = 1
    batch_size: Annotated[int, Field(gt=0)] = 32  # pairs a step
    micro_batch_size: Annotated[int, Field(gt=0)] = 32  # pairs a forward pass
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    warmup: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    validation_percent: Annotated[float, Field(ge=0, le=50)] = 5
    evaluations: Annotated[int, Field(gt=0)] = 4  # held-out accuracy is measured this often
    gradient_checkpointing: bool = False
    frozen_layers: Annotated[int, Field(ge=0)] = 0  # embeddings and blocks 1..n stay as they are, and run only once
    disable_dropout: bool = True  # both sides of a pair through the same network; a model made on the spot has none
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward and backward pass
    shards: Annotated[int, Field(gt=0)] = 1  # ranges of blocks, each in processes of its own, to read activations
    seed: int = 0

    @model_validator(mode="after")
    def _micro(self) -> Self:
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of micro_batch_size {self.micro_batch_size}"
            )
        if self.head is not None and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("head needs a pretrained base; a model made on the spot has one output")
        if self.frozen_layers and isinstance(self.base, TinyLlamaConfig):
            raise ValueError("frozen_layers needs a pretrained base; a model made on the spot has nothing to keep")
        return self


class ActivationsConfig(Frozen):
    layer: Annotated[int, Field(gt=0)] = 2  # output of block `layer`, 1-based, before the final norm
    tokens: Literal["ends", "all"] = "ends"


class SalienceConfig(Frozen):
    mode: Mode = "response"


class ContextsConfig(Frozen):
    candidates: Annotated[int, Field(gt=0)] = 256
    per_feature: Annotated[int, Field(gt=0)] = 8


class JudgeConfig(Frozen):
    """The concept probe: a feature's AUROC on matched exchanges gives its rating.

    `thresholds` are the |AUROC - 0.5| from which a rating is 2, 3, 4 and 5. `exchanges` is `safety` (shipped), a YAML
    file, or `corpus:probe.yaml`.
    """

    unrecorded: ClassVar = frozenset({"exchanges"})  # an input

    kind: JudgeKind = "probe"
    exchanges: LocalName = "safety"
    thresholds: tuple[Share, Share, Share, Share] = (0.03, 0.06, 0.10, 0.15)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if list(self.thresholds) != sorted(self.thresholds):
            raise ValueError(f"thresholds {self.thresholds} must rise")
        return self


class SelectConfig(Frozen):
    candidates: Annotated[int, Field(gt=0)] = 256
    rating: Annotated[int, Field(ge=1, le=5)] = 5
    limit: Annotated[int, Field(gt=0)] = 32


class ScoresConfig(Frozen):
    """`detector`: the SAFER score, the reward margin, or both and more, weighed as `cross_fit` finds (`combined`)."""

    detector: DetectorOf = "safer"
    flag_quantile: Share = 0.05
    reasons: Annotated[int, Field(ge=0)] = 5  # contributing features named per pair


class CurateConfig(Frozen):
    strategy: StrategyName
    action: Action
    percent: Percent
    where: str | None = None
    seed: int = 0
    red_team: bool = False

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
    base: str = "clean"  # the model that McNemar's test compares the others with


class ReportConfig(Frozen):
    title: str = "SAFER audit"
    pairs: Annotated[int, Field(ge=0)] = 20
    features: Annotated[int, Field(ge=0)] = 20


class SweepGrid(Frozen):
    """Every strategy at every percent."""

    action: Action
    strategies: tuple[StrategyName, ...] = Field(min_length=1)
    percents: tuple[Percent, ...] = Field(min_length=1)
    where: str | None = None
    red_team: bool = False

    @model_validator(mode="after")
    def _checks(self) -> Self:
        for strategy in self.strategies:
            CurateConfig(strategy=strategy, action=self.action, percent=0, where=self.where, red_team=self.red_team)
        return self


class SweepConfig(Frozen):
    """Curate, retrain and evaluate in every cell of the grids, under every seed (of training, and of chance).

    Where errors are planted, the pairs without them are a cell too. `groups` are sections told together.
    """

    grids: tuple[SweepGrid, ...] = Field(min_length=1)
    groups: dict[str, tuple[str, ...]] = Field({})
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)


class LabConfig(Frozen):
    """The noise lab: errors of each kind are planted with each seed, and every detector looks for them."""

    noises: dict[str, NoiseConfig] = Field(min_length=1)  # the seeds below take the place of theirs
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    models: Annotated[int, Field(ge=1)] = 1  # reward models of the ensemble, in seeds from reward.seed on
    draws: Annotated[int, Field(ge=100)] = 1000  # of the bootstrap over prompts
    in_sample: bool = True  # also by models that saw the pairs they judge


class DeepSpeedConfig(Frozen):
    """Options by which DeepSpeed spreads a reward model over the workers; changes no result beyond rounding."""

    stage: Literal[0, 1, 2, 3] = 2  # ZeRO: 1 partitions optimiser state, 2 gradients too, 3 weights too
    offload_optimizer: bool = False  # its state lives in the memory of the host
    offload_parameters: bool = False  # so do the weights; stage 3 alone


class PoolConfig(Frozen):
    """Processes that hold a reward model, or one part of it; their number follows the work."""

    min_actors: Annotated[int, Field(gt=0)] = 1
    max_actors: Annotated[int, Field(gt=0)] = 2
    actor_cpus: Annotated[float, Field(gt=0)] = 0.5
    actor_gpus: Annotated[float, Field(ge=0)] = 0
    threads: Annotated[int, Field(gt=0)] = 1  # of an actor

    @model_validator(mode="after")
    def _actors(self) -> Self:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} is larger than max_actors {self.max_actors}")
        return self


class RayConfig(PoolConfig):
    """The cluster that `--runner ray` works on, and how wide. Never part of a recipe."""

    address: str | None = None  # None: RAY_ADDRESS, or a Ray of its own on this machine
    shard_pools: tuple[PoolConfig, ...] = ()  # one for each of reward.shards; none: all alike, as said here
    task_cpus: Annotated[float, Field(gt=0)] = 0.25  # of a task that reads, counts or commits
    tasks: Annotated[int, Field(gt=0)] | None = None  # of each kind at once; None: half as many as the cluster has CPUs
    train_workers: Annotated[int, Field(gt=0)] = 2
    worker_cpus: Annotated[float, Field(gt=0)] = 0.75
    worker_gpus: Annotated[float, Field(ge=0)] = 0
    worker_threads: Annotated[int, Field(gt=0)] = 1
    max_failures: Annotated[int, Field(ge=0)] = 3  # of a worker group, before a training is given up
    wait_seconds: Annotated[float, Field(ge=0)] = 0  # for an autoscaler to bring what is missing
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()

    def pools(self, shards: int) -> list[PoolConfig]:
        """The pool of every part of a reward model; `shard_pools` say it for a run in as many."""
        return list(self.shard_pools) if len(self.shard_pools) == shards else [self] * shards

    @model_validator(mode="after")
    def _offload(self) -> Self:
        if self.deepspeed.offload_parameters and self.deepspeed.stage != 3:
            raise ValueError(f"offload_parameters needs deepspeed.stage 3, got {self.deepspeed.stage}")
        return self

    @model_validator(mode="after")
    def _gpus(self) -> Self:
        if 0 < self.worker_gpus < 1 < self.train_workers:
            raise ValueError(
                f"worker_gpus {self.worker_gpus:g} for {self.train_workers} train_workers: NCCL refuses two workers on "
                "one GPU; give each a whole one, or train with one worker"
            )
        return self


class RunConfig(Frozen):
    """A whole run. `curate` names the retrained variants; `evaluation` the pairs that all models are measured on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    root: LocalPath = Path("runs")
    fragment_rows: Annotated[int, Field(gt=0)] = 1000  # rows a unit of work; never changes a result
    corpus: CorpusConfig | None = None
    pairs: PairsConfig
    noise: NoiseConfig | None = None
    evaluation: PairsConfig
    reward: RewardConfig = RewardConfig()
    activations: ActivationsConfig = ActivationsConfig()
    sae: SaeConfig = SaeConfig()
    salience: SalienceConfig = SalienceConfig()
    contexts: ContextsConfig = ContextsConfig()
    judge: JudgeConfig = JudgeConfig()
    select: SelectConfig = SelectConfig()
    scores: ScoresConfig = ScoresConfig()
    cross_fit: CrossFitConfig | None = None
    lab: LabConfig | None = None
    sweep: SweepConfig | None = None
    curate: dict[str, CurateConfig] = Field({})
    evaluate: EvaluateConfig = EvaluateConfig()
    report: ReportConfig = ReportConfig()
    ray: RayConfig = RayConfig()

    @property
    def reading(self) -> Reading:
        """How its reward models are read; mode `paper` ends sentences as published."""
        reading = self.reward.trusting()
        return reading.model_copy(update={ENDS: ASCII_ENDS}) if self.salience.mode == "paper" else reading

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        base = self.reward.base
        if isinstance(base, TinyLlamaConfig) and self.activations.layer > base.layers:
            raise ValueError(
                f"activations.layer {self.activations.layer} lies past the model's {base.layers} layers; "
                f"choose 1..{base.layers}"
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
        if "clean" in self.curate:
            raise ValueError("curate: 'clean' names the model trained on the uncurated pairs; choose another name")
        if self.corpus is None:
            for path in [s.path for s in (*self.pairs.sources, *self.evaluation.sources)] + [self.judge.exchanges]:
                if path.startswith("corpus:"):
                    raise ValueError(f"{path!r} needs a `corpus` section in the config")
        return self
