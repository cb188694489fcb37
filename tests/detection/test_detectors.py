"""Detectors on evidence that is made so that each can be right, and none can peek."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file
from scipy.stats import spearmanr

from safer_ray.detection import detectors
from safer_ray.detection.combined import Readings, fit_combined, load_combined, splits
from safer_ray.detection.detectors import DETECTORS, Evidence, fitted
from safer_ray.detection.quality import measure
from safer_ray.errors import UserError
from safer_ray.features.codes import contrasts

N, LATENTS = 900, 40
LEARN = [name for name in DETECTORS if name not in ("random", "length", "ensemble_variance")]


def made(seed=0, swaps=0.06):
    """Pairs whose truth shows noisily in margins, a score, sparse contrasts, words and head vectors; some swapped."""
    rng = np.random.default_rng(seed)
    planted = rng.random(N) < swaps
    label = np.where(planted, -1.0, 1.0)
    truth = label * 1.0  # +1: the labelled order is the true one
    margin = truth[:, None] * 1.0 + rng.normal(size=(N, 3)) * 1.2
    active = rng.random((N, LATENTS)) < 0.3
    pull = rng.normal(size=LATENTS)
    dense = active * (truth[:, None] * np.sign(pull) * np.abs(rng.normal(0.4, 1, (N, LATENTS))))
    good, bad = ["kind", "safe", "calm"], ["cruel", "harm", "rage"]
    texts = [[" ".join(rng.choice(w, 4)) for w in (good, bad)] for _ in range(N)]
    noisy = rng.random(N) < 0.25
    sides = [t[::-1] if (p ^ q) else t for t, p, q in zip(texts, planted, noisy, strict=True)]
    head = truth[:, None] * 0.5 + rng.normal(size=(N, 8))
    clean = {fold: 0.5 + rng.normal(size=(60, 8)) for fold in range(3)}
    known = Evidence(
        pair_id=[f"p{i}" for i in range(N)],
        fold=np.arange(N) % 3,
        chosen=[s[0] for s in sides],
        rejected=[s[1] + "!" * int(rng.integers(0, 9)) for s in sides],
        margin=margin,
        score_paper=truth + rng.normal(size=N) * 2.5,
        read=Readings(
            margin=margin[:, 0],
            score=truth + rng.normal(size=N) * 1.5,
            contrast=sp.csr_matrix(dense),
            response=dense[:, :20] + dense[:, 20:],
            prompt=rng.normal(size=(N, 5)),
        ),
        head=head,
        clean_head=clean,
    )
    return known, planted


KNOWN, PLANTED = made()


@pytest.mark.parametrize("name", LEARN)
def test_a_detector_finds_what_its_evidence_shows(name):
    assert measure(DETECTORS[name](KNOWN), PLANTED).auroc > 0.65


def test_combined_beats_what_it_is_made_of():
    best = max(measure(DETECTORS[name](KNOWN), PLANTED).auroc for name in ("ensemble_mean", "safer", "tfidf"))
    assert measure(DETECTORS["combined"](KNOWN), PLANTED).auroc > best


def test_chance_is_chance_and_the_same_every_time():
    assert measure(DETECTORS["random"](KNOWN), PLANTED).auroc == pytest.approx(0.5, abs=0.1)
    assert (DETECTORS["random"](KNOWN) == DETECTORS["random"](KNOWN)).all()


def test_a_longer_rejected_response_is_suspicious():
    values = DETECTORS["length"](dataclasses.replace(KNOWN, chosen=["ab"] * N, rejected=["abcd"] * N))
    assert (values == 2).all()


def swapped_readings(read, sign):
    return Readings(
        margin=read.margin * sign,
        score=read.score * sign,
        contrast=sp.csr_matrix(sp.diags(sign) @ read.contrast),
        response=read.response * sign[:, None],
        prompt=read.prompt,
    )


def swapped(known, rows):
    """The same pairs with the sides of some exchanged."""
    sign = np.ones(N)
    sign[rows] = -1
    sides = [(r, c) if s < 0 else (c, r) for c, r, s in zip(known.chosen, known.rejected, sign, strict=True)]
    return dataclasses.replace(
        known,
        chosen=[c for c, _ in sides],
        rejected=[r for _, r in sides],
        margin=known.margin * sign[:, None],
        score_paper=known.score_paper * sign,
        read=swapped_readings(known.read, sign),
        head=known.head * sign[:, None],
    )


@pytest.mark.parametrize("name", ["tfidf", "effect_size", "features", "probe", "local_probe", "neighbours"])
def test_what_a_pair_is_labelled_teaches_nothing_about_its_own_fold(name):
    """Swap every pair of fold 0: its values change their sign and nothing else."""
    inside = KNOWN.fold == 0
    before, after = DETECTORS[name](KNOWN), DETECTORS[name](swapped(KNOWN, inside))
    np.testing.assert_allclose(after[inside], -before[inside], rtol=1e-4, atol=1e-4)


def test_a_linear_model_is_fitted_on_other_folds_alone():
    """A column that is right in fold 0 and wrong elsewhere."""
    column = np.where(KNOWN.fold == 0, 1.0, -1.0)[:, None]
    values = fitted(sp.csr_matrix(column), KNOWN, 1.0)
    assert (values[KNOWN.fold == 0] < 0).all()


def test_a_single_fold_is_in_sample():
    folds = list(splits(np.zeros(N, dtype=np.int64)))
    assert len(folds) == 1
    assert (folds[0][0] == folds[0][1]).all()
    assert len(folds[0][0]) == N


def test_the_detector_for_new_pairs_finds_errors_in_pairs_it_was_not_fitted_on():
    model, values = fit_combined(KNOWN.read, KNOWN.fold, KNOWN.pair_id)
    fresh, planted = made(seed=1)
    assert measure(-model(fresh.read), planted).auroc > 0.7
    np.testing.assert_allclose(-values, DETECTORS["combined"](KNOWN))


def test_a_swap_negates_what_a_detector_says():
    model, _ = fit_combined(KNOWN.read, KNOWN.fold, KNOWN.pair_id)
    negated = model(swapped_readings(KNOWN.read, -np.ones(N)))
    np.testing.assert_allclose(negated, -model(KNOWN.read), rtol=1e-9, atol=1e-9)


def test_a_saved_detector_says_the_same(tmp_path):
    model, _ = fit_combined(KNOWN.read, KNOWN.fold, KNOWN.pair_id)
    model.save(tmp_path)
    assert (load_combined(tmp_path)(KNOWN.read) == model(KNOWN.read)).all()
    assert set(model.weights_by_part()) == {"margin", "score", "effect_size", "features", "probe", "local_probe"}


def test_a_detector_of_an_earlier_version_is_refused_with_the_remedy(tmp_path):
    """Its local probe held support pairs."""
    model, _ = fit_combined(KNOWN.read, KNOWN.fold, KNOWN.pair_id)
    model.save(tmp_path)
    kept = load_file(tmp_path / "combined.safetensors")
    old = {name: values for name, values in kept.items() if name not in ("local.weights", "local.landmarks")}
    save_file(old | {"local.dual": np.ones(3)}, tmp_path / "combined.safetensors")
    told = "no local.weights: an earlier version fitted this detector, .*; build the bundle again, or pass --detector"
    with pytest.raises(UserError, match=told):
        load_combined(tmp_path)


def test_pairs_of_like_prompts_teach_a_local_probe_more():
    """What makes a response good depends on the prompt's kind: one linear probe cannot tell, a local one can."""
    rng = np.random.default_rng(0)
    kind = rng.choice([-1.0, 1.0], N)
    response = rng.normal(size=(N, 6))
    response[:, 0] = kind * np.abs(response[:, 0])  # more of it is good on one kind of prompt, bad on the other
    prompt = np.stack([kind * 3, rng.normal(size=N)], axis=1)
    wrong = rng.random(N) < 0.1
    response[wrong] *= -1
    told = dataclasses.replace(KNOWN, read=KNOWN.read._replace(response=response, prompt=prompt))
    assert measure(DETECTORS["local_probe"](told), wrong).auroc > 0.9
    assert measure(DETECTORS["probe"](told), wrong).auroc < 0.65


def test_confident_learning_orders_as_the_margin_where_classes_are_even():
    assert spearmanr(DETECTORS["confident_learning"](KNOWN), -KNOWN.margin[:, 0]).statistic > 0.9


def test_influence_is_the_gradient_at_the_head():
    """By autograd: how the clean set's loss would rise with the step that the pair asks for."""
    import torch

    weight = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    rows = np.flatnonzero(KNOWN.fold == 1)[:5]
    one = dataclasses.replace(KNOWN, margin=np.zeros((N, 1)))  # at these weights every margin is 0
    clean = torch.tensor(KNOWN.clean_head[1])
    (towards_clean,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(clean @ weight).mean(), weight)
    values = detectors.influence(one)
    for row in rows:
        loss = -torch.nn.functional.logsigmoid(torch.tensor(KNOWN.head[row]) @ weight)
        (own,) = torch.autograd.grad(loss, weight)
        assert values[row] == pytest.approx(-2 * float(own @ towards_clean), rel=1e-6)


def test_contrasts_are_means_over_ends():
    from safer_ray import schema

    row = {"pair_id": "a"}
    for side, features, values in (
        ("chosen", [[9], [1, 3], [3]], [[5.0], [2.0, 1.0], [3.0]]),
        ("rejected", [[9], [1]], [[5.0], [4.0]]),
    ):
        token = [1, 7, 14][: len(features)]
        row |= {f"{side}_token": token, f"{side}_end": token, f"{side}_features": features, f"{side}_values": values}
        row |= {
            f"{side}_prompt_tokens": 2,
            f"{side}_truncated": False,
            f"{side}_fallback": False,
            f"{side}_reward": 0.0,
        }
    found = contrasts(schema.table([row], schema.CODES), 10).toarray()
    assert found[0].tolist() == [0, 2.0 / 2 - 4.0, 0, 4.0 / 2, 0, 0, 0, 0, 0, 0]
