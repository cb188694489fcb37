"""Requests and answers as they go over the wire. No Ray, no torch: clients may import it."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, StrictInt, StrictStr, Tag

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


class Message(Sent):
    role: StrictStr
    content: StrictStr


def _kind(value: object) -> str | None:
    """Which of the two forms of a text this is, so that an error names one of them."""
    return "text" if isinstance(value, str) else "messages" if isinstance(value, list | tuple) else None


Text = Annotated[
    Annotated[StrictStr, Tag("text")] | Annotated[list[Message], FIRST_ERROR, Tag("messages")],
    Discriminator(
        _kind, custom_error_type="type", custom_error_message="wanted text or a list of {role, content} messages"
    ),
]


def _whole(value: object) -> object:
    """7.0 is the number 7, as JSON has it."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


TextId = Annotated[StrictStr, Field(max_length=MAX_ID_CHARS)]
NumberId = Annotated[StrictInt, Field(ge=-BIGGEST_ID, le=BIGGEST_ID), BeforeValidator(_whole)]


class Pair(Sent):
    """A text prompt is one user turn or a Human:/Assistant: transcript, a text response the assistant's answer."""

    id: TextId | NumberId | None = Field(None, description="echoed as text; the pair's position where there is none")
    prompt: Text
    chosen: Text
    rejected: Text


class ScoreRequest(Sent):
    pairs: Annotated[list[Pair], FIRST_ERROR] = Field(min_length=1)
    explain: bool = Field(False, description="whether to name contributing features and sentences")


# Answered


class Contribution(Answered):
    """The share of a feature in a pair's score; negative ones make a pair suspicious."""

    feature: int
    name: str
    sign: Sign = Field(description="1: of F+, fires on safe responses; -1: of F-, fires on unsafe ones")
    contribution: float


class Span(Answered):
    """A sentence and what it adds to the pair's score; `text[start:end]` is the sentence.

    `text` is the content of message `message` (0 for a plain text) of that part as it was sent, in Unicode code points.
    """

    side: Side
    part: Part
    message: int = Field(ge=0)
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
    features: list[Contribution] | None = None
    spans: list[Span] | None = None


class Reason(Answered):
    """Why a pair has no score."""

    code: Literal["refused", "too_long", "not_unicode", "unscorable"]
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
