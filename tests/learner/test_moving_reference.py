"""The reference mixed with the policy."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

from grpo_jax.learner.moving_reference import make_refresh


@pytest.mark.parametrize(("mix", "dtype"), [(0.6, "float32"), (0.3, "bfloat16"), (1.0, "float32")])
def test_the_mean_of_policy_and_reference(mix, dtype):
    policy = tiny.params()
    reference, before = (jax.tree.map(lambda x: x.astype(dtype), tiny.params(7)) for _ in range(2))

    got = make_refresh(tiny.MODEL, tiny.one_device(), mix)(policy, reference)

    def check(got, policy, before):
        assert got.dtype == before.dtype == dtype
        want = mix * np.float64(policy) + (1 - mix) * np.float64(before)
        tolerance = {"float32": 2e-7, "bfloat16": 2**-8}[dtype]
        np.testing.assert_allclose(np.float64(got), want, rtol=tolerance, atol=1e-6)
        if mix == 1:
            np.testing.assert_array_equal(got, policy)

    jax.tree.map(check, got, policy, before)
    assert all(x.is_deleted() for x in jax.tree.leaves(reference))
    assert not any(x.is_deleted() for x in jax.tree.leaves(policy))
