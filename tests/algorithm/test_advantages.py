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

    np.testing.assert_array_equal(group_advantages(reward_PG, scale_by="none"), centred)
    np.testing.assert_allclose(group_advantages(reward_PG, scale_by="std"), scaled, rtol=1e-6)


def trl_advantages(reward_PG):
    """TRL 1.16, grpo_trainer.py, scale_rewards "group": the sample's deviation, plus 1e-4."""
    reward_PG = np.asarray(reward_PG, np.float64)
    known_PG = ~np.isnan(reward_PG)
    adv_PG = reward_PG - np.nanmean(reward_PG, axis=1, keepdims=True)
    variance_P1 = np.nansum(adv_PG**2, axis=1, keepdims=True) / (known_PG.sum(1)[:, None] - 1)
    return np.where(known_PG, adv_PG / (np.sqrt(variance_P1) + 1e-4), 0)


@pytest.mark.parametrize(
    "reward_PG",
    [
        # Deviation of a sample: sqrt(0.5) of (0, 1), so 0.707 each where "std" has 1.
        [[0.0, 1.0], [3.0, -4.0]],
        [[0.0, 1.0, 0.0, 0.0], [0.0, 1.0, 2.0, 5.0]],
        [[1e-4, 0.0, 2e-4], [1e-6, 0.0, 0.0]],  # "std" takes the latter for equal
        [[np.nan, 1.0, 3.0, 0.5], [1.0, np.nan, np.nan, 2.0]],
    ],
)
def test_the_sample_deviation_is_as_trl_has_it(reward_PG):
    got = group_advantages(jnp.array(reward_PG), scale_by="sample_std")

    np.testing.assert_allclose(got, trl_advantages(reward_PG), rtol=2e-6)


def test_the_sample_deviation_differs_by_a_factor_of_the_group():
    # Rewards 0 and 1 in a group of four: sqrt(3 / 4) of "std", but for the 1e-4.
    reward_PG = jnp.array([[0.0, 1.0, 1.0, 0.0]])
    ours, theirs = (group_advantages(reward_PG, scale_by=s) for s in ("std", "sample_std"))
    np.testing.assert_allclose(theirs / ours, np.full((1, 4), np.sqrt(0.75)), rtol=3e-4)


def test_a_group_is_judged_against_itself_alone():
    reward_PG = jnp.array([[0.0, 1.0], [100.0, 101.0]])

    got = group_advantages(reward_PG, scale_by="std")

    np.testing.assert_array_equal(got, [[-1, 1], [-1, 1]])


def test_rewards_that_differ_by_next_to_nothing_count_as_equal():
    got = group_advantages(jnp.array([[1e-4, 0.0, 0.0], [3e-4, 0.0, 0.0]]), scale_by="std")
    np.testing.assert_allclose(got, [[0, 0, 0], np.array([2, -1, -1]) / np.sqrt(2)], rtol=1e-5)


@pytest.mark.parametrize("scale_by", ["none", "std", "sample_std"])
@pytest.mark.parametrize("group", [3, 6, 7])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -0.9, 12345.678])
def test_equal_rewards_give_exact_zeros(group, reward, scale_by):
    got = group_advantages(jnp.full((2, group), reward), scale_by=scale_by)

    np.testing.assert_array_equal(got, np.zeros((2, group)))


@pytest.mark.parametrize("scale_by", ["none", "std", "sample_std"])
def test_a_group_of_one_gives_zero(scale_by):
    got = group_advantages(jnp.array([[0.3], [7.0]]), scale_by=scale_by)

    np.testing.assert_array_equal(got, [[0], [0]])


def test_rewards_of_any_type_give_float32():
    assert group_advantages(jnp.array([[0, 1]]), scale_by="std").dtype == jnp.float32
    assert group_advantages(jnp.array([[0, 1]], jnp.bfloat16), scale_by="std").dtype == jnp.float32


@pytest.mark.parametrize("scale_by", ["none", "std", "sample_std"])
def test_unknown_rewards_stand_aside(scale_by):
    # Of [?, 1, 3, ?]: mean 2, std 1, of a sample sqrt(2). Unknown rewards alone give zeros.
    nan = float("nan")
    reward_PG = jnp.array([[nan, 1.0, 3.0, nan], [nan] * 4, [5.0, nan, nan, nan]])
    got = group_advantages(reward_PG, scale_by=scale_by)
    a = {"none": 1, "std": 1, "sample_std": 1 / (np.sqrt(2) + 1e-4)}[scale_by]
    np.testing.assert_allclose(got, [[0, -a, a, 0], [0] * 4, [0] * 4], rtol=1e-6)
