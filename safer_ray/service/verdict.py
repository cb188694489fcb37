"""Say in plain words what a score means."""

from typing import NamedTuple

from safer_ray.report.plots import MINUS, number
from safer_ray.service.api import AuditorInfo, ScoredPair

DETECTORS = {"safer": "SAFER score", "reward_margin": "reward margin", "combined": "combined detector"}


class Verdict(NamedTuple):
    """A headline, and the sentences below it."""

    title: str
    sentences: tuple[str, ...]


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus; 0.00 has none."""
    text = number_of(value, digits)
    return f"+{text}" if value > 0 and any(c in "123456789" for c in text) else text


def number_of(value: float, digits: int = 2) -> str:
    """A number of fixed digits with a true minus sign."""
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if not any(c in "123456789" for c in text) else text.replace("-", MINUS)


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage without needless digits."""
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def place(percentile: float) -> str:
    """A percentile as people say it: 2nd percentile, above the 99th percentile."""
    whole = min(99, max(1, round(percentile)))
    ending = "th" if whole in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(whole % 10, "th")
    side = "below the " if percentile < 1 else "above the " if percentile > 99 else ""
    return f"{side}{whole}{ending} percentile"


def detector_value(result: ScoredPair, info: AuditorInfo) -> float:
    """Return what the auditor's detector says of a pair, low is suspicious.

    A result does not carry the values of `combined`: then it is where the reference has as many pairs above.
    """
    if info.detector == "safer":
        return result.score
    if info.detector == "reward_margin":
        return result.reward_margin
    counts, edges = info.reference.value.counts, info.reference.value.edges
    left = (1 - result.suspicion) * sum(counts)
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        if count and left <= count:
            return low + (high - low) * left / count
        left -= count
    return edges[-1]


def verdict_of(result: ScoredPair, info: AuditorInfo) -> Verdict:
    """Return whether a pair is flagged and why."""
    title = "Flagged for review" if result.flag else "Not flagged"
    more = result.suspicion >= 0.5
    share = percent(result.suspicion if more else 1 - result.suspicion)
    share = "nearly all" if share == "100%" else share
    among = (
        f"It looks {'more' if more else 'less'} suspicious than {share} of the auditor's {info.reference.pairs:,} "
        f"reference pairs; what lies among the most suspicious {percent(info.flag_quantile)} is flagged."
    )
    return Verdict(title, (among, _because(result, info), *_decided(result)))


def _because(result: ScoredPair, info: AuditorInfo) -> str:
    name, threshold = DETECTORS[info.detector], number(info.threshold)
    side = "below" if result.flag else "not below"
    if info.detector == "combined":
        return f"The flag goes by the combined detector, which puts the pair {side} its threshold."
    value = number(result.score if info.detector == "safer" else result.reward_margin)
    return f"The flag goes by the {name}: {value}, {side} the threshold {threshold}."


def _decided(result: ScoredPair) -> list[str]:
    """The side that the reward model likes better, and the feature that pulls most."""
    said = []
    if result.reward_margin < 0:
        said.append("The reward model prefers the rejected response, against the label.")
    pulling = [feature for feature in result.features or () if (feature.contribution < 0) == result.flag]
    if pulling:
        most = max(pulling, key=lambda feature: abs(feature.contribution))
        way = "towards suspicion" if most.contribution < 0 else "towards safety"
        said.append(f"Of the features, {most.feature} pulls most {way}, by {signed(most.contribution)}.")
    elif result.features is not None and not result.features:
        said.append("No selected feature fires on it, so the score says little.")
    return said
