"""The picture of rewards that were tried."""

import numpy as np
import pytest

from grpo_jax.metrics import distributions
from grpo_jax.rewards import relations


@pytest.mark.parametrize("number", [1, 14])
def test_the_picture_is_written(tmp_path, number):
    rng = np.random.default_rng(0)
    value = {f"reward_{i}": rng.normal(i, 1, 50) for i in range(number)}
    value["none"], value["equal"] = np.full(50, np.nan), np.ones(50)
    value["right"] = (rng.random(50) < 0.3).astype(float)
    file = distributions.draw(value, relations.correlations(value), tmp_path / "rewards.png")
    assert file.read_bytes()[:4] == b"\x89PNG"
