"""Attention in decoding by the ragged paged attention kernel that JAX ships for TPUs.

The cache of a slot is pages of 16 positions: the prompt's pages, which all lanes share, and the
pages of each lane's completion. A lane's keys are the prompt's full pages, then its own pages. The
first own page begins with the rest of the prompt: less than a page is copied per lane. The kernel
gets the page numbers of each lane and reads only pages that hold its tokens, rounded up to a block
of pages. It reads a prompt once for each lane. In contrast, `kv_cache.decode` reads a prompt once
for all lanes, but a completion's cache up to its limit. The kernel does not write the new token.

Besides the axes of `structs.py`, B are the lanes of all slots here, E the pages of a lane in order,
and A prompts that are admitted to slots.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel as kernel_lib
from jax.sharding import Mesh

from grpo_jax.kernels import fused_attention, rotary
from grpo_jax.kernels.kv_cache import CacheShape, Chunk, DecodeStep, KVCache
from grpo_jax.structs import Array, ModelConfig

PAGE = 16  # positions; the engine pads prompts to a multiple of it
_PAGES_AT_ONCE, _LANES_AT_ONCE = 16, 8  # in one block of the kernel


def why_unavailable(cache: str, model: ModelConfig, mesh: Mesh) -> str:
    """The reason why `rollout.attention = "ragged"` cannot be used; "" if it can."""
    if mesh.devices.flat[0].platform != "tpu":
        return f"it is for TPUs, and the devices are {mesh.devices.flat[0].platform}s"
    if mesh.shape["tensor"] > 1:
        return (
            f"mesh.tensor = {mesh.shape['tensor']} splits the heads, which XLA does with no kernel"
        )
    if model.head_size % 128 or model.num_kv_heads not in (1, 2, 4, 8, 16):
        return (
            f"the model has {model.num_kv_heads} key-value heads of size {model.head_size}, and it "
            "takes 1, 2, 4, 8 or 16 of multiples of 128"
        )
    if cache != "auto":
        return (
            f'rollout.kv_cache_dtype = "{cache}" has a scale for each position, and the kernel '
            "takes a single one"
        )
    return fused_attention.why_uncapped(model)


@dataclasses.dataclass(frozen=True)
class RaggedPagedDecode(KVCache):
    """The cache as one array of pages, read by the TPU's kernel.

    Its shape is [R, pages of a slot, PAGE, 2 * K, H]: the prompt's pages first, then each lane's.
    Keys and values of a head are adjacent.
    """

    interpret: bool = False  # runs on any device, for tests

    def empty(self, shape: CacheShape, dtype: Any) -> Array:
        pages = shape.prompt_tokens // PAGE + shape.lanes * _own_pages(shape.limit)
        page = PAGE, 2 * shape.num_kv_heads, shape.head_size
        return jnp.zeros((shape.slots, pages, *page), dtype)

    def of_prompt(self, k_RQKH: Array, v_RQKH: Array) -> Array:
        """A prompt's pages [R, Q / PAGE, PAGE, 2 * K, H]."""
        rows, tokens, heads, size = k_RQKH.shape
        return _beside(k_RQKH, v_RQKH).reshape(rows, tokens // PAGE, PAGE, 2 * heads, size)

    def admit(
        self, pages: Array, prompt: Array, slot_A: Array, length_A: Array, lanes: int
    ) -> Array:
        num_prompt = prompt.shape[1]
        per_lane = (pages.shape[1] - num_prompt) // lanes
        pages = pages.at[slot_A, :num_prompt].set(prompt, mode="drop")
        last_A = jnp.minimum(length_A // PAGE, num_prompt - 1)
        rest_A1 = prompt[jnp.arange(len(slot_A)), last_A][:, None]
        first_W = num_prompt + per_lane * jnp.arange(lanes)
        return pages.at[slot_A[:, None], first_W[None]].set(rest_A1, mode="drop")

    def extend(
        self,
        pages: Array,
        q_RWNH: Array,
        k_RWKH: Array,
        v_RWKH: Array,
        step: DecodeStep,
    ) -> tuple[Array, Array]:
        prompt_length_R, time_RW = step.prompt_length_R, step.time_RW
        q_RWNH, k_RWKH = (rotary.rotate(x, step.cos_sin) for x in (q_RWNH, k_RWKH))
        at_RW1 = (prompt_length_R[:, None] + time_RW)[..., None]
        # A lane that is not live writes where its next token will stand, and reads one block.
        length_RW = jnp.where(step.live_RW, at_RW1[..., 0] + 1, 1)
        is_there_RW1 = jnp.ones(at_RW1.shape, bool)
        tokens = (x[:, :, None] for x in (q_RWNH, k_RWKH, v_RWKH))
        out, pages = self._run(pages, *tokens, at_RW1, is_there_RW1, length_RW, step)
        return out.reshape(q_RWNH.shape), pages

    def align(self, pages: Array, shift_RW: Array, limit: int) -> Array:
        return pages  # a token's place follows from its position

    def append(
        self, pages: Array, q_RWMNH: Array, k_RWMKH: Array, v_RWMKH: Array, chunk: Chunk
    ) -> tuple[Array, Array]:
        q_RWMNH, k_RWMKH = (rotary.rotate(x, chunk.cos_sin) for x in (q_RWMNH, k_RWMKH))
        tokens = q_RWMNH.shape[2]
        # Padding takes the places before a lane's tokens, and is not written.
        length_RW = chunk.prompt_length_R[:, None] + chunk.length_RW - chunk.age
        places = chunk.positions(tokens), chunk.is_there(tokens), jnp.maximum(length_RW, 1)
        return self._run(pages, q_RWMNH, k_RWMKH, v_RWMKH, *places, chunk)

    def _run(
        self,
        pages: Array,
        q_RWMNH: Array,
        k_RWMKH: Array,
        v_RWMKH: Array,
        at_RWM: Array,
        is_there_RWM: Array,
        length_RW: Array,
        step: DecodeStep | Chunk,
    ) -> tuple[Array, Array]:
        """Attention of the last M of `length_RW` tokens, and the pages with them."""
        slots, lanes, tokens = at_RWM.shape
        rows = slots * lanes
        flat = pages.reshape(-1, *pages.shape[2:])
        table_BE = _table(step.prompt_length_R, lanes, pages.shape[1], _own_pages(step.limit))
        at_BM = at_RWM.reshape(rows, tokens)
        page_BM = jnp.take_along_axis(table_BE, at_BM // PAGE, axis=1)
        page_BM = jnp.where(is_there_RWM.reshape(rows, tokens), page_BM, len(flat))  # dropped
        new = _beside(k_RWMKH, v_RWMKH).reshape(rows, tokens, *flat.shape[2:])
        flat = flat.at[page_BM, at_BM % PAGE].set(new, mode="drop")
        with pltpu.force_tpu_interpret_mode(True) if self.interpret else contextlib.nullcontext():
            out = kernel_lib.ragged_paged_attention(
                q_RWMNH.reshape(rows * tokens, *q_RWMNH.shape[3:]),
                flat,
                length_RW.reshape(-1),
                table_BE,
                jnp.arange(0, (rows + 1) * tokens, tokens, dtype=jnp.int32),
                jnp.full(1, rows, jnp.int32),
                sm_scale=q_RWMNH.shape[-1] ** -0.5,
                sliding_window=step.window,
                num_kv_pages_per_block=min(_PAGES_AT_ONCE, table_BE.shape[1]),
                num_queries_per_block=min(_LANES_AT_ONCE, rows * tokens),
            )
        return out.reshape(q_RWMNH.shape), flat.reshape(pages.shape)

    def compact(self, pages: Array, slot_R: Array, lane_RW: Array, lanes: int, limit: int) -> Array:
        num_prompt = pages.shape[1] - lanes * _own_pages(limit)
        prompt, own = pages[:, :num_prompt], pages[:, num_prompt:]
        own = own.reshape(own.shape[0], lanes, -1, *own.shape[2:])[slot_R[:, None], lane_RW]
        own = own.reshape(own.shape[0], -1, *own.shape[3:])
        return jnp.concatenate([prompt[slot_R], own], axis=1)

    def put_back(
        self, pages: Array, smaller: Array, slot_RW: Array, lane_RW: Array, limit: int
    ) -> Array:
        per_lane, lanes = _own_pages(limit), lane_RW.shape[1]
        num_prompt = smaller.shape[1] - lanes * per_lane
        new = smaller[:, num_prompt:].reshape(-1, lanes, per_lane, *pages.shape[2:])
        page_RWE = num_prompt + per_lane * lane_RW[..., None] + jnp.arange(per_lane)[None, None]
        return pages.at[slot_RW[..., None], page_RWE].set(new, mode="drop")


def _own_pages(limit: int) -> int:
    """The number of pages for a completion of `limit` tokens and the rest of its prompt."""
    return -(-(PAGE - 1 + limit) // PAGE)


def _beside(k: Array, v: Array) -> Array:
    """Keys and values [..., K, H] as [..., 2 * K, H], those of a head adjacent."""
    return jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], -1, k.shape[-1])


def _table(length_R: Array, lanes: int, pages: int, own: int) -> Array:
    """The page numbers of each lane, in order, int32 [R * W, E]; they count the pages of all slots.

    A slot has `pages` pages; `own` of them belong to each lane.
    """
    num_prompt = pages - lanes * own
    full_R11 = (length_R // PAGE)[:, None, None]
    entry_11E = jnp.arange(num_prompt + own)[None, None]
    first_1W1 = (num_prompt + own * jnp.arange(lanes))[None, :, None]
    own_RWE = first_1W1 + jnp.clip(entry_11E - full_R11, 0, own - 1)
    page_RWE = jnp.where(entry_11E < full_R11, entry_11E, own_RWE)
    start_R11 = (pages * jnp.arange(len(length_R)))[:, None, None]
    return (start_R11 + page_RWE).reshape(-1, num_prompt + own).astype(jnp.int32)
