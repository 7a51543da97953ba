"""Rotary frequencies: transformers' own for every scaling, and what is folded into the rotation."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grpo_jax.kernels import rotary as rotary_lib
from grpo_jax.models import frequencies
from grpo_jax.models.families import model_config
from grpo_jax.structs import LongScaling, Rotary

SIZE, MOST = 64, 4096
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 256}
LONG = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 256,
    "short_factor": [1 + i / 64 for i in range(SIZE // 2)],
    "long_factor": [1 + i / 2 for i in range(SIZE // 2)],
}


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "linear", "factor": 3.0}, MOST),
        ({"rope_type": "proportional", "partial_rotary_factor": 0.25}, MOST),
        (YARN, MOST),
        (YARN | {"truncate": False, "beta_fast": 8, "beta_slow": 2}, MOST),
        (YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}, MOST),
        (YARN | {"attention_factor": 1.25}, MOST),
        (LONG, 256),
        (LONG, 257),
    ],
)
def test_a_scaling_equals_transformers(rope, longest):
    rope = rope | {"rope_theta": 10_000.0}
    theirs = transformers.LlamaConfig(
        rope_parameters=dict(rope), head_dim=SIZE, max_position_embeddings=MOST
    )
    want, amplitude = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, seq_len=longest)
    hf = {k: v for k, v in theirs.to_dict().items() if k not in LONG}  # version 5 notes one twice

    model = model_config(hf | {"rope_parameters": rope}, "config.json").within(longest)
    (ours,) = model.rotaries

    got = frequencies.of(ours, SIZE, model.longest or MOST)
    np.testing.assert_allclose(got, want.numpy(), rtol=3e-7)
    assert ours.amplitude == pytest.approx(amplitude, rel=1e-12)
    assert isinstance(ours.scaling, LongScaling) == (model.longest == longest)


def test_a_part_of_a_head_turns_by_hand():
    """Eight dimensions of which four turn: two pairs, by 1 and 1 / 10 a position."""
    partial = Rotary(100.0, share=0.5, amplitude=3.0)
    np.testing.assert_allclose(frequencies.of(partial, 8), [1, 0.1, 0, 0], rtol=1e-6)
    model = dataclasses.replace(tiny.MODEL, head_size=8, rotaries=(partial,))
    np.testing.assert_array_equal(frequencies.amplitudes(partial, model), [3, 3, 1, 1])
    still = Rotary(1.0, share=0.0)
    np.testing.assert_array_equal(frequencies.of(still, 8), np.zeros(4))
    assert frequencies.amplitudes(still, model) is None


def test_the_scale_of_attention_is_in_the_rotation():
    """Scores over sqrt(16) = 4 are to be times 1 / 9: queries and keys get 2 / 3 each."""
    plain = Rotary(100.0)
    model = dataclasses.replace(tiny.MODEL, head_size=16, attention_scale=1 / 9)
    factor_H = frequencies.amplitudes(plain, model)
    np.testing.assert_allclose(factor_H, np.full(8, 2 / 3), rtol=1e-6)
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 16)).astype(np.float32)
    cos_sin = rotary_lib.rotary(jnp.array([5]), frequencies.of(plain, 16), factor_H)
    score = (rotary_lib.rotate(q, cos_sin) * rotary_lib.rotate(k, cos_sin)).sum() / 4
    assert float(score) == pytest.approx(float((q * k).sum()) / 9, rel=1e-5)
