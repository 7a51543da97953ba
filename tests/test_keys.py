"""No two uses share a random key, and a resumed run finds the same ones again."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from grpo_jax import keys


def test_every_use_has_a_key_of_its_own():
    used = {
        tuple(np.asarray(jax.random.key_data(keys.key_for(seed, purpose, step))))
        for seed in (0, 1, 17)
        for purpose in keys.PURPOSES
        for step in range(5)
    }

    assert len(used) == 3 * len(keys.PURPOSES) * 5


def test_keys_are_recomputed_and_stay_what_they_were():
    key = keys.key_for(3, "rollout", 7)

    assert key == keys.key_for(3, "rollout", 7)
    assert str(jax.random.key_impl(key)) == "threefry2x32"
    # Positions are part of the keys: purposes are only ever appended.
    assert keys.PURPOSES[:4] == ("init", "rollout", "evaluate", "sft")
    assert keys.PURPOSES[4:6] == ("moments", "parameters")
    by_hand = jax.random.fold_in(jax.random.key(3, impl="threefry2x32"), 1)
    assert key == jax.random.fold_in(by_hand, 7)


def test_an_unknown_purpose_is_refused():
    with pytest.raises(ValueError, match="tuple"):
        keys.key_for(0, "rolout")


@pytest.mark.parametrize("number", [0, 1, 12345, 2**31 - 1])
def test_keys_by_numpy_are_those_of_jax(number):
    key = jax.random.key(number, impl="threefry2x32")
    theirs = jax.random.fold_in(jax.random.fold_in(key, keys.PURPOSES.index("sft")), number)
    assert keys.key_for(number, "sft", number) == theirs
    assert keys.key_for(number, "sft", np.int32(number)) == theirs  # in a program
    rows = jax.vmap(lambda row: jax.random.fold_in(key, row))(np.arange(9))
    np.testing.assert_array_equal(keys.row_keys(key, 9), jax.random.key_data(rows))


def test_keys_need_no_program_of_jax(monkeypatch):
    """One for each number of rows, and three for the first key, would be a tenth of a start."""
    key = keys.key_for(1, "rollout", 2)
    for name in ("key", "fold_in", "PRNGKey", "split"):
        monkeypatch.delattr(jax.random, name)
    keys.row_keys(key, 5)
    assert keys.key_for(1, "rollout", 2) == key
