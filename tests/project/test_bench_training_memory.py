"""The bench of the memory of ranks, on a small model."""

import pytest

from bench import training_memory as bench


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_that_loads_its_share_holds_little_more_than_that(tmp_path):
    """Loaded whole it was the model and its share, 1.5 of its bytes. 0.65 is measured at 300M parameters."""
    bench.random_llama(tmp_path, hidden=512, layers=8, vocabulary=8000, shards="20MB")
    for peak, size in bench.on_ranks(bench.load, tmp_path / "bfloat16"):
        assert size > 100e6
        assert 0.5 < peak / size < 0.7
