"""Losses of pairs, against formulas that are written out."""

import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from support.made import TINY, make_pairs, write_parts

from safer_ray.config.sections import RewardConfig
from safer_ray.errors import UserError
from safer_ray.reward import train as module
from safer_ray.reward.loss import PairLoss, label_margins, loss_of
from safer_ray.reward.train import train_reward
from safer_ray.reward.training_steps import OneProcess

CHOSEN, REJECTED, MARGINS = [1.5, -0.25, 3.0], [0.5, 1.0, -60.0], [0.0, 2.0, -1.0]
CONFIG = {"base": TINY, "max_length": 96, "epochs": 1, "batch_size": 8, "micro_batch_size": 4, "learning_rate": 3e-3}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def found(loss):
    return float(loss(*(torch.tensor(values, dtype=torch.float64) for values in (CHOSEN, REJECTED, MARGINS))))


def mean(of):
    return sum(map(of, CHOSEN, REJECTED, MARGINS)) / len(CHOSEN)


def test_bradley_terry_is_minus_the_log_of_the_chance_of_the_choice():
    assert found(PairLoss()) == pytest.approx(mean(lambda c, r, m: -math.log(sigmoid(c - r))))


def test_smoothing_takes_a_share_of_the_labels_to_be_wrong():
    wanted = mean(lambda c, r, m: -0.9 * math.log(sigmoid(c - r)) - 0.1 * math.log(sigmoid(r - c)))
    assert found(PairLoss("smoothed", 0.1)) == pytest.approx(wanted)


def test_the_least_smoothed_loss_is_where_the_chance_is_the_share_of_right_labels():
    d = torch.linspace(-5, 5, 10001, dtype=torch.float64)
    each = torch.stack([PairLoss("smoothed", 0.2)(x[None], torch.zeros(1)) for x in d])
    assert sigmoid(float(d[each.argmin()])) == pytest.approx(0.8, abs=1e-3)


def test_a_margin_is_what_the_chosen_reward_is_to_be_higher_by():
    assert found(PairLoss("margin")) == pytest.approx(mean(lambda c, r, m: -math.log(sigmoid(c - r - m))))


@pytest.mark.parametrize("loss", [PairLoss(centre=0.01), PairLoss("margin", centre=0.01)])
def test_centring_adds_the_squared_sum_of_both_rewards(loss):
    plain = found(PairLoss(loss.kind))
    assert found(loss) == pytest.approx(plain + mean(lambda c, r, m: 0.01 * (c + r) ** 2))


def test_no_loss_overflows():
    far = torch.tensor([1e4, -1e4])
    for loss in (PairLoss(), PairLoss("smoothed", 0.1), PairLoss("margin", centre=0.1)):
        assert torch.isfinite(loss(far, -far, torch.ones(2)))


def config(**values):
    return RewardConfig.model_validate(CONFIG | {"validation_percent": 25, "evaluations": 1} | values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"loss": "smoothed"}, "loss smoothed needs label_smoothing"),
        ({"label_smoothing": 0.1}, "label_smoothing is of loss smoothed, and loss is bradley_terry; leave one out"),
        ({"loss": "smoothed", "label_smoothing": 0.5}, "less than 0.5"),
        ({"centre": -1}, "greater than or equal to 0"),
        ({"loss": "hinge"}, "'bradley_terry', 'smoothed' or 'margin'"),
    ],
)
def test_a_loss_that_is_not_whole_is_an_error_of_the_config(values, said):
    with pytest.raises(ValueError, match=said):
        config(**values)


def test_a_recipe_holds_the_loss_alone_where_it_is_another():
    names = {"loss", "label_smoothing", "centre"}
    assert not names & config().recorded().keys()
    other = config(loss="smoothed", label_smoothing=0.1, centre=0.01)
    assert {name: other.recorded()[name] for name in names} == {
        "loss": "smoothed",
        "label_smoothing": 0.1,
        "centre": 0.01,
    }
    assert loss_of(other) == PairLoss("smoothed", 0.1, 0.01)


def with_margins(values):
    table = make_pairs(len(values))
    return table.set_column(
        table.schema.get_field_index("label_margin"), "label_margin", pa.array(values, pa.float32())
    )


def test_pairs_without_a_margin_have_none(caplog):
    with caplog.at_level("INFO"):
        margins = label_margins(config(loss="margin"), with_margins([1.5, None, -2.0]))
    assert margins.tolist() == [1.5, 0.0, -2.0]
    assert "1 of 3 pairs have no label_margin, which counts as 0" in caplog.text
    assert label_margins(config(), with_margins([1.0])) is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([None, None], r"reward.loss: margin reads each pair's label_margin, .* none of 2 has one; use bradley_terry"),
        ([1.0, math.inf], r"pair 'pair-001' has the label_margin inf, wanted a finite number"),
    ],
)
def test_margins_that_cannot_be_used_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        label_margins(config(loss="margin"), with_margins(values))


def test_each_pair_is_trained_on_with_its_own_margin(tmp_path, monkeypatch):
    """Also in micro-batches, and where some prompts are held out."""
    seen = {}
    step = module.reward_step

    def note(reward, batch, *given):
        if given[-1] is not None:
            seen.update(zip((pair.pair_id for pair in batch), given[-1].tolist(), strict=True))
        return step(reward, batch, *given)

    monkeypatch.setattr(module, "reward_step", note)
    pairs = write_parts(make_pairs(30), tmp_path / "pairs", 10)
    train_reward(pairs, tmp_path / "out", config(loss="margin"), OneProcess(tmp_path / "out/state"))
    assert len(seen) > 15
    assert seen == {name: float(name.removeprefix("pair-")) for name in seen}


@pytest.mark.parametrize("values", [{"loss": "smoothed", "label_smoothing": 0.3}, {"loss": "margin"}, {"centre": 0.5}])
def test_another_loss_trains_another_model(tmp_path, values):
    pairs = write_parts(make_pairs(30), tmp_path / "pairs", 10)
    weights = []
    for name, given in (("plain", {}), ("other", values)):
        train_reward(pairs, tmp_path / name, config(**given), OneProcess(tmp_path / name / "state"))
        weights.append(load_file(tmp_path / name / "model.safetensors")["score.weight"].numpy())
    assert np.abs(weights[0] - weights[1]).max() > 1e-4
