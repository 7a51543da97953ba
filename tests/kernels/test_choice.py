"""Kernels that do not compute what a model needs are passed over, or refused by name."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.kernels import attention, choice
from grpo_jax.kernels.kv_cache import RingCache

CAPPED = dataclasses.replace(tiny.GEMMA, head_size=128, num_kv_heads=2)
UNCAPPED = dataclasses.replace(CAPPED, attention_cap=None)


def mesh(platform: str) -> SimpleNamespace:
    """What the choice reads of devices that are not there."""
    device = SimpleNamespace(platform=platform, device_kind="", compute_capability="9.0")
    shape = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    return SimpleNamespace(devices=np.array([device]), shape=shape)


@pytest.mark.parametrize(("platform", "named"), [("gpu", "cudnn"), ("tpu", "splash")])
def test_scores_that_are_capped_are_scored_without_a_kernel(platform, named):
    devices = mesh(platform)
    assert choice.choose(named, UNCAPPED, devices, jnp.bfloat16) is not attention
    with pytest.warns() if platform == "tpu" else pytest.MonkeyPatch.context():
        assert choice.choose("auto", CAPPED, devices, jnp.bfloat16) is attention
    with pytest.raises(ValueError, match=rf'"{named}": the model caps its attention scores at 4,'):
        choice.choose(named, CAPPED, devices, jnp.bfloat16)


@pytest.mark.parametrize(("platform", "named"), [("gpu", "triton"), ("tpu", "ragged")])
def test_scores_that_are_capped_are_decoded_without_a_kernel(platform, named):
    devices = mesh(platform)
    without = [dataclasses.replace(layer, window=None) for layer in CAPPED.layers]
    capped = dataclasses.replace(CAPPED, layers=tuple(without))  # Triton's has no windows
    of = lambda option, model: choice.choose_decoding(option, "auto", model, devices, jnp.bfloat16)  # noqa: E731
    assert type(of(named, dataclasses.replace(capped, attention_cap=None))) is not RingCache
    assert type(of("auto", capped)) is RingCache
    with pytest.raises(ValueError, match="the model caps its attention scores at 4,"):
        of(named, capped)


def test_a_cap_by_hand():
    np.testing.assert_allclose(
        attention.capped(jnp.array([0.0, 2.0, -1e9]), 2.0), [0, 2 * np.tanh(1), -2], rtol=1e-6
    )
    score = jnp.ones(3)
    assert attention.capped(score, None) is score
