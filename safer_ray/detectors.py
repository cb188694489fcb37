"""What makes a pair suspicious: rival detectors over the same evidence, each one small function.

Every detector gives float64 [n], high where a pair's label looks wrong. Those that fit anything fit it, for the pairs
of one fold, on the pairs of the other folds, so that no pair is judged by what its own prompt taught.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from safer_ray.codes import flatten
from safer_ray.config import Mode
from safer_ray.curation import random_order

DetectorName = Literal[
    "safer",
    "safer_paper",
    "reward_margin",
    "random",
    "length",
    "ensemble_mean",
    "ensemble_variance",
    "confident_learning",
    "tfidf",
    "influence",
    "features",
    "probe",
    "neighbours",
    "combined",
]
NEIGHBOURS = 20


@dataclass(frozen=True)
class Evidence:
    """What is known of n pairs, row by row; nothing of it says which labels were planted."""

    pair_id: list[str]
    fold: Int[ndarray, " n"]
    chosen: list[str]
    rejected: list[str]
    margin: Float[ndarray, "n models"]  # r_chosen - r_rejected of each model of an ensemble
    score: Float[ndarray, " n"]  # the SAFER score in `response` mode
    score_paper: Float[ndarray, " n"]
    contrast: sp.csr_matrix  # [n, latents], mean activation over the chosen response's ends minus the rejected's
    dense: Float[ndarray, "n d"]  # the same decoded: the difference of mean layer vectors, as far as the SAE keeps it
    head: Float[ndarray, "n d"] | None = None  # difference of what the reward head reads
    clean_head: dict[int, Float[ndarray, "m d"]] | None = None  # fold -> the same of a small clean set

    def folds(self) -> Iterator[tuple[Int[ndarray, " train"], Int[ndarray, " held"]]]:
        """Rows of the other folds, and of the fold itself, fold by fold; a single fold judges what it was fitted on."""
        folds = np.unique(self.fold)
        for fold in folds:
            train = self.fold != fold if len(folds) > 1 else self.fold == fold
            yield np.flatnonzero(train), np.flatnonzero(self.fold == fold)


Detector = Callable[[Evidence], np.ndarray]


def contrasts(codes: pa.Table, latents: int, mode: Mode = "response") -> sp.csr_matrix:
    """Of each pair and feature, the mean activation over the chosen side's entries minus that over the rejected's."""
    total = sp.csr_matrix((len(codes), latents))
    for sign, side in ((1.0, "chosen"), (-1.0, "rejected")):
        flat = flatten(codes, side, mode)
        value = sign * flat.value / np.maximum(flat.ends_per_row[flat.row], 1)
        total = total + sp.csr_matrix((value, (flat.row, flat.feature)), shape=(len(codes), latents))
    return total.tocsr()


# Detectors


def safer(known: Evidence) -> np.ndarray:
    """The SAFER score (response mode)."""
    return -known.score


def safer_paper(known: Evidence) -> np.ndarray:
    """The SAFER score as published."""
    return -known.score_paper


def reward_margin(known: Evidence) -> np.ndarray:
    """The first model's reward margin."""
    return -known.margin[:, 0]


def random(known: Evidence) -> np.ndarray:
    """Chance."""
    return random_order(known.pair_id, "random")


def length(known: Evidence) -> np.ndarray:
    """The longer response is presumed the better one."""
    return np.array([len(r) - len(c) for c, r in zip(known.chosen, known.rejected, strict=True)], dtype=np.float64)


def ensemble_mean(known: Evidence) -> np.ndarray:
    """The mean margin of all models, each in units of its own spread."""
    return -_scaled(known.margin).mean(axis=1)


def ensemble_variance(known: Evidence) -> np.ndarray:
    """How much the models disagree (Coste et al. 2024, arXiv 2310.02743)."""
    return _scaled(known.margin).var(axis=1)


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


def tfidf(known: Evidence) -> np.ndarray:
    """A logistic model on TF-IDF differences of words and pairs of words."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, max_features=30_000, sublinear_tf=True)
    together = words.fit_transform([*known.chosen, *known.rejected])  # learns no label
    n = len(known.chosen)
    return -fitted(sp.csr_matrix(together[:n] - together[n:]), known, 1.0)


def influence(known: Evidence) -> np.ndarray:
    """How much a step on the pair's gradient at the reward head would raise the loss of a small clean set: pairs whose
    gradient points away from the clean ones' (first order; Pruthi et al. 2020, arXiv 2002.08484)."""
    assert known.head is not None
    assert known.clean_head is not None
    out = np.zeros(len(known.pair_id))
    for fold, clean in known.clean_head.items():
        rows = known.fold == fold
        pull = 1 / (1 + np.exp(known.margin[rows, 0]))  # -d loss / d margin
        out[rows] = -pull * (known.head[rows] @ clean.mean(axis=0))
    return out


def features(known: Evidence) -> np.ndarray:
    """A logistic model on the pairs' feature contrasts: what the autoencoder knows, without a judge."""
    return -fitted(_root(known.contrast), known, 0.3)


def probe(known: Evidence) -> np.ndarray:
    """A logistic model on the differences of mean layer vectors: a linear probe of the trunk."""
    return -fitted(sp.csr_matrix(known.dense), known, 0.1)


def neighbours(known: Evidence) -> np.ndarray:
    """Whether pairs of other prompts with the most similar (or opposite) contrasts are labelled the other way."""
    rows = _root(known.contrast)
    norm = np.sqrt(rows.multiply(rows).sum(axis=1)).A1
    unit = sp.diags(1 / np.maximum(norm, 1e-9)) @ rows
    out = np.zeros(len(known.pair_id))
    for train, held in known.folds():
        near = (unit[held] @ unit[train].T).toarray()
        k = min(NEIGHBOURS, near.shape[1])
        strongest = np.argpartition(-np.abs(near), k - 1, axis=1)[:, :k]
        out[held] = -np.take_along_axis(near, strongest, axis=1).sum(axis=1)
    return out


def combined(known: Evidence) -> np.ndarray:
    """A logistic model on margins, SAFER scores, and what contrasts, probe, neighbours and words predict.

    All of it is negated when a pair is swapped, so fitting it on pairs of other prompts as they are labelled, against
    the same pairs swapped, is fitting it on planted noise there.
    """
    parts = [ensemble_mean, safer, safer_paper, features, probe, neighbours, tfidf]
    columns = np.stack([-part(known) for part in parts], axis=1)
    return -fitted(sp.csr_matrix(columns / np.maximum(columns.std(axis=0), 1e-12)), known, 1.0)


DETECTORS: dict[DetectorName, Detector] = {
    "safer": safer,
    "safer_paper": safer_paper,
    "reward_margin": reward_margin,
    "random": random,
    "length": length,
    "ensemble_mean": ensemble_mean,
    "ensemble_variance": ensemble_variance,
    "confident_learning": confident_learning,
    "tfidf": tfidf,
    "influence": influence,
    "features": features,
    "probe": probe,
    "neighbours": neighbours,
    "combined": combined,
}


# Fitting


def _scaled(margin: np.ndarray) -> np.ndarray:
    """Margins in units of each model's root mean square."""
    return margin / np.maximum(np.sqrt((margin**2).mean(axis=0)), 1e-12)


def _root(values: sp.csr_matrix) -> sp.csr_matrix:
    """Signed square roots, so that a few large activations do not decide alone."""
    values = values.copy()
    values.data = np.sign(values.data) * np.sqrt(np.abs(values.data))
    return values


def fitted(rows: sp.csr_matrix, known: Evidence, strength: float) -> np.ndarray:
    """log-odds that each pair is labelled right, by a logistic model without intercept on [n, d] values that a swap
    negates; half of the training pairs are shown swapped. `strength` is the inverse of the L2 penalty."""
    out = np.zeros(rows.shape[0])
    scale = np.sqrt(np.asarray(rows.multiply(rows).mean(axis=0)).ravel())
    scaled = sp.csr_matrix(rows @ sp.diags(1 / np.maximum(scale, scale.mean() * 0.1 + 1e-12)))
    sign = np.where(random_order(known.pair_id, "swapped") < 0.5, 1.0, -1.0)
    for train, held in known.folds():
        model = LogisticRegression(C=strength / np.sqrt(rows.shape[1]), fit_intercept=False, max_iter=500)
        model.fit(sp.diags(sign[train]) @ scaled[train], sign[train])
        out[held] = model.decision_function(scaled[held])
    return out
