"""The benches of SAE steps and of trainings that take turns, on a tiny size."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench import sae as bench
from bench import sae_quality
from bench.sae_end_to_end import Turns

TINY = bench.Size(64, 16, 128, 4)


def test_all_ways_start_alike_and_ours_has_the_loss_of_dense_autograd():
    x = torch.randn(TINY.batch, TINY.d, generator=torch.Generator().manual_seed(0))
    dead = torch.arange(TINY.latents) < 12
    ways = {name: bench.WAYS[name](TINY, "cpu") for name in ("dense", "ours")}
    bench.same_start(ways, TINY, x)
    for mask in (None, dead):
        losses = [way.loss(x, mask) for way in ways.values()]
        torch.testing.assert_close(losses[0], losses[1])
        gradients = [
            torch.autograd.grad(loss, list(way.module.parameters()))
            for loss, way in zip(losses, ways.values(), strict=True)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_figures_are_medians_over_rounds_of_what_was_timed(capsys):
    found = bench.measure(TINY, "cpu", 2, ["dense", "ours"], ["passes", "step_aux"])
    assert {name: set(kinds) for name, kinds in found["seconds"].items()} == {
        name: {"passes", "step_aux"} for name in ("dense", "ours")
    }
    assert bench.ratio(found, "dense") > 0
    assert bench.ratio(found, "dense", "step") is None
    assert bench.ratio(found, "sparsify") is None
    found["seconds"] = {"dense": {"passes": [4.0, 6.0, 100.0]}, "ours": {"passes": [1.0, 2.0, 20.0]}}
    assert bench.ratio(found, "dense") == 4.0
    bench.show(found | {"peak_mb": {"dense": {"passes": 5.0}, "ours": {"passes": 2.0}}})
    assert "6.000 (5)" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "name"), [("sae_lens", "saelens"), ("sae_lens", "saelens_sparse"), ("sparsify", "sparsify")]
)
def test_peers_take_a_step(module, name):
    pytest.importorskip(module)
    x = torch.randn(TINY.batch, TINY.d, generator=torch.Generator().manual_seed(0))
    way = bench.WAYS[name](TINY, "cpu")
    bench.same_start({name: way}, TINY, x)
    work = bench.Work(way, x, torch.arange(TINY.latents) < 12)
    work.step()
    work.step_aux()
    assert all(p.grad.abs().max() > 0 for p in way.module.parameters())


@pytest.mark.parametrize("name", ["reference", "dense", "plain", "ours"])
def test_trainings_that_are_compared_learn(name, monkeypatch):
    monkeypatch.setattr(sae_quality, "LATENTS", 64)
    monkeypatch.setattr(sae_quality, "BATCH", 32)
    monkeypatch.setattr(sae_quality, "RATE", 5e-3)
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))[torch.arange(400) % 8]
    x = x + 0.1 * torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    first, last = (sae_quality.held_out(sae_quality.train(name, x, steps, 0), x) for steps in (1, 40))
    assert last["nmse"] < 0.7 * first["nmse"]
    assert 0 <= last["dead"] <= 1


def test_trainings_take_turns_and_the_first_to_end_waits_for_the_other(tmp_path):
    file, seen = tmp_path / "turns", []
    file.write_text("0")

    def work(name: str, leads: bool) -> None:
        turns = Turns(file, second=name == "two", leads=leads)
        turns.begin()
        for number in range(3):
            seen.append((name, leads, number))
            turns.end(last=number == 2)
        seen.append((name, leads, "over"))

    with ThreadPoolExecutor(3) as pool:
        ways = [("one", True), ("two", True), ("two", False)]
        for ended in [pool.submit(work, *way) for way in ways]:
            ended.result(timeout=20)
    plain = [(name, number) for name, leads, number in seen if leads]
    assert plain[:5] == [("one", 0), ("two", 0), ("one", 1), ("two", 1), ("one", 2)]
    assert plain[5] == ("two", 2)
    assert set(plain[6:]) == {("one", "over"), ("two", "over")}
    assert [number for _, leads, number in seen if not leads] == [0, 1, 2, "over"]
