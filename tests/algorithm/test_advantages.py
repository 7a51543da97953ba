"""Group-relative advantages by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm.advantages import group_advantages


def test_by_hand():
    # Mean 0.25; deviations -0.25 and 0.75; std sqrt((3 * 0.0625 + 0.5625) / 4) = 0.4330127.
    # Second group: mean 2, deviations -2, -1, 0, 3; std sqrt(14 / 4) = 1.8708287.
    reward_PG = jnp.array([[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 5.0]])
    centred = [[-0.25, 0.75, -0.25, -0.25], [-2, -1, 0, 3]]
    scaled = [
        [-0.5773503, 1.7320508, -0.5773503, -0.5773503],
        [-1.0690450, -0.5345225, 0.0, 1.6035675],
    ]

    np.testing.assert_array_equal(group_advantages(reward_PG, by_std=False), centred)
    np.testing.assert_allclose(group_advantages(reward_PG, by_std=True), scaled, rtol=1e-6)


def test_a_group_is_judged_against_itself_alone():
    reward_PG = jnp.array([[0.0, 1.0], [100.0, 101.0]])

    got = group_advantages(reward_PG, by_std=True)

    np.testing.assert_array_equal(got, [[-1, 1], [-1, 1]])


@pytest.mark.parametrize("by_std", [True, False])
@pytest.mark.parametrize("group", [3, 6, 7])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -0.9, 12345.678])
def test_equal_rewards_give_exact_zeros(group, reward, by_std):
    got = group_advantages(jnp.full((2, group), reward), by_std=by_std)

    np.testing.assert_array_equal(got, np.zeros((2, group)))


@pytest.mark.parametrize("by_std", [True, False])
def test_a_group_of_one_gives_zero(by_std):
    got = group_advantages(jnp.array([[0.3], [7.0]]), by_std=by_std)

    np.testing.assert_array_equal(got, [[0], [0]])


def test_rewards_of_any_type_give_float32():
    assert group_advantages(jnp.array([[0, 1]]), by_std=True).dtype == jnp.float32
    assert group_advantages(jnp.array([[0, 1]], jnp.bfloat16), by_std=True).dtype == jnp.float32


@pytest.mark.parametrize("by_std", [True, False])
def test_unknown_rewards_stand_aside(by_std):
    # Of [?, 1, 3, ?]: mean 2, std 1. A group of unknown rewards alone gives zeros.
    nan = float("nan")
    reward_PG = jnp.array([[nan, 1.0, 3.0, nan], [nan] * 4, [5.0, nan, nan, nan]])
    got = group_advantages(reward_PG, by_std=by_std)
    np.testing.assert_array_equal(got, [[0, -1, 1, 0], [0] * 4, [0] * 4])
