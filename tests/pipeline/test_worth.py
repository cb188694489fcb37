"""What a reference of dependent pairs is worth."""

import numpy as np
import pyarrow as pa
import pytest

from safer_ray.pipeline.reference import Taken, facts_of


@pytest.mark.parametrize(("alike", "most"), [(True, 110), (False, 400)])
def test_pairs_of_one_prompt_that_say_the_same_are_worth_the_prompt(alike, most):
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(100), 4)
    values = rng.normal(size=100)[prompts] if alike else rng.normal(size=400)
    rows = pa.table({"group": [f"g{i}" for i in prompts], "score": values, "reward_margin": values})
    found = facts_of(dict.fromkeys(("score", "reward_margin"), Taken("held out", rows)))
    assert (found["pairs"], found["prompts"]) == (400, 100)
    assert found["worth"]["score"] <= most
    assert found["worth"]["score"] > (80 if alike else 250)
