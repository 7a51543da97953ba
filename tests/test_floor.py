"""The least arithmetic and traffic of a step, counted by hand for a network of a few weights."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax import floor
from grpo_jax.structs import ModelConfig

# Width 4, 1 head of 2: q, k, v, o are 4 x 2, gate, up, down 4 x 3, norms 3 x 4.
# Body: 4 * 8 + 3 * 12 + 12 = 80 weights; head 5 * 4 = 20.
MODEL = ModelConfig(
    family="llama", vocab_size=5, width=4, mlp_width=3, num_layers=1, num_heads=1, num_kv_heads=1,
    head_size=2, rope_theta=1e4, norm_eps=1e-6, max_position=64, tied_head=False,
)  # fmt: skip
PROMPTS, COMPLETIONS = np.array([2, 4]), np.array([[1, 3], [2, 2]])


def test_a_pass_computes_each_prompt_once():
    # Tokens: 2 + 4 of prompts, 1 + 3 + 2 + 2 = 8 of completions.
    # Pairs: prompts 2^2/2 + 4^2/2 = 10; completions with their prompt 2 + 6 + 8 + 8 = 24, with
    # themselves (1 + 9 + 4 + 4) / 2 = 9. Each is two products of 2 numbers: 4 * 2 * 43.
    work = floor.forward(MODEL, PROMPTS, COMPLETIONS)
    assert work == floor.Work(2 * 80 * 14 + 8 * 43 + 2 * 20 * 8)


def test_decoding_reads_weights_once_a_position_and_prompts_once_a_group():
    # Cache: 2 * 1 * 2 numbers of 2 bytes a token = 8 bytes. Own: 8 * 9; of prompts: 2 tokens for
    # 3 positions, 4 for 2: 8 * 14. Logits: 3 * 4 bytes * 5 * 8 tokens. Weights: 100 * 2 bytes, 3
    # positions.
    work = floor.rollout(MODEL, PROMPTS, COMPLETIONS, itemsize=2)
    assert work == floor.Work(
        floor.forward(MODEL, PROMPTS, COMPLETIONS).flops, 8 * 9 + 8 * 14 + 480, 600
    )
    halves = floor.rollout(MODEL, PROMPTS, COMPLETIONS, itemsize=2, weight_shards=2)
    assert halves == floor.Work(work.flops, work.bytes_shared, 300)


def test_a_head_that_is_the_embedding_is_no_part_of_the_body():
    tied = ModelConfig(**{**MODEL.__dict__, "tied_head": True})
    assert floor.forward(tied, PROMPTS, COMPLETIONS) == floor.forward(MODEL, PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("devices", "seconds"),
    [
        (1, 6.0),  # (10 + 2) bytes at 2 a second; arithmetic takes 5
        (2, 3.5),  # (10 / 2 + 2) / 2: what each reads for itself does not shrink
    ],
)
def test_the_longer_of_arithmetic_and_traffic(devices, seconds):
    assert floor.Work(50.0, 10.0, 2.0).seconds(10.0, 2.0, devices) == seconds


def test_three_passes_of_arithmetic_take_three_times_as_long():
    assert floor.Work(50.0).times(3).seconds(10.0, 2.0) == 15.0
