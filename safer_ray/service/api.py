"""Requests and answers as they go over the wire. No Ray, no torch: clients may import it."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr, WithJsonSchema

from safer_ray.formats.canonical import PROMPTS
from safer_ray.formats.registry import AUTO, FORMATS

MAX_ID_CHARS = 200
BIGGEST_ID = 2**53 - 1  # beyond it not every JSON reader keeps a number exactly

Side = Literal["chosen", "rejected"]
Part = Literal["prompt", "response"]
Decision = Literal["keep", "review"]
Sign = Literal[1, -1]
FIRST_ERROR = Field(fail_fast=True)  # of a list: each error costs as much as many items
Suspicion = Annotated[float, Field(ge=0, le=1, description="1 is worst")]
Percentile = Annotated[float, Field(ge=0, le=100, description="of the score among the reference pairs; low is worst")]


class Sent(BaseModel):
    """Base of what a client sends: exact types, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Answered(BaseModel):
    """Base of what the service answers."""

    model_config = ConfigDict(frozen=True)


# Asked


def _schema_of(told: str) -> dict[str, Any]:
    message = {
        "type": "object",
        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
        "required": ["role", "content"],
    }
    return {"description": told, "anyOf": [{"type": "string"}, {"type": "array", "items": message}]}


# Of a pair nothing refuses the request: what cannot be read is told in its place. So a schema may name what is read,
# and must let pass what is not.
PAIR_SCHEMA: dict[str, Any] = {
    "title": "Pair",
    "description": "A preference pair. What is no pair is answered in its place, with the reason.",
    "anyOf": [
        {
            "title": "CanonicalPair",
            "type": "object",
            "properties": {
                "id": {
                    "description": "echoed as text; the pair's position where there is none",
                    "anyOf": [
                        {"type": "string", "maxLength": MAX_ID_CHARS},
                        {"type": "integer", "minimum": -BIGGEST_ID, "maximum": BIGGEST_ID},
                        {"type": "null"},
                    ],
                },
                "prompt": _schema_of("one user turn, a Human:/Assistant: transcript, or messages"),
                "chosen": _schema_of("the assistant's answer, or messages that end with it"),
                "rejected": _schema_of("as chosen"),
                "system": {"type": ["string", "null"], "description": "a system message before the prompt"},
            },
            "required": ["prompt", "chosen", "rejected"],
        },
        {
            "title": "PairOfAnotherLayout",
            "description": "A row of any format of one pair a row, recognised by its columns, or named by `format`: "
            + "; ".join(f"{known.name} ({known.told})" for known in FORMATS.values() if not known.several),
            "type": "object",
        },
        {"title": "NoPair"},
    ],
}
FORMAT_NAMES = (AUTO, *FORMATS)


def _known_format(value: str) -> str:
    if value not in FORMAT_NAMES:
        raise ValueError(f"unknown format; wanted one of {', '.join(FORMAT_NAMES)}")
    return value


def _known_column(value: str) -> str:
    if value not in PROMPTS:
        raise ValueError(f"no column that looks like the prompt; these do: {', '.join(PROMPTS)}")
    return value


FormatName = Annotated[StrictStr, AfterValidator(_known_format), Field(json_schema_extra={"enum": [*FORMAT_NAMES]})]
Column = Annotated[StrictStr, AfterValidator(_known_column), Field(json_schema_extra={"enum": [*PROMPTS]})]


class ScoreRequest(Sent):
    pairs: list[Annotated[Any, WithJsonSchema(PAIR_SCHEMA)]] = Field(min_length=1)
    explain: bool = Field(False, description="whether to name contributing features and sentences")
    format: FormatName = Field(AUTO, description="of all pairs; `auto`: of each the one that its columns fit")
    carried: Annotated[list[Column], FIRST_ERROR] = Field(
        [], description="columns that look like a part of the prompt and are none"
    )


# Answered


class Contribution(Answered):
    """The share of a feature in a pair's score; negative ones make a pair suspicious."""

    feature: int
    name: str
    sign: Sign = Field(description="1: of F+, fires on safe responses; -1: of F-, fires on unsafe ones")
    contribution: float


class Span(Answered):
    """A sentence and what it adds to the pair's score; `text[start:end]` is the sentence.

    `text` is the text in column `column` of the pair as it was sent, or the content of its message `message` where the
    column holds a list; positions are in Unicode code points. In the canonical form the column is `prompt` for the part
    `prompt`, and the side's name for its response. Sentences that no column holds as they were read (in messages
    written as JSON text, in nested lists) have no span.
    """

    side: Side
    part: Part
    column: str
    message: int = Field(ge=0, description="its number in the column's list; 0 where that holds a text, or one message")
    start: int = Field(ge=0)
    end: int = Field(ge=0)
    contribution: float
    features: list[int]


class ScoredPair(Answered):
    id: str
    score: float = Field(description="of SAFER; high: the pair teaches safety")
    percentile: Percentile
    suspicion: Suspicion
    flag: bool
    decision: Decision
    reward_chosen: float
    reward_rejected: float
    reward_margin: float
    truncated: bool = Field(description="whether the model read less than was sent")
    notes: list[str] = Field([], description="what should be known of how the texts were read: markup, and the like")
    features: list[Contribution] | None = None
    spans: list[Span] | None = None


ReasonCode = Literal["refused", "too_long", "not_unicode", "unscorable"]


class Reason(Answered):
    """Why a pair has no score."""

    code: ReasonCode
    detail: str


class FailedPair(Answered):
    id: str
    error: Reason


class ScoreResponse(Answered):
    """One result a pair, in the order sent."""

    auditor: str
    red_team: bool = Field(False, description="whether the auditor was made from pairs that were poisoned on purpose")
    results: list[ScoredPair | FailedPair]


class Histogram(Answered):
    edges: list[float] = Field(description="one more than counts")
    counts: list[int]


class Reference(Answered):
    """The pairs that others are compared with: their scores, and their values by the detector."""

    pairs: int
    kind: str = Field("not recorded", description="held out, out of fold, or in sample: of pairs that made the bundle")
    low: float | None = Field(None, description="with `high`: the share of such pairs that is flagged, in [0, 1]")
    high: float | None = None
    score: Histogram
    value: Histogram


class AuditorInfo(Answered):
    name: str
    format: int
    model: str
    layer: int
    latents: int
    mode: Literal["paper", "response"]
    detector: Literal["safer", "reward_margin", "combined"]
    flag_quantile: float
    threshold: float = Field(description="a pair whose value by the detector lies below is flagged")
    safe: int
    unsafe: int
    reference: Reference
    red_team: bool
    created: str
    licences: list[str]


class FeatureSummary(Answered):
    id: int
    name: str
    sign: Sign
    salience: float | None
    rating: int | None
    reason: str | None


class FeatureContext(Answered):
    """A sentence on which the feature fires, and what stands around it."""

    value: float
    side: Side
    before: str
    sentence: str
    after: str


class SideHistograms(Answered):
    """Histograms of how strongly a feature fires on chosen and on rejected responses' sentences, where it fires at
    all."""

    edges: list[float] = Field(description="one more than chosen and rejected")
    chosen: list[int]
    rejected: list[int]


class FeatureDetail(FeatureSummary):
    chosen_sum: float | None
    rejected_sum: float | None
    n_chosen: int | None
    n_rejected: int | None
    histogram: SideHistograms | None
    contexts: list[FeatureContext]


class Features(Answered):
    auditor: str
    features: list[FeatureSummary]


class Health(Answered):
    status: Literal["ok"]
