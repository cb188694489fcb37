"""The local probe against the kernel that it stands for, written out."""

import tracemalloc

import numpy as np
from sklearn.metrics import roc_auc_score

from bench.local_probe import fit_kernel, made
from safer_ray.detection.local_probe import LANDMARKS, fit_local


def test_it_finds_what_the_kernel_finds():
    response, prompt, wrong = made(4_000, width=48)
    train, held = slice(None, 1_200), slice(1_200, None)
    said = [fit(response[train], prompt[train])(response[held], prompt[held]) for fit in (fit_kernel, fit_local)]
    by_kernel, by_landmarks = (roc_auc_score(wrong[held], -values) for values in said)
    assert abs(by_kernel - by_landmarks) < 0.005
    assert np.corrcoef(said)[0, 1] > 0.97


def test_fewer_prompts_than_landmarks_are_the_kernel_itself():
    """Every prompt is a landmark then, and equal ones count as one."""
    response, prompt, _ = made(LANDMARKS, width=48)
    prompt[100:] = prompt[:156]
    said = [fit(response, prompt)(response, prompt) for fit in (fit_kernel, fit_local)]
    assert np.corrcoef(said)[0, 1] > 0.97


def test_memory_grows_with_pairs_and_not_with_their_square():
    """At 12,000 pairs a kernel's matrix alone takes 1.2 GB."""
    rng = np.random.default_rng(0)
    peaks = []
    for pairs in (3_000, 12_000):
        response, prompt = rng.normal(size=(pairs, 8)) + 0.1, rng.normal(size=(pairs, 8))
        tracemalloc.start()
        fit_local(response, prompt)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4.5 * peaks[0] < 200e6


def test_a_swapped_pair_is_said_the_opposite_of_and_the_same_pairs_fit_the_same():
    response, prompt, _ = made(300, width=48)
    model, again = fit_local(response, prompt), fit_local(response, prompt)
    assert all((one == other).all() for one, other in zip(model, again, strict=True))
    np.testing.assert_allclose(model(-response, prompt), -model(response, prompt))
