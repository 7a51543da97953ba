"""The tokens of highest entropy against NumPy."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm.token_selection import top_entropy

RNG = np.random.default_rng(0)
jitted = jax.jit(top_entropy, static_argnums=2)


def wanted(entropy, action, share):
    """TRL 1.16's get_high_entropy_mask: at or above the quantile of all action tokens."""
    if not action.any():
        return action
    return action & (entropy >= np.quantile(entropy[action].astype(np.float64), 1 - share))


@pytest.mark.parametrize("share", [1e-6, 0.2, 0.37, 0.8])
@pytest.mark.parametrize("number", [0, 1, 2, 6, 101, 600])
def test_they_are_at_or_above_the_quantile(share, number):
    entropy = RNG.gamma(0.3, size=(6, 10, 10)).astype(np.float32)
    action = (np.argsort(RNG.random(600)) < number).reshape(6, 10, 10)
    got = np.asarray(jitted(entropy, action, share))
    np.testing.assert_array_equal(got, wanted(entropy, action, share))
    assert got.sum() == min(1 + int(share * (number - 1) + 1e-9), number)


def test_they_are_those_of_trls_own_code():
    """Where TRL is installed; one process, so that nothing is gathered."""
    trl, torch = pytest.importorskip("trl"), pytest.importorskip("torch")
    keep = lambda x, **options: x  # noqa: E731
    accelerator = types.SimpleNamespace(pad_across_processes=keep, gather=keep)
    entropy = RNG.gamma(0.3, size=(60, 10)).astype(np.float32)
    action = RNG.random((60, 10)) < 0.7
    for share in (0.2, 0.37, 0.8):
        theirs = trl.GRPOTrainer.get_high_entropy_mask(
            types.SimpleNamespace(accelerator=accelerator),
            torch.tensor(entropy),
            torch.tensor(action, dtype=torch.long),
            1 - share,
        )
        np.testing.assert_array_equal(jitted(entropy, action, share), theirs.numpy())


def test_the_least_difference_counts():
    """Neighbours among the floats near 1, and the least float that is not 0."""
    entropy = RNG.permutation(1 + np.arange(16) * np.finfo(np.float32).eps).astype(np.float32)
    got = np.asarray(jitted(entropy, np.ones(16, bool), 0.3))
    np.testing.assert_array_equal(got, entropy >= np.sort(entropy)[-5])
    least = np.float32([0, np.finfo(np.float32).tiny, 0])
    assert np.asarray(jitted(least, np.ones(3, bool), 0.2)).tolist() == [False, True, False]


def test_equal_entropies_are_kept_or_left_out_together():
    entropy = np.float32([0, 0, 1, 1, 1, 1, 2, 0.5])
    everything = np.ones(8, bool)
    for share in (0.01, 0.2, 0.5):
        got = np.asarray(jitted(entropy, everything, share))
        np.testing.assert_array_equal(got, wanted(entropy, everything, share))
    # Of 8 tokens 1 + floor(1.4) = 2: the 2 and one of four equal ones, so all of these.
    assert np.asarray(jitted(entropy, everything, 0.2)).tolist() == [0, 0, 1, 1, 1, 1, 1, 0]


def test_no_entropy_at_all():
    """Greedy sampling, or only one token allowed: nothing tells the tokens apart."""
    action = jnp.array([True, True, False])
    for entropy in ([0.0, -1e-8, 3.0], [-0.0, 0.0, jnp.nan], [jnp.nan, 0.0, 1.0]):
        got = jitted(jnp.float32(entropy), action, 0.2)
        np.testing.assert_array_equal(got, action)
