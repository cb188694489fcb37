"""A probe of the trunk to which pairs count more the more alike their prompts are, in time and memory linear in pairs.

Two pairs are as alike as the inner product of their responses times 1 + 5 max(0, cosine of their prompts). That is the
kernel of a model that is linear in the response, with weights of its own for every prompt. The likeness of prompts is
read at landmarks, prompts drawn from those fitted (Nystroem's method: Williams and Seeger 2001), so that no matrix of
pairs by pairs is needed, and none of features: the weights are one matrix, [response, landmarks].
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.optimize import minimize

LOCAL = 5.0  # how much more the pairs of a like prompt count
LANDMARKS = 256  # prompts that others are told by; these moved AUROCs by up to 0.004 (bench/RESULTS.md)
SMALLEST = 1e-3  # of the largest eigenvalue of the landmarks' likeness: what lies below is noise, or negative
STRENGTH = 0.3  # inverse of the L2 penalty, for responses scaled to a kernel of 1
ROUNDED = 0.5  # of the margin, over which the hinge's corner is rounded: then it has a gradient everywhere
ROUNDS = 50  # of L-BFGS, at most; about ten are needed


class Local(NamedTuple):
    """log-odds that a pair is labelled right: linear in its response, by weights that its prompt's likeness to the
    landmarks mixes."""

    weights: Float[ndarray, "d one_and_m"]  # everywhere, and what is added by each landmark
    landmarks: Float[ndarray, "m d"]  # prompts, of length 1
    centre: Float[ndarray, " d"]  # of the prompts
    spread: Float[ndarray, " d"]

    def __call__(self, response: Float[ndarray, "n d"], prompt: Float[ndarray, "n d"]) -> Float[ndarray, " n"]:
        likeness = _likeness(_unit((prompt - self.centre) / self.spread), self.landmarks)
        said = response @ self.weights
        return said[:, 0] + (said[:, 1:] * likeness).sum(axis=1)


def fit_local(response: Float[ndarray, "n d"], prompt: Float[ndarray, "n d"]) -> Local:
    """A support vector machine without an intercept, by its weights: pairs as they are labelled against the same pairs
    swapped. The same pairs in the same order give the same one."""
    scale = np.maximum(np.sqrt((response**2).mean(axis=0)), 1e-9)
    centre, spread = prompt.mean(axis=0), np.maximum(prompt.std(axis=0), 1e-9)
    near = _unit((prompt - centre) / spread).astype(np.float32)
    drawn = np.random.default_rng(0).choice(len(near), min(LANDMARKS, len(near)), replace=False)
    landmarks = near[np.sort(drawn)]
    values, directions = np.linalg.eigh(_likeness(landmarks, landmarks).astype(np.float64))
    kept = values > SMALLEST * max(values[-1], 1e-12)
    whitening = np.sqrt(LOCAL) * directions[:, kept] / np.sqrt(values[kept])  # [m, rank]
    mixing = np.ones((len(near), 1 + kept.sum()), dtype=np.float32)
    mixing[:, 1:] = _likeness(near, landmarks) @ whitening.astype(np.float32)
    # Scaled to a kernel that is 1 + LOCAL on its diagonal before, and 1 after, so that the strength means the same
    # whatever the width of the vectors.
    scale = scale * np.sqrt((1 + LOCAL) * max(float(((response / scale) ** 2).sum(axis=1).mean()), 1e-12))
    weights = _fitted((response / scale).astype(np.float32), mixing)
    local = weights[:, 1:] @ whitening.T
    return Local(np.hstack([weights[:, :1], local]) / scale[:, None], landmarks.astype(np.float64), centre, spread)


def _fitted(response: Float[ndarray, "n d"], mixing: Float[ndarray, "n r"]) -> Float[ndarray, "d r"]:
    """Return the weights W of least STRENGTH x sum of hinge(r_i W m_i) + |W|^2 / 2."""
    shape = response.shape[1], mixing.shape[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        margin = np.einsum("ij,ij->i", response @ weights.astype(np.float32), mixing).astype(np.float64)
        short = np.maximum(1 - margin, 0)
        corner = np.minimum(short, ROUNDED)
        total = (corner**2 / (2 * ROUNDED) + short - corner).sum()
        pull = (corner / ROUNDED).astype(np.float32)
        slope = weights - STRENGTH * (response.T @ (mixing * pull[:, None]))
        return STRENGTH * total + 0.5 * float(flat @ flat), slope.ravel()

    stop = {"maxiter": ROUNDS, "maxcor": 5, "ftol": 1e-5}
    return minimize(loss, np.zeros(shape[0] * shape[1]), jac=True, method="L-BFGS-B", options=stop).x.reshape(shape)


def _likeness(prompts: Float[ndarray, "n d"], landmarks: Float[ndarray, "m d"]) -> Float[ndarray, "n m"]:
    """Cosines of prompts of length 1. Those that have nothing in common are no evidence against each other: below 0 it
    is cut off."""
    return np.maximum(prompts @ landmarks.T, 0)


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
