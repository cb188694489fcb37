"""The detector that audits use: a logistic model on what one reading of a pair shows, fitted across folds.

Everything read of a pair is negated when its responses are swapped. So a model that tells pairs as they are labelled
from the same pairs swapped is one fitted on planted noise, and no planting is needed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int
from numpy import ndarray
from safetensors.numpy import load_file, save_file

from safer_ray.detection.local_probe import Local, fit_local
from safer_ray.errors import UserError
from safer_ray.strategies import random_order

FILE = "combined.safetensors"
PARTS = ("margin", "score", "effect_size", "features", "probe", "local_probe")


class Readings(NamedTuple):
    """Readings of n pairs; all but `prompt` is negated when the responses are swapped."""

    margin: Float[ndarray, " n"]  # r_chosen - r_rejected
    score: Float[ndarray, " n"]  # the SAFER score
    contrast: sp.csr_matrix  # [n, latents], mean activation over the chosen response's ends minus the rejected's
    response: Float[ndarray, "n d"]  # mean layer vector of the chosen response's tokens minus the rejected one's
    prompt: Float[ndarray, "n d"]  # the same of the prompt

    def take(self, rows: Int[ndarray, " m"]) -> "Readings":
        return Readings(*(values[rows] for values in self))


class Linear(NamedTuple):
    """log-odds that a pair is labelled right, linear in values that a swap negates."""

    weights: Float[ndarray, " d"]

    def __call__(self, values: sp.csr_matrix | np.ndarray) -> np.ndarray:
        return np.asarray(values @ self.weights).ravel()


def fit_linear(
    values: sp.csr_matrix | np.ndarray, sign: np.ndarray, strength: float, scale: np.ndarray | None = None
) -> Linear:
    """Logistic regression without intercept on [n, d] values; where `sign` is -1 a pair is shown swapped.

    Args:
        strength: inverse of the L2 penalty, for one column; it is divided by the square root of their number.
        scale: of each column; its root mean square where it is not given.
    """

    from sklearn.linear_model import LogisticRegression  # here, since a fitted detector needs none of it

    if scale is None:
        square = values.power(2) if isinstance(values, sp.csr_matrix) else values**2
        scale = np.sqrt(np.asarray(square.mean(axis=0)).ravel())
        # A column that is nearly always zero would be blown up to the size of the others, noise and all.
        scale = np.maximum(scale, scale.mean() * 0.1 + 1e-12)
    # No intercept: a pair and the same pair swapped must have opposite log-odds. The penalty grows with the columns, so
    # that thousands of features do not outvote one margin.
    model = LogisticRegression(C=strength / np.sqrt(values.shape[1]), fit_intercept=False, max_iter=500)
    model.fit(sp.diags(sign) @ (values @ sp.diags(1 / scale)), sign)
    return Linear(model.coef_[0] / scale)


def fit_effect(contrast: sp.csr_matrix) -> Linear:
    """Each feature weighted by its mean contrast in units of its root mean square."""
    mean = np.asarray(contrast.mean(axis=0)).ravel()
    square = np.asarray(contrast.power(2).mean(axis=0)).ravel()
    return Linear(mean / np.sqrt(np.maximum(square, 1e-12)))


class Combined(NamedTuple):
    """A fitted detector of new pairs: its parts, and what each counts."""

    effect: Linear
    features: Linear
    probe: Linear
    local: Local
    weights: Linear  # of PARTS

    def __call__(self, read: Readings) -> np.ndarray:
        """log-odds that each pair is labelled right, [n]; low: suspicious."""
        return self.weights(self.parts(read))

    def parts(self, read: Readings) -> Float[ndarray, "n parts"]:
        columns = (
            read.margin,
            read.score,
            self.effect(read.contrast),
            self.features(root(read.contrast)),
            self.probe(read.response),
            self.local(read.response, read.prompt),
        )
        return np.stack(columns, axis=1)

    def weights_by_part(self) -> dict[str, float]:
        return dict(zip(PARTS, self.weights.weights.tolist(), strict=True))

    def save(self, directory: Path) -> None:
        """As tensors in `combined.safetensors`."""
        arrays = {name: getattr(self, name).weights for name in ("effect", "features", "probe", "weights")}
        arrays |= {f"local.{name}": values for name, values in self.local._asdict().items()}
        directory.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(values) for name, values in arrays.items()}, directory / FILE)


def load_combined(directory: Path) -> Combined:
    """Read what `Combined.save` wrote.

    Raises:
        UserError: an earlier version wrote it.
    """
    arrays = load_file(directory / FILE)
    missing = [name for name in Local._fields if f"local.{name}" not in arrays]
    if missing:
        raise UserError(
            f"{directory / FILE} has no local.{missing[0]}: an earlier version fitted this detector, in a form that is "
            "no longer read; build the bundle again, or pass --detector reward_margin"
        )
    effect, features, probe, weights = (Linear(arrays[name]) for name in ("effect", "features", "probe", "weights"))
    local = Local(*(arrays[f"local.{name}"] for name in Local._fields))
    return Combined(effect, features, probe, local, weights)


def fit_combined(read: Readings, fold: np.ndarray, pair_id: Sequence[str]) -> tuple[Combined, np.ndarray]:
    """The detector for new pairs, fitted on all of these, and its out-of-fold values of these themselves.

    Margins and scores must be out of fold already. What each part counts is learned from values that were out of fold.
    """
    sign = shown(pair_id)
    n = len(pair_id)
    parts = np.zeros((n, len(PARTS)))
    for train, held in splits(fold):
        # Stacking (Wolpert 1992): the weights of the parts are learned from values of pairs that no part was fitted on.
        parts[held] = _fit_parts(read.take(train), sign[train]).parts(read.take(held))
    scale = np.maximum(parts.std(axis=0), 1e-12)
    values = np.zeros(n)
    for train, held in splits(fold):
        values[held] = fit_linear(parts[train], sign[train], 1.0, scale)(parts[held])
    return _fit_parts(read, sign)._replace(weights=fit_linear(parts, sign, 1.0, scale)), values


def _fit_parts(read: Readings, sign: np.ndarray) -> Combined:
    return Combined(
        fit_effect(read.contrast),
        fit_linear(root(read.contrast), sign, 0.3),
        fit_linear(read.response, sign, 0.03),
        fit_local(read.response, read.prompt),
        Linear(np.ones(len(PARTS))),
    )


def root(values: sp.csr_matrix) -> sp.csr_matrix:
    """Signed square roots, so that a few large activations do not decide alone."""
    values = values.copy()
    values.data = np.sign(values.data) * np.sqrt(np.abs(values.data))
    return values


def shown(pair_id: Sequence[str]) -> Float[ndarray, " n"]:
    """-1 for the half of the pairs, drawn by id, that a model is shown swapped; otherwise 1."""
    return np.where(random_order(list(pair_id), "swapped") < 0.5, 1.0, -1.0)


def splits(fold: np.ndarray) -> Iterator[tuple[Int[ndarray, " train"], Int[ndarray, " held"]]]:
    """Rows of the other folds, and of the fold itself, fold by fold; a single fold judges what it was fitted on."""
    folds = np.unique(fold)
    for number in folds:
        train = fold != number if len(folds) > 1 else fold == number
        yield np.flatnonzero(train), np.flatnonzero(fold == number)
