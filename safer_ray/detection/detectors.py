"""Detectors of suspicious pairs: rivals over the same evidence, each one small function.

Every detector is a function under `@detector`, named as pages and tables name it, and gives float64 [n], high where a
pair's label looks wrong; so do the curation strategies (`safer_ray.strategies`). Those that fit anything fit it, for
the pairs of one fold, on the pairs of the other folds, so that no pair is judged by what its own prompt taught.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.feature_extraction.text import TfidfVectorizer

from safer_ray.detection.combined import Readings, fit_combined, fit_effect, fit_linear, root, shown, splits
from safer_ray.detection.local_probe import fit_local
from safer_ray.strategies import random_order

NEIGHBOURS = 20


@dataclass(frozen=True)
class Evidence:
    """Evidence about n pairs, row by row; nothing of it says which labels were planted."""

    pair_id: list[str]
    fold: Int[ndarray, " n"]
    chosen: list[str]
    rejected: list[str]
    margin: Float[ndarray, "n models"]  # r_chosen - r_rejected of each model of an ensemble
    score_paper: Float[ndarray, " n"]  # the SAFER score as published
    read: Readings  # with the first model's margin, and the SAFER score in `response` mode
    head: Float[ndarray, "n d"] | None = None  # difference of what the reward head reads
    clean_head: dict[int, Float[ndarray, "m d"]] | None = None  # fold -> the same of a small clean set


Detector = Callable[[Evidence], np.ndarray]
DETECTORS: dict[str, Detector] = {}


def detector(function: Detector) -> Detector:
    """Make a detector known by its function's name, to the lab among others."""
    DETECTORS[function.__name__] = function
    return function


# Detectors


@detector
def safer(known: Evidence) -> np.ndarray:
    """The SAFER score (response mode)."""
    return -known.read.score


@detector
def safer_paper(known: Evidence) -> np.ndarray:
    """The SAFER score as published."""
    return -known.score_paper


@detector
def reward_margin(known: Evidence) -> np.ndarray:
    """The first model's reward margin."""
    return -known.read.margin


@detector
def random(known: Evidence) -> np.ndarray:
    """Chance."""
    return random_order(known.pair_id, "random")


@detector
def length(known: Evidence) -> np.ndarray:
    """The longer response is presumed the better one."""
    return np.array([len(r) - len(c) for c, r in zip(known.chosen, known.rejected, strict=True)], dtype=np.float64)


@detector
def ensemble_mean(known: Evidence) -> np.ndarray:
    """The mean margin of all models, each in units of its own spread."""
    return -_scaled(known.margin).mean(axis=1)


@detector
def ensemble_variance(known: Evidence) -> np.ndarray:
    """Return how much the models disagree (Coste et al. 2024, arXiv 2310.02743)."""
    return _scaled(known.margin).var(axis=1)


@detector
def confident_learning(known: Evidence) -> np.ndarray:
    """cleanlab's label quality on out-of-fold probabilities (Northcutt et al. 2021, arXiv 1911.00068).

    Each pair is shown in an order drawn by its id, and its class is which of the two was chosen.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    first = (random_order(known.pair_id, "order") < 0.5).astype(np.int64)
    margin = _scaled(known.margin[:, :1])[:, 0]
    p = 1 / (1 + np.exp(-np.where(first == 1, margin, -margin)))
    probabilities = np.stack([1 - p, p], axis=1)
    quality = get_label_quality_scores(first, probabilities, adjust_pred_probs=True)
    issues = find_label_issues(first, probabilities, filter_by="both", n_jobs=1)
    return issues.astype(np.float64) - quality


@detector
def tfidf(known: Evidence) -> np.ndarray:
    """A logistic model, as scikit-learn has it by default, on TF-IDF differences of words and pairs of words."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    together = words.fit_transform([*known.chosen, *known.rejected])  # learns no label
    n = len(known.chosen)
    rows = sp.csr_matrix(together[:n] - together[n:])
    return -fitted(rows, known, np.sqrt(rows.shape[1]), np.ones(rows.shape[1]))  # C = 1, columns as they are


@detector
def influence(known: Evidence) -> np.ndarray:
    """Return how much a step on the pair's gradient at the reward head would raise the loss of a small clean set: pairs
    whose gradient points away from the clean ones' (first order; Pruthi et al. 2020, arXiv 2002.08484)."""
    assert known.head is not None
    assert known.clean_head is not None
    out = np.zeros(len(known.pair_id))
    for fold, clean in known.clean_head.items():
        rows = known.fold == fold
        pull = 1 / (1 + np.exp(known.margin[rows, 0]))  # -d loss / d margin
        out[rows] = -pull * (known.head[rows] @ clean.mean(axis=0))
    return out


@detector
def effect_size(known: Evidence) -> np.ndarray:
    """All features without a judge, each weighted by its mean contrast in units of its spread over the other folds."""
    contrast, out = known.read.contrast, np.zeros(len(known.pair_id))
    for train, held in splits(known.fold):
        out[held] = -fit_effect(contrast[train])(contrast[held])
    return out


@detector
def features(known: Evidence) -> np.ndarray:
    """A logistic model on the pairs' feature contrasts: what the autoencoder knows, without a judge."""
    return -fitted(root(known.read.contrast), known, 0.3)


@detector
def probe(known: Evidence) -> np.ndarray:
    """A logistic model on the differences of mean layer vectors: a linear probe of the trunk."""
    return -fitted(known.read.response, known, 0.03)


@detector
def local_probe(known: Evidence) -> np.ndarray:
    """A support vector machine on the same differences, to which pairs count more the more alike their prompts are."""
    response, prompt = known.read.response, known.read.prompt
    out = np.zeros(len(known.pair_id))
    for train, held in splits(known.fold):
        out[held] = -fit_local(response[train], prompt[train])(response[held], prompt[held])
    return out


@detector
def neighbours(known: Evidence) -> np.ndarray:
    """Return whether pairs of other prompts with the most similar (or opposite) contrasts are labelled the other
    way."""
    rows = root(known.read.contrast)
    norm = np.sqrt(rows.multiply(rows).sum(axis=1)).A1
    unit = sp.diags(1 / np.maximum(norm, 1e-9)) @ rows
    out = np.zeros(len(known.pair_id))
    for train, held in splits(known.fold):
        near = (unit[held] @ unit[train].T).toarray()
        k = min(NEIGHBOURS, near.shape[1])
        strongest = np.argpartition(-np.abs(near), k - 1, axis=1)[:, :k]
        out[held] = -np.take_along_axis(near, strongest, axis=1).sum(axis=1)
    return out


@detector
def combined(known: Evidence) -> np.ndarray:
    """A logistic model on margin, SAFER score, and what contrasts and probes predict: see `combined.py`."""
    return -fit_combined(known.read, known.fold, known.pair_id)[1]


# Fitting


def _scaled(margin: np.ndarray) -> np.ndarray:
    """Margins in units of each model's root mean square."""
    return margin / np.maximum(np.sqrt((margin**2).mean(axis=0)), 1e-12)


def fitted(
    rows: sp.csr_matrix | np.ndarray, known: Evidence, strength: float, scale: np.ndarray | None = None
) -> np.ndarray:
    """log-odds that each pair is labelled right, by a logistic model of the other folds' pairs."""
    out, sign = np.zeros(rows.shape[0]), shown(known.pair_id)
    for train, held in splits(known.fold):
        out[held] = fit_linear(rows[train], sign[train], strength, scale)(rows[held])
    return out
