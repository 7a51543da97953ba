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
