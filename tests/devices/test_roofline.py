"""The least arithmetic and traffic of a step, counted by hand for a network of a few weights."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.devices import roofline
from grpo_jax.devices.roofline import Work
from grpo_jax.sampling import decode
from grpo_jax.sampling.engine import Engine
from grpo_jax.structs import Layer, ModelConfig, Rotary, Sampling

# Width 4, 1 head of 2: q, k, v, o are 4 x 2, gate, up, down 4 x 3, norms 3 x 4.
# Body: 4 * 8 + 3 * 12 + 12 = 80 weights; head 5 * 4 = 20.
MODEL = ModelConfig(
    family="llama", vocab_size=5, width=4, mlp_width=3, layers=(Layer(),), num_heads=1,
    num_kv_heads=1, head_size=2, rotaries=(Rotary(1e4),), norm_eps=1e-6, max_position=64,
    tied_head=False,
)  # fmt: skip
PROMPTS, COMPLETIONS = np.array([2, 4]), np.array([[1, 3], [2, 2]])


def test_a_pass_computes_each_prompt_once():
    # Tokens: 2 + 4 of prompts, 1 + 3 + 2 + 2 = 8 of completions.
    # Pairs: prompts 2^2/2 + 4^2/2 = 10; completions with their prompt 2 + 6 + 8 + 8 = 24, with
    # themselves (1 + 9 + 4 + 4) / 2 = 9. Each is two products of 2 numbers: 4 * 2 * 43.
    work = roofline.forward(MODEL, PROMPTS, COMPLETIONS)
    assert work == Work(2 * 80 * 14 + 8 * 43 + 2 * 20 * 8)


def test_decoding_reads_weights_once_a_position_and_prompts_once_a_group():
    # Cache: 8 bytes a token. Own: 8 * 9; of prompts: 2 tokens for 3 positions, 4 for 2: 8 * 14.
    # Logits: 3 * 4 bytes * 5 * 8 tokens. Weights: 200 bytes, 3 positions.
    read = {"weights": 200, "cache": 8}
    work = roofline.rollout(MODEL, PROMPTS, COMPLETIONS, **read)
    assert work == Work(
        roofline.forward(MODEL, PROMPTS, COMPLETIONS).flops, 8 * 9 + 8 * 14 + 480, 600
    )
    halves = roofline.rollout(MODEL, PROMPTS, COMPLETIONS, **read, weight_shards=2)
    assert halves == Work(work.flops, work.bytes_shared, 300)


@pytest.mark.parametrize(
    ("kept", "tied", "weights", "cache"),
    [
        # Of tiny.MODEL a layer has 7,680 weights in kernels and 80 in norms; then 32 of the last
        # norm and a head of 32 * 40. Two layers of 2 heads have keys and values of 8 numbers.
        ("auto", False, (2 * 7760 + 32 + 1280) * 2, 2 * 2 * 2 * 8 * 2),
        ("auto", True, (2 * 7760 + 32 + 1280) * 2, 2 * 2 * 2 * 8 * 2),
        # In 8 bits with a scale of 4 bytes for each of 224 outputs of a layer and 40 of the head,
        # and for each position's keys and values of a head; norms stay.
        ("int8", False, 2 * (7680 + 4 * 224 + 2 * 80) + 2 * 32 + 1280 + 4 * 40, 2 * 2 * 2 * 12),
    ],
)
def test_what_decoding_reads_is_what_sampling_keeps(kept, tied, weights, cache):
    model = dataclasses.replace(tiny.MODEL, tied_head=tied)
    decoder = decode.decoder_for(
        model, tiny.one_device(), Sampling(), (tiny.STOP,), 8, jnp.bfloat16,
        weights=kept, cache=kept,
    )  # fmt: skip
    traffic = Engine(decoder).traffic
    assert traffic == {"weights": weights, "cache": cache, "weight_shards": 1}


def test_a_head_that_is_the_embedding_is_no_part_of_the_body():
    tied = ModelConfig(**{**MODEL.__dict__, "tied_head": True})
    assert roofline.forward(tied, PROMPTS, COMPLETIONS) == roofline.forward(
        MODEL, PROMPTS, COMPLETIONS
    )


@pytest.mark.parametrize(
    ("devices", "seconds"),
    [
        (1, 6.0),  # (10 + 2) bytes at 2 a second; arithmetic takes 5
        (2, 3.5),  # (10 / 2 + 2) / 2: what each reads for itself does not shrink
    ],
)
def test_the_longer_of_arithmetic_and_traffic(devices, seconds):
    assert Work(50.0, 10.0, 2.0).seconds(10.0, 2.0, devices) == seconds


def test_three_passes_of_arithmetic_take_three_times_as_long():
    assert Work(50.0).times(3).seconds(10.0, 2.0) == 15.0
