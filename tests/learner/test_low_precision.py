"""Moments in fewer bits: what they stand for, and that they are right in the mean."""

from __future__ import annotations

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import keys
from grpo_jax.learner import low_precision, optim

to_blocks = jax.jit(low_precision.to_blocks, static_argnames="signed")
from_blocks = jax.jit(low_precision.from_blocks)
to_bfloat16 = jax.jit(low_precision.to_bfloat16)
OPTIONS = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def bits_of(shape, seed=0):
    return jax.random.bits(jax.random.key(seed), shape) & 0xFFFF


def test_first_moments_by_hand():
    # Blocks of three: peaks 16 and 0. (127 / 127)^2 and (63.5 / 127)^2 = 1/4 of the peak; between
    # codes 63 and 64 it is (63 / 127)^2 = 0.24608 and (64 / 127)^2 = 0.25395, so 4 lies 0.4980 up.
    x = jnp.float32([[16, -4, 0], [0, 0, 0]])

    low = to_blocks(x, jnp.full(x.shape, 0xFFFF, jnp.uint32), signed=True)
    high = to_blocks(x, jnp.zeros(x.shape, jnp.uint32), signed=True)

    np.testing.assert_array_equal(low.codes, [[127, -63, 0], [0, 0, 0]])
    np.testing.assert_array_equal(high.codes, [[127, -64, 0], [0, 0, 0]])
    np.testing.assert_array_equal(low.peak, [[16], [0]])
    assert low.codes.dtype == jnp.int8
    want = [[16, -16 * (63 / 127) ** 2, 0], [0, 0, 0]]
    np.testing.assert_allclose(from_blocks(low), want, rtol=1e-6)


def test_second_moments_by_hand():
    # Of peak 81: 16/81 is (2/3)^4, code 170 of 255; what is tiny has code 1, never 0.
    x = jnp.float32([81, 16 * 1.0001, 1e-20, 0])

    kept = to_blocks(x, jnp.full(x.shape, 0xFFFF, jnp.uint32), signed=False)

    np.testing.assert_array_equal(kept.codes, [255, 170, 1, 0])
    assert kept.codes.dtype == jnp.uint8
    want = [81, 16, 81 / 255**4, 0]
    np.testing.assert_allclose(from_blocks(kept), want, rtol=1e-5)


@pytest.mark.parametrize(("entries", "blocks"), [(256, 2), (896, 7), (40, 1), (130, 2), (257, 257)])
def test_blocks_divide_the_last_axis(entries, blocks):
    x = jax.random.normal(jax.random.key(1), (3, entries))

    kept = to_blocks(x, bits_of(x.shape), signed=True)

    assert kept.codes.shape == x.shape and kept.peak.shape == (3, blocks)
    # A code is at most 2 * 127 / 127^2 of the peak from the next.
    assert np.abs(from_blocks(kept) - x).max() < np.abs(x).max() * 2 / 127
    np.testing.assert_array_equal(kept.peak, np.abs(x).reshape(3, blocks, -1).max(-1))


WAYS = {
    "bfloat16": lambda x, bits: to_bfloat16(x, bits).astype(jnp.float32),
    "first": lambda x, bits: from_blocks(to_blocks(x, bits, signed=True)),
    "second": lambda x, bits: from_blocks(to_blocks(x, bits, signed=False)),
}


@pytest.mark.parametrize("way", WAYS)
def test_rounding_is_right_in_the_mean(way):
    x = jnp.float32([1.0, 0.99, 0.5, 0.1234, 0.01, 3e-4, 1.0 - 1e-3, 0.7])
    every = jnp.arange(0, 2**16, 16, dtype=jnp.uint32)  # a sixteenth of all that the bits can be
    rounded = jax.vmap(lambda bits: WAYS[way](x, jnp.full(x.shape, bits)))(every)

    # All values next to each other, and their mean that of x, to a step of the bits.
    step = np.ptp(np.asarray(rounded), axis=0)
    assert (step > 0).sum() >= 6  # a moment that loses a thousandth of itself moves
    error = np.abs(np.asarray(rounded, np.float64).mean(0) - x)
    assert (error <= step * 2**-12 + 1e-6 * x).all()


def steps(transform, params, grads, count):
    state = transform.init(params)
    for _ in range(count):
        updates, state = jax.jit(transform.update)(grads, state)
    return updates, state


@pytest.mark.parametrize(("kept", "tolerance"), [("bfloat16", 0.02), ("int8", 0.05)])
def test_updates_stay_near_those_of_float32(kept, tolerance):
    """After a hundred gradients of one direction: a moment that stands still would be far off."""
    params = {"kernel": jnp.zeros((4, 256))}
    grads = {"kernel": jax.random.normal(jax.random.key(2), (4, 256))}

    ours, state = steps(
        low_precision.scale_by_adam(**OPTIONS, kept=kept, seed=0), params, grads, 100
    )
    want, _ = steps(optax.scale_by_adam(0.9, 0.99, 1e-8), params, grads, 100)

    error = np.asarray(ours["kernel"] - want["kernel"])
    assert 0 < np.sqrt((error**2).mean()) < tolerance  # updates are 1 or -1
    size = sum(x.nbytes for x in jax.tree.leaves((state.mu, state.nu)))
    assert size == {"bfloat16": 4 * 1024, "int8": 2 * 1024 + 2 * 4 * 8}[kept]


def test_moments_without_gradient_decay():
    """To the nearest, 0.9 of a small code would be that code again, for ever."""
    transform = low_precision.scale_by_adam(**OPTIONS, kept="int8", seed=0)
    params = {"kernel": jnp.zeros((1, 128))}
    _, state = steps(transform, params, {"kernel": jnp.linspace(0.001, 1, 128)[None]}, 1)
    nothing = {"kernel": jnp.zeros((1, 128)).at[0, -1].set(1.0)}  # keeps the block's peak
    update = jax.jit(transform.update)
    for _ in range(60):
        _, state = update(nothing, state)

    assert np.abs(from_blocks(state.mu["kernel"])[0, :-1]).max() < 0.01
    left = from_blocks(state.nu["kernel"])[0, :-1] / (0.01 * np.linspace(0.001, 1, 128)[:-1] ** 2)
    np.testing.assert_allclose(left[64:].mean(), 0.99**60, rtol=0.1)


def test_the_chance_follows_from_seed_and_count():
    params, grads = {"kernel": jnp.zeros((4, 64))}, {"kernel": jnp.ones((4, 64)) * 0.3}

    def codes(seed, count):
        transform = low_precision.scale_by_adam(**OPTIONS, kept="bfloat16", seed=seed)
        return steps(transform, params, grads, count)[1].mu["kernel"]

    np.testing.assert_array_equal(codes(0, 2), codes(0, 2))
    assert (codes(0, 1) != codes(1, 1)).any()
    key, other = (keys.key_for(0, "moments", count) for count in (1, 2))
    bits = [
        low_precision.random_bits(k, (3,), after) for k in (key, other) for after in ([], [key])
    ]
    assert len({int(x) for each in bits for x in each}) == 12


@pytest.mark.parametrize(
    "transform",
    [
        low_precision.scale_by_adam(**OPTIONS, kept="int8", seed=0),
        optim.stochastic_rounding(optax.sgd(0.1), seed=0),
    ],
    ids=["moments", "parameters"],
)
def test_bits_of_an_array_are_drawn_after_the_array_before_it(transform):
    """What is drawn for the second array waits for what the first became."""
    params = {name: jnp.zeros((2, 128), jnp.bfloat16) for name in "ab"}

    def second(first):
        grads = {"a": first, "b": jnp.ones((2, 128))}
        return transform.update(grads, transform.init(params), params)

    jaxpr = jax.make_jaxpr(second)(jnp.ones((2, 128))).jaxpr
    (barrier,) = [e for e in jaxpr.eqns if e.primitive.name == "optimization_barrier"]
    reached = {jaxpr.invars[0]}
    for eqn in jaxpr.eqns[: jaxpr.eqns.index(barrier)]:
        if reached & {v for v in eqn.invars if isinstance(v, jax.extend.core.Var)}:
            reached |= set(eqn.outvars)
    assert reached & set(barrier.invars)
    after = jaxpr.eqns[jaxpr.eqns.index(barrier) :]
    assert any(barrier.outvars[0] in e.invars for e in after)  # the key
