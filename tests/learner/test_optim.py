"""Learning rates by hand, and which weights decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.learner import optim


@pytest.mark.parametrize(
    ("kind", "warmup", "rates"),
    [
        ("constant", 0, [8, 8, 8, 8, 8, 8, 8, 8, 8]),
        ("constant", 4, [2, 4, 6, 8, 8, 8, 8, 8, 8]),  # a quarter of the peak at once, not 0
        ("constant", 1, [8, 8, 8, 8, 8, 8, 8, 8, 8]),
        # From 8 to 8 * 0.25 = 2 over eight updates, 0.75 each; or four after the warm-up, 1.5 each.
        ("linear", 0, [8, 7.25, 6.5, 5.75, 5, 4.25, 3.5, 2.75, 2]),
        ("linear", 4, [2, 4, 6, 8, 8, 6.5, 5, 3.5, 2]),
        # 2 + 6 (1 + cos(pi i / 4)) / 2 for i = 0 to 4, after the warm-up.
        ("cosine", 4, [2, 4, 6, 8, 8, 7.1213203, 5, 2.8786797, 2]),
    ],
)
def test_schedule_by_hand(kind, warmup, rates):
    warmup_rates = {4: [2, 4, 6, 8]}.get(warmup, [])
    schedule = optim.schedule(8.0, warmup_steps=warmup, kind=kind, num_updates=8, end_fraction=0.25)

    assert rates[: len(warmup_rates)] == warmup_rates
    np.testing.assert_allclose([schedule(i) for i in range(9)], rates, rtol=1e-6)


def adamw(**options):
    defaults = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 0.0}
    return optim.adamw(optax.constant_schedule(0.1), **defaults | options)


def test_only_matrices_decay():
    params = {
        "embed": {"embedding": jnp.full((2, 2), 3.0)},
        "layer": {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)},
        "norm": {"scale": jnp.full(2, 3.0)},
    }
    optimizer = adamw(weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)

    updates, _ = optimizer.update(zeros, optimizer.init(params), params)

    # Rate 0.1 times decay 0.5 times weight 3, and nothing else, the gradient being 0.
    np.testing.assert_allclose(updates["embed"]["embedding"], np.full((2, 2), -0.15), rtol=1e-6)
    np.testing.assert_allclose(updates["layer"]["kernel"], np.full((2, 2), -0.15), rtol=1e-6)
    assert not updates["layer"]["bias"].any()
    assert not updates["norm"]["scale"].any()


def test_clipping_by_global_norm():
    # Norm 5 is cut to 1, (0.6, 0.8); then the first moment is a tenth of it, (0.06, 0.08).
    params = {"layer": {"kernel": jnp.zeros(2)}}
    grads = {"layer": {"kernel": jnp.float32([3, 4])}}

    for clip_norm, want in ((1.0, [0.06, 0.08]), (0.0, [0.3, 0.4])):
        optimizer = adamw(clip_norm=clip_norm)
        _, state = optimizer.update(grads, optimizer.init(params), params)
        (moment,) = optax.tree.get_all_with_path(state, "mu")
        np.testing.assert_allclose(moment[1]["layer"]["kernel"], want, rtol=1e-6)


def low_precision(master_weights: bool, rate: float):
    sgd = optax.sgd(rate)
    return optim.for_params(sgd, "bfloat16", master_weights=master_weights, seed=0)


def test_bfloat16_parameters_move_by_less_than_their_last_bit():
    """1 / 32 of the step from 1 to the next bfloat16 (1 / 128), eight times."""
    params = {"kernel": jnp.ones((64, 64), jnp.bfloat16)}
    grads = {"kernel": jnp.full((64, 64), -1 / 32 / 128)}

    for master_weights in (True, False):
        optimizer = low_precision(master_weights, 1.0)
        state, now = optimizer.init(params), params
        for _ in range(8):
            updates, state = optimizer.update(grads, state, now)
            now = optax.apply_updates(now, updates)

        assert now["kernel"].dtype == jnp.bfloat16
        if master_weights:
            np.testing.assert_array_equal(
                state.params["kernel"], np.full((64, 64), 1 + 8 / 32 / 128)
            )
            assert (now["kernel"] == 1).all()
        else:  # a quarter of a step in the mean, 3 deviations being 0.023; (31 / 32)^8 did not move
            steps = np.asarray(now["kernel"].astype(jnp.float32) - 1) * 128
            assert abs(steps.mean() - 0.25) < 0.025
            assert abs((steps == 0).mean() - 0.776) < 0.025
    nearest = optax.apply_updates(params, jax.tree.map(jnp.negative, grads))
    assert (nearest["kernel"] == 1).all()  # else the test would see no difference


def test_parameters_are_their_copy_to_the_nearest():
    params = {"kernel": jax.random.normal(jax.random.key(0), (512,)).astype(jnp.bfloat16)}
    optimizer = low_precision(True, 0.1)
    state, now = optimizer.init(params), params
    for i in range(3):
        grads = {"kernel": jax.random.normal(jax.random.key(i + 1), (512,))}
        updates, state = optimizer.update(grads, state, now)
        now = optax.apply_updates(now, updates)
    np.testing.assert_array_equal(now["kernel"], state.params["kernel"].astype(jnp.bfloat16))
    assert (state.params["kernel"] != now["kernel"].astype(jnp.float32)).any()
    unchanged = optim.for_params(optax.sgd(1.0), "float32", master_weights=False, seed=0)
    assert unchanged.init(params) == optax.sgd(1.0).init(params)


def test_moments_of_bfloat16_parameters_are_float32():
    """A second moment in bfloat16 would stand still: the decay of 0.1 % is under half its last bit.

    After n equal gradients g it is (1 - 0.999^n) g^2.
    """
    params = {"kernel": jnp.ones((4, 8), jnp.bfloat16)}
    inner = adamw(beta2=0.999)
    optimizer = optim.for_params(inner, "bfloat16", master_weights=False, seed=0)
    state, gradient = optimizer.init(params), 0.5
    kept = [x.dtype for x in jax.tree.leaves(state) if x.ndim]
    assert kept == [jnp.float32] * 2
    update = jax.jit(optimizer.update)
    for _ in range(400):
        _, state = update({"kernel": jnp.full((4, 8), gradient)}, state, params)
    assert [x.dtype for x in jax.tree.leaves(state) if x.ndim] == kept
    (found,) = optax.tree.get_all_with_path(state, "nu")
    np.testing.assert_allclose(found[1]["kernel"], (1 - 0.999**400) * gradient**2, rtol=1e-4)
