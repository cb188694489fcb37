"""Sparse products, the screened top-k, and gradients against dense autograd."""

import pytest
import torch
from support.made import random_sae

from safer_ray.sae import topk
from safer_ray.sae.loss import RelativeError, sae_step
from safer_ray.sae.model import TopKSae
from safer_ray.sae.sparse import (
    Entries,
    counted_by_latent,
    dot_products,
    gathered_products,
    gathered_sum,
    row_slices,
    summed_by_latent,
)
from safer_ray.sae.topk import InFull, Screened, above, largest, largest_of_batch, products
from safer_ray.sae.variants.batch_topk import BatchTopKSae
from safer_ray.sae.variants.signed_topk import SignedTopKSae

WIDTH, LATENTS, ROWS = 32, 2048, 50
TILES = getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def x():
    return numbers(ROWS, WIDTH, seed=1)


@pytest.fixture
def weight():
    return torch.nn.functional.normalize(numbers(LATENTS, WIDTH, seed=2))


@pytest.fixture
def bias():
    return numbers(LATENTS, seed=3) / 10


@pytest.fixture
def entries():
    """Rows with 0 to 6 entries, the first without any."""
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(0, 7, (ROWS,), generator=generator)
    counts[0] = 0
    start = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    features = torch.cat([torch.randperm(LATENTS, generator=generator)[:n].sort().values for n in counts])
    return Entries(start, features, LATENTS)


def dense(entries, values):
    return torch.zeros(entries.n, entries.latents).index_put((entries.rows, entries.features), values)


def test_sums_and_products_equal_the_dense_ones(entries, x, weight):
    values = numbers(len(entries.features))
    z = dense(entries, values)
    torch.testing.assert_close(gathered_sum(entries, values, weight), z @ weight)
    torch.testing.assert_close(summed_by_latent(entries, values, x), z.T @ x)
    torch.testing.assert_close(counted_by_latent(entries, values), z.sum(0))
    torch.testing.assert_close(dot_products(entries, x, weight), (x @ weight.T)[entries.rows, entries.features])


def test_gathering_rows_in_chunks_gives_the_same_products(entries, x, weight):
    found = gathered_products(entries, x, weight, budget=5 * WIDTH * 8)
    torch.testing.assert_close(found, dot_products(entries, x, weight))


def test_chunks_of_rows_stay_under_the_budget_and_leave_none_out():
    slices = row_slices(10, 100, 350)
    assert [(s.start, s.stop) for s in slices] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert len(row_slices(3, 100, 1)) == 3
    assert row_slices(0, 100, 350) == []


def same_codes(codes, pre, k):
    wanted = pre.topk(k)
    order = codes.features.argsort()
    assert torch.equal(codes.features.gather(1, order), wanted.indices.sort().values)
    torch.testing.assert_close(codes.values.sort().values, wanted.values.sort().values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("look", [InFull, Screened])
@pytest.mark.parametrize("k", [1, 7, 32])
def test_the_k_largest_are_found_whichever_way_is_looked(x, weight, bias, look, k, monkeypatch):
    monkeypatch.setattr(topk, "products", lambda weight, bias, k: look(weight, bias))
    same_codes(largest(x, weight, bias, k), x @ weight.T + bias, k)


@pytest.mark.parametrize("look", [InFull, Screened])
def test_chunks_change_no_code(x, weight, bias, look, monkeypatch):
    monkeypatch.setattr(topk, "products", lambda weight, bias, k: look(weight, bias))
    same_codes(largest(x, weight, bias, 7, budget=7 * LATENTS * 3), x @ weight.T + bias, 7)


def test_close_calls_are_decided_in_full_precision(x, monkeypatch):
    monkeypatch.setattr(topk, "products", lambda weight, bias, k: Screened(weight, bias))
    base = torch.nn.functional.normalize(numbers(LATENTS // 2, WIDTH, seed=5))
    weight = torch.cat([base, base + 2e-5 * numbers(LATENTS // 2, WIDTH, seed=6)])  # twins that bfloat16 cannot tell
    assert (base.bfloat16() == weight[LATENTS // 2 :].bfloat16()).float().mean() > 0.8
    same_codes(largest(x, weight, torch.zeros(LATENTS), 7), x @ weight.T, 7)


@pytest.mark.parametrize("look", [InFull, Screened])
def test_rows_with_few_positive_latents_keep_their_negative_ones(x, weight, look, monkeypatch):
    monkeypatch.setattr(topk, "products", lambda weight, bias, k: look(weight, bias))
    bias = torch.full((LATENTS,), -3.0)
    pre = x @ weight.T + bias
    assert 0 < (pre.topk(7).values > 0).all(1).sum() < ROWS
    same_codes(largest(x, weight, bias, 7), pre, 7)


def test_a_screen_that_leaves_a_crowd_is_given_up(x, monkeypatch):
    monkeypatch.setattr(topk, "products", lambda weight, bias, k: Screened(weight, bias))
    weight = 1 + 1e-4 * numbers(LATENTS, WIDTH, seed=7)
    same_codes(largest(x.abs(), weight, torch.zeros(LATENTS), 7), x.abs() @ weight.T, 7)


@pytest.mark.parametrize("look", [InFull, Screened])
def test_a_value_that_is_no_number_reaches_the_codes(x, weight, bias, look, monkeypatch):
    monkeypatch.setattr(topk, "products", lambda weight, bias, k: look(weight, bias))
    x[3, 5] = float("nan")
    codes = largest(x, weight, bias, 7)
    assert codes.values[3].isnan().all()
    assert codes.values[[2, 4]].isfinite().all()


def test_the_screen_is_used_where_the_processor_has_tiles_alone(weight, bias):
    assert isinstance(products(weight, bias, 7), Screened if TILES else InFull)
    assert isinstance(products(weight[:512], bias[:512], 7), InFull)
    assert isinstance(products(weight.double(), bias.double(), 7), InFull)


def test_no_product_is_further_off_than_the_screen_says(x, weight, bias):
    screen = Screened(100 * weight, bias)
    pre, error = screen.of(x)
    exact = x.double() @ (100 * weight).double().T + bias.double()
    off = (pre.double() - exact).abs() - pre.double().abs() * topk.ROUNDING
    assert (off <= error[:, None]).all()
    assert off.max() > 0.05 * error.max()  # nor is it far too careful


@pytest.mark.parametrize("look", [InFull, Screened])
@pytest.mark.parametrize("budget", [2**26, 9 * LATENTS * 5])
def test_the_largest_of_a_batch_are_found_in_any_chunks(x, weight, bias, look, budget, monkeypatch):
    monkeypatch.setattr(topk, "products", lambda weight, bias, k: look(weight, bias))
    entries, values = largest_of_batch(x, weight, bias, 5 * ROWS, budget)
    pre = x @ weight.T + bias
    wanted = torch.zeros(ROWS * LATENTS).index_copy(0, (t := pre.flatten().topk(5 * ROWS)).indices, t.values)
    assert len(values) == 5 * ROWS
    torch.testing.assert_close(dense(entries, values), wanted.view(ROWS, LATENTS), rtol=1e-5, atol=1e-5)
    assert entries.start.diff().unique().numel() > 1


def test_a_batch_with_fewer_positive_latents_than_wanted_has_those(x, weight):
    bias = torch.full((LATENTS,), -3.0)
    entries, values = largest_of_batch(x, weight, bias, 40 * ROWS)
    pre = x @ weight.T + bias
    assert 0 < len(values) < 40 * ROWS
    torch.testing.assert_close(dense(entries, values), pre.relu(), rtol=1e-5, atol=1e-5)


def test_what_exceeds_a_threshold_is_active(x, weight, bias):
    threshold = torch.linspace(-1, 2, LATENTS)
    pre = x @ weight.T + bias
    entries, values = above(x, weight, bias, threshold, budget=9 * LATENTS * 5)
    torch.testing.assert_close(dense(entries, values), pre.where((pre > threshold) & (pre > 0), 0))
    none = above(x, weight, bias, torch.full((LATENTS,), 99.0))
    assert len(none.values) == 0
    assert none.entries.n == ROWS


# Gradients against dense autograd


def dense_terms(sae, x, z_of, dead, k_aux):
    """Loss terms by plain autograd over dense matrices, in float64."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    weights = {name: getattr(sae, name).detach().double().requires_grad_() for name in names}
    x = x.detach().double().requires_grad_()
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    error = z_of(pre) @ weights["W_dec"] + weights["b_dec"] - x
    nmse = (error.square().sum(1) / x.square().sum(1)).mean()
    residual = -error.detach()
    chosen = pre.masked_fill(~dead, -torch.inf).topk(k_aux)
    z_aux = torch.zeros_like(pre).scatter(1, chosen.indices, chosen.values.relu())
    aux = ((z_aux @ weights["W_dec"] - residual).square().sum(1) / residual.square().sum(1)).mean()
    return nmse, aux, [*weights.values(), x]


def top_rows(k):
    def of(pre):
        found = pre.topk(k)
        return torch.zeros_like(pre).scatter(1, found.indices, found.values.relu())

    return of


def top_batch(k):
    def of(pre):
        found = pre.flatten().topk(k * len(pre))
        return torch.zeros_like(pre).flatten().scatter(0, found.indices, found.values.relu()).view_as(pre)

    return of


def filled(sae):
    source = random_sae(WIDTH, LATENTS, 4)
    with torch.no_grad():
        for name, value in source.named_parameters():
            getattr(sae, name).copy_(value)
        sae.b_enc.copy_(numbers(LATENTS, seed=8) / 5)
        sae.b_dec.copy_(numbers(WIDTH, seed=9) / 5)
    return sae


def assert_close_gradients(found, wanted):
    for one, two in zip(found, wanted, strict=True):
        assert two.abs().max() > 0
        assert (one.double() - two).norm() <= 1e-5 * two.norm()


DEAD_SHARES = {"few": 0.02, "some": 0.1, "most": 0.9}  # dense products of dead latents, with a choice, sparse ones


@pytest.mark.parametrize("share", DEAD_SHARES)
@pytest.mark.parametrize("kind", [TopKSae, BatchTopKSae])
@pytest.mark.parametrize("budget", [2**26, 9 * LATENTS * 3])
def test_gradients_of_every_term_equal_dense_autograd(x, share, kind, budget):
    sae = filled(kind(WIDTH, LATENTS, 6))
    dead = torch.rand(LATENTS, generator=torch.Generator().manual_seed(1)) < DEAD_SHARES[share]
    k_aux = min(int(dead.sum()), WIDTH // 2)
    rule = top_rows(6) if kind is TopKSae else top_batch(6)
    nmse, aux, weights = dense_terms(sae, x, rule, dead, k_aux)
    x.requires_grad_()
    given = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, x]
    for coefficient in (0.0, 1 / 32, 10.0):
        step = sae_step(sae, x, dead, coefficient, budget)
        loss = nmse + coefficient * aux
        torch.testing.assert_close(step.loss, loss.float(), rtol=1e-5, atol=1e-6)
        wanted = torch.autograd.grad(loss, weights, retain_graph=True)
        assert_close_gradients(torch.autograd.grad(step.loss, given), wanted)


def test_gradients_of_the_auxiliary_term_alone_equal_dense_autograd(x):
    sae = filled(TopKSae(WIDTH, LATENTS, 6))
    dead = torch.rand(LATENTS, generator=torch.Generator().manual_seed(1)) < 0.9
    _, aux, weights = dense_terms(sae, x, top_rows(6), dead, WIDTH // 2)
    given = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    found = torch.autograd.grad(sae_step(sae, x, dead, 1.0).loss, given)
    main = torch.autograd.grad(sae_step(sae, x, dead, 0.0).loss, given)
    wanted = torch.autograd.grad(aux, weights[:4])
    assert_close_gradients([a.double() - b.double() for a, b in zip(found, main, strict=True)][2:3], wanted[2:3])
    assert_close_gradients([a.double() - b.double() for a, b in zip(found, main, strict=True)][:2], wanted[:2])


def test_signed_activations_have_exact_gradients_too(x):
    sae = filled(SignedTopKSae(WIDTH, LATENTS, 6))
    with torch.no_grad():
        sae.b_enc -= 4

    def rule(pre):
        found = pre.topk(6)
        return torch.zeros_like(pre).scatter(1, found.indices, found.values)

    nmse, _, weights = dense_terms(sae, x, rule, torch.ones(LATENTS, dtype=torch.bool), 1)
    step = sae_step(sae, x, torch.zeros(LATENTS, dtype=torch.bool), 0.0)
    assert (sae.encode(x).values < 0).any()
    found = torch.autograd.grad(step.loss, [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])
    assert_close_gradients(found, torch.autograd.grad(nmse, weights[:4]))


def test_no_matrix_of_vectors_by_latents_outlives_its_chunk(x):
    sae = filled(TopKSae(WIDTH, LATENTS, 6))
    many = x.repeat(8, 1)
    largest_allowed = 20 * LATENTS * 4 + 4 * LATENTS * WIDTH
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    with torch.profiler.profile(profile_memory=True) as profile:
        sae_step(sae, many, dead, 0.0, budget=20 * LATENTS * 3).loss.backward()
    single = max(event.self_cpu_memory_usage / max(1, event.count) for event in profile.key_averages())
    assert single < largest_allowed < len(many) * LATENTS * 2


def test_the_relative_error_has_exact_gradients():
    guess, target = (numbers(5, 7, seed=seed).double().requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(RelativeError.apply, (guess, target))


@pytest.mark.parametrize("kind", [TopKSae, BatchTopKSae])
def test_a_step_under_autocast_gives_gradients_of_the_weights_own_type(x, kind):
    sae = filled(kind(WIDTH, LATENTS, 6))
    dead = torch.arange(LATENTS) < 20
    exact = sae_step(sae, x, dead, 1 / 32)
    with torch.autocast("cpu", torch.bfloat16):
        step = sae_step(sae, x, dead, 1 / 32)
    step.loss.backward()
    torch.testing.assert_close(step.loss, exact.loss, rtol=0.01, atol=0.01)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in sae.parameters())
