"""BatchTopK decides over the whole batch, in however many pieces and by however many workers it is trained."""

import threading

import numpy as np
import pytest
import torch

from safer_ray.config.sae import SaeConfig
from safer_ray.sae.loss import sae_step
from safer_ray.sae.variants.batch_topk import BatchTopKSae, nth_largest

LATENTS, WIDTH, K = 256, 16, 8


class Group:
    """Workers in threads that sum tensors together."""

    def __init__(self, size):
        self.size = size
        self.barrier = threading.Barrier(size)
        self.given = [None] * size

    def sum_of(self, rank):
        def total(values):
            self.given[rank] = values
            self.barrier.wait(30)
            summed = torch.stack(self.given).sum(0)
            self.barrier.wait(30)
            return summed

        return total

    def run(self, work):
        found, threads = [None] * self.size, []
        for rank in range(self.size):

            def called(rank=rank):
                found[rank] = work(rank, self.sum_of(rank))

            threads.append(threading.Thread(target=called))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


class Worker:
    def __init__(self, total, size):
        self.sum, self.size = total, size


def new_sae():
    torch.manual_seed(0)
    config = SaeConfig.model_validate({"latents": LATENTS, "k": K, "variant": {"kind": "batch_topk"}})
    sae = BatchTopKSae.of(WIDTH, config)
    sae.initialise(torch.randn(512, WIDTH), 0)
    return sae.train()


@pytest.fixture
def batch():
    # Vectors of unlike sizes: the parts of the batch deserve unlike numbers of active latents.
    scale = torch.logspace(-1, 1, 96)[:, None]
    return torch.randn(96, WIDTH, generator=torch.Generator().manual_seed(1)) * scale


def fired(sae, pieces):
    """Return the active values of the pieces, in the order of their rows; 0 elsewhere."""
    rows = []
    for x in pieces:
        found = sae.active(x)
        dense = torch.zeros(len(x), LATENTS)
        dense[found.entries.rows, found.entries.features] = found.values.detach()
        rows.append(dense)
    return torch.cat(rows)


@pytest.mark.parametrize("pieces", [2, 5, 96])
def test_pieces_of_a_batch_fire_as_the_batch_does(batch, pieces):
    whole, cut = new_sae(), new_sae()
    whole.decide([batch], None)
    wanted = fired(whole, [batch])
    parts = list(batch.tensor_split(pieces))
    cut.decide(parts, Worker(lambda values: values, 1))
    found = fired(cut, parts)
    assert int((wanted > 0).sum()) == K * len(batch)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cut.threshold, whole.threshold)
    assert int(cut.batches) == int(whole.batches) == 1


def test_workers_fire_as_one_does(batch):
    whole = new_sae()
    whole.decide([batch], None)
    wanted = fired(whole, [batch])
    shares = [batch[:10], batch[10:11], batch[11:], batch[:0]]

    def work(rank, total):
        sae = made[rank]
        pieces = [shares[rank]] if len(shares[rank]) else []
        sae.decide(pieces, Worker(total, 4))
        return fired(sae, pieces) if pieces else torch.zeros(0, LATENTS), sae.threshold

    made = [new_sae() for _ in range(4)]  # here, since the seed is the process's
    found = Group(4).run(work)
    torch.testing.assert_close(torch.cat([rows for rows, _ in found]), wanted, rtol=1e-4, atol=1e-5)
    for _, threshold in found:
        torch.testing.assert_close(threshold, whole.threshold)


def test_gradients_of_pieces_sum_to_those_of_the_batch(batch):
    dead = torch.zeros(LATENTS, dtype=torch.bool)
    gradients = []
    for parts in ([batch], list(batch.tensor_split(3))):
        sae = new_sae()
        sae.decide(parts, Worker(lambda values: values, 1) if len(parts) > 1 else None)
        for x in parts:
            (sae_step(sae, x, dead, 0.0).loss * len(x) / len(batch)).backward()
        gradients.append({name: value.grad.clone() for name, value in sae.named_parameters() if value.grad is not None})
    assert "W_enc" in gradients[0]
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_nth_largest_of_all_workers_is_that_of_all_values_together(n, workers):
    rng = np.random.default_rng(n)
    values = rng.lognormal(0, 3, 60).astype(np.float32)
    values[5:9] = values[4]  # ties
    shares = np.array_split(values, workers)
    found = Group(workers).run(lambda rank, total: nth_largest(torch.from_numpy(shares[rank].copy()), n, total))
    wanted = np.sort(values)[::-1][min(n, len(values)) - 1]
    assert found == [pytest.approx(wanted, rel=0, abs=0)] * workers


def test_where_nothing_is_positive_nothing_fires(batch):
    sae = new_sae()
    with torch.no_grad():
        sae.b_enc -= 1e6
    parts = list(batch.tensor_split(3))
    sae.decide(parts, Worker(lambda values: values, 1))
    assert not fired(sae, parts).any()
    assert int(sae.batches) == 0
