"""Selections and lookups are those of `jax.numpy`, to the bit, in fewer operations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from grpo_jax.kernels import primitives

X_BNV = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
INDEX_BN2 = np.random.default_rng(1).integers(0, 7, (3, 5, 2)).astype(np.int32)
ROW_B = np.array([4, 0, 2], np.int32)
CONDITION = X_BNV > 0.3

CASES = {
    "take_along": (lambda x: primitives.take_along(x, jnp.asarray(INDEX_BN2)),
              lambda x: jnp.take_along_axis(x, INDEX_BN2, axis=-1)),
    "rows": (lambda x: primitives.rows(x, jnp.asarray([[2, 1], [0, 0]])),
             lambda x: x[jnp.asarray([[2, 1], [0, 0]])]),
    "rows of each": (lambda x: primitives.rows_of_each(x, jnp.asarray(ROW_B)),
                     lambda x: x[np.arange(3), ROW_B]),
    "where": (lambda x: primitives.where(CONDITION, x, 0.0),
              lambda x: jnp.where(CONDITION, x, 0.0)),
    "where, broadcast": (lambda x: primitives.where(CONDITION[:, :1], -1, x[..., :1]),
                         lambda x: jnp.where(CONDITION[:, :1], -1, x[..., :1])),
    "where, one condition": (lambda x: primitives.where(jnp.bool_(True), x, x[:1] * 2),
                             lambda x: jnp.where(jnp.bool_(True), x, x[:1] * 2)),
}  # fmt: skip


def operations(f, *args) -> int:
    def count(jaxpr) -> int:
        inner = (sub for e in jaxpr.eqns for sub in jaxprs_in_params(e.params))
        return len(jaxpr.eqns) + sum(map(count, inner))

    return count(jax.make_jaxpr(f)(*args).jaxpr)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_numpy_to_the_bit(name):
    ours, theirs = CASES[name]
    x = jnp.asarray(X_BNV)
    y, back = jax.vjp(ours, x)
    wanted, wanted_back = jax.vjp(theirs, x)
    assert y.dtype == wanted.dtype
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(back(jnp.sin(y))[0], wanted_back(jnp.sin(y))[0])
    assert operations(ours, x) < operations(theirs, x)


@pytest.mark.parametrize(
    "x, y", [(1.0, 2), (3, np.int32([1, 2])), (True, np.bool_([False, True])), (-np.inf, 0.5)]
)
def test_a_selection_has_the_dtype_that_numpy_gives_it(x, y):
    condition = jnp.array([True, False])
    ours, theirs = primitives.where(condition, x, y), jnp.where(condition, x, y)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_one_row_is_taken():
    ours = jax.jit(primitives.nth)(X_BNV, jnp.int32(2))
    np.testing.assert_array_equal(ours, X_BNV[2])


def test_a_place_is_split_by_the_size_of_an_axis():
    place = jnp.arange(20).reshape(4, 5)
    for ours, theirs in zip(primitives.split_index(place, 3), divmod(np.asarray(place), 3)):
        np.testing.assert_array_equal(ours, theirs)
