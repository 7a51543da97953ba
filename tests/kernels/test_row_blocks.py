"""Attention of rows by block against every pair, and of rows without lanes against lanes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.kernels import attention, choice
from grpo_jax.kernels.attention import Seen
from grpo_jax.kernels.row_blocks import RowBlocks, _Blocks
from grpo_jax.models import transformer
from grpo_jax.models.lanes import PackedInputs

T, N, K, H = 50, 4, 2, 8
# Two prompts of five places, of which the second has three tokens, and then completions of the
# first (of 7, 1 and 12 tokens) and of the second (9 and 8); three places are empty.
LENGTHS, OWNERS = (7, 1, 12, 9, 8), (0, 0, 0, 1, 1)


def seen(*, prompts: bool) -> Seen:
    begin, prompt = np.arange(T, dtype=np.int32), np.zeros((2, T), np.int32)
    begin[:10] = np.repeat([0, 5], 5)
    at = 10
    for length, owner in zip(LENGTHS, OWNERS):
        begin[at : at + length] = at
        prompt[:, at : at + length] = [[5 * owner], [5 * owner + (5, 3)[owner]]]
        at += length
    return Seen(begin[None], *prompt[:, None]) if prompts else Seen(begin[None])


@pytest.mark.parametrize(("prompts", "cap"), [(True, None), (False, 2.0), (True, 2.0)])
def test_blocks_give_what_every_pair_gives(prompts, cap):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, T, n, H)).astype(np.float32) for n in (N, K, K, N)]

    @jax.jit
    def all_of_them(q, k, v, weight):
        def of(kernels):
            total = lambda *x: jnp.sum(kernels.by_row(*x, seen(prompts=prompts), cap) * weight)  # noqa: E731
            out = kernels.by_row(q, k, v, seen(prompts=prompts), cap)
            return out, *jax.grad(total, (0, 1, 2))(q, k, v)

        # Blocks that divide the row, that do not, and one that is longer than it.
        return [of(kernels) for kernels in (attention, *map(RowBlocks, (10, 16, 64)))]

    wanted, *found = all_of_them(*arrays)
    for got in found:
        for want, have in zip(wanted, got, strict=True):
            assert np.abs(want).max() > 0.5
            np.testing.assert_allclose(have, want, atol=5e-6)


def test_a_block_reads_the_keys_that_it_sees_and_no_others():
    """By hand: blocks of ten places, of which the prompts are the first."""
    blocks = _Blocks.of(jax.tree.map(lambda x: x[0], seen(prompts=True)), 10)
    # The texts of each block begin at 0, 10, 18, 30 and 39; they end with it.
    np.testing.assert_array_equal(blocks.own_I2, [[0, 1], [10, 1], [18, 2], [30, 1], [39, 2]])
    # No prompt for prompts; the first, five keys; the last ones see the second.
    of_prompt = [[0, 0], [0, 1], [0, 1], [5, 1], [5, 1]]
    number = np.asarray(blocks.of_prompt_I2)[:, 1]
    np.testing.assert_array_equal(number, [n for _, n in of_prompt])
    np.testing.assert_array_equal(
        np.asarray(blocks.of_prompt_I2)[1:, 0], [first for first, _ in of_prompt[1:]]
    )


def without_lanes(layout):
    token_BX, lane_PWT = layout
    return token_BX, np.zeros((len(lane_PWT), 0, lane_PWT.shape[2]), np.int32)


def test_rows_without_lanes_have_the_states_of_lanes():
    """Windows reach from a completion into its prompt, or not as far; scores are capped."""
    model = tiny.GEMMA
    rollouts = tiny.rollouts(2, 2, 6)
    length_G, token, lane = rollouts.length_PG, [], np.full((2, 1, 10), -1, np.int32)
    for p, g in np.ndindex(2, 2):
        own = [(p * 2 + g) * 6 + c for c in range(1, length_G[p, g])]
        at = (lane[p, 0] >= 0).sum()
        lane[p, 0, at : at + len(own)] = np.arange(len(token), len(token) + len(own))
        token += own
    layout = np.array([[*token, -1]], np.int32), lane
    given = rollouts.prompt_PQ, rollouts.prompt_length_P, rollouts.completion_PGC

    @jax.jit
    def both(params):
        run = lambda layout, kernels: transformer.completion_states(  # noqa: E731
            params, model, PackedInputs.of(*given, layout), kernels=kernels
        )
        return run(layout, attention), run(without_lanes(layout), RowBlocks(4, 0))

    wanted, got = both(tiny.params(model=model))
    np.testing.assert_allclose(got[:, :-1], wanted[:, :-1], atol=2e-5)  # the last entry is empty
    assert np.abs(wanted).max() > 1


def test_the_choice():
    def chosen(option="auto", platform="cpu", **shape):
        shape = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1} | shape
        device = SimpleNamespace(platform=platform, device_kind="")
        devices = np.array([device] * int(np.prod(list(shape.values()))))
        mesh = SimpleNamespace(devices=devices, size=len(devices), shape=shape)
        return choice.choose(option, tiny.MODEL, mesh, jnp.float32)

    assert isinstance(chosen(), RowBlocks) and isinstance(chosen(data=8), RowBlocks)
    assert chosen("xla") is attention
    assert chosen(data=2, fsdp=2) is attention and chosen(tensor=2) is attention
    assert chosen(platform="gpu") is attention
    kernels = chosen()
    assert kernels.needs_lanes(kernels.narrow) and not kernels.needs_lanes(kernels.narrow + 1)
    assert not dataclasses.replace(kernels, narrow=0).needs_lanes(1)
