"""Losses of pairs: what a reward model in training is told about two rewards."""

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from safer_ray.config.reward import RewardConfig
from safer_ray.errors import UserError

log = logging.getLogger(__name__)
Rewards = Float[Tensor, " n"]


def bradley_terry(margin: Rewards) -> Float[Tensor, ""]:
    """Return -log sigmoid(r_chosen - r_rejected), the mean over pairs (Bradley and Terry 1952)."""
    # `logsigmoid` stays finite where log(sigmoid) would be that of 0.
    return -logsigmoid(margin).mean()


@dataclass(frozen=True)
class PairLoss:
    """A loss of pairs, as a config asks for it."""

    kind: Literal["bradley_terry", "smoothed", "margin"] = "bradley_terry"
    smoothing: float = 0.0  # share of the labels that are taken to be wrong
    centre: float = 0.0  # coefficient of (r_chosen + r_rejected)^2

    def __call__(self, chosen: Rewards, rejected: Rewards, label_margins: Rewards | None = None) -> Float[Tensor, ""]:
        """Return the mean loss over pairs, of margins d = r_chosen - r_rejected:

        - `bradley_terry`: -log sigmoid(d);
        - `smoothed`: -(1 - e) log sigmoid(d) - e log sigmoid(-d), of a share e of wrong labels (label smoothing,
          Szegedy et al. 2016, arXiv 1512.00567, for rewards Wang et al. 2024, arXiv 2401.06080);
        - `margin`: -log sigmoid(d - m), of `label_margins` m (Touvron et al. 2023, Llama 2, arXiv 2307.09288,
          equation 2);

        and centre * (r_chosen + r_rejected)^2, which keeps rewards around 0 (Eisenstein et al. 2023, arXiv 2312.09244;
        TRL's `center_rewards_coefficient`).
        """
        margin = chosen - rejected
        if self.kind == "margin" and label_margins is not None:
            margin = margin - label_margins
        loss = bradley_terry(margin)
        if self.smoothing:
            loss = (1 - self.smoothing) * loss + self.smoothing * bradley_terry(-margin)
        if self.centre:
            loss = loss + self.centre * (chosen + rejected).square().mean()
        return loss


BRADLEY_TERRY = PairLoss()


def loss_of(config: RewardConfig) -> PairLoss:
    """Return the loss that a config asks for."""
    return PairLoss(config.loss, config.label_smoothing or 0.0, config.centre)


def label_margins(config: RewardConfig, pairs: pa.Table) -> Float[Tensor, " n"] | None:
    """Return by how much the chosen reward of each pair is to be higher, 0 where it has no `label_margin`; None where
    the loss reads none.

    Raises:
        UserError: no pair has one, or one is no finite number.
    """
    if config.loss != "margin":
        return None
    column = pairs["label_margin"]
    without = column.null_count
    if without == len(pairs):
        raise UserError(
            "reward.loss: margin reads each pair's label_margin, which its own scores or ratings give, and none of "
            f"{len(pairs)} has one; use bradley_terry"
        )
    values = column.fill_null(0).to_numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise UserError(
            f"reward.loss: margin: pair {pairs['pair_id'][int(bad[0])].as_py()!r} has the label_margin "
            f"{values[bad[0]]}, wanted a finite number; leave it out (pairs.sources.where)"
        )
    if without:
        log.info("reward: %d of %d pairs have no label_margin, which counts as 0", without, len(pairs))
    return torch.from_numpy(values.astype(np.float32))
