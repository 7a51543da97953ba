"""The device's side of sampling: prefill, decode and compaction over slots.

A slot holds one prompt's keys and values and `W` lanes, each decoding one completion of that
prompt; the prompt is computed once and its cache is read by all lanes. Random keys follow from the
completion and the token's position, so a lane's draws do not depend on its neighbours, its slot or
the number of slots.

Slots are sharded over the devices, and every shard decodes its own slots independently: the
functions here see the slots of one shard. The devices of a shard split the heads. If the key-value
heads do not divide, they split the slots into equal consecutive parts instead; slots are numbered
within a part. Beside the axes of `structs.py`, A are prompts on their way into slots, and P parts
of a shard.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from grpo_jax.devices import sharding
from grpo_jax.kernels import choice
from grpo_jax.kernels.block_sums import Sums, sums_of_blocks
from grpo_jax.kernels.kv_cache import RING, CacheShape, DecodeStep, KVCache
from grpo_jax.kernels.norm import AddNorm
from grpo_jax.kernels.primitives import split_index, where
from grpo_jax.kernels.quantize import FrozenProduct, frozen_product
from grpo_jax.models import logits, parameters, transformer
from grpo_jax.models.placement import REPLICATED, MlpOfSlots, MlpPlacement
from grpo_jax.structs import Array, ModelConfig, Params, Sampling

# At every check a GPU waits until the host has read the answer and launched the next token.
_STEPS_ON_GPU = 8


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The settings that all compiled programs of an engine share."""

    model: ModelConfig
    mesh: Mesh
    sampling: Sampling  # top-k and top-p; the temperature is an argument of each call, None for 0
    stop_ids: tuple[int, ...]
    max_tokens: int  # C: completion limit
    dtype: Any = jnp.float32  # of activations, and of weights and cache that are "auto"
    weights: str = "auto"  # or "int8"
    merge: bool = False  # merge adapters into their kernels
    fuse: bool = False  # `parameters.fuse_projections`; for devices that hold a layer whole
    steps: int = 1  # tokens between two checks whether the host is needed
    kv_cache: KVCache = RING  # storage of keys and values, and attention to them
    norm: type[nn.Module] = AddNorm  # of states in decoding
    sums: Sums = sums_of_blocks  # of a draw
    frozen_product: FrozenProduct = frozen_product  # with kernels in codes, in decoding

    @property
    def parts(self) -> int:
        """The number of parts into which the devices of a shard split its slots."""
        return sharding.attention_parts(self.mesh, self.model.num_kv_heads)

    @property
    def plain_scales(self) -> bool:
        """Whether the scales of kernels in NF4 are float32."""
        return self.frozen_product is not frozen_product

    @property
    def how(self) -> transformer.Decoding:
        """What the network reads of these settings."""
        mlp: MlpPlacement = REPLICATED if self.parts == 1 else MlpOfSlots(self.mesh)
        of_token = self.norm, self.frozen_product
        return transformer.Decoding(self.dtype, self.fuse, mlp, self.kv_cache, *of_token)


def decoder_for(
    model: ModelConfig,
    mesh: Mesh,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    max_tokens: int,
    dtype: Any,
    *,
    weights: str = "auto",
    cache: str = "auto",
    attention: str = "auto",
    merge: bool = False,
) -> Decoder:
    """The decoder that suits the devices of a mesh.

    `weights`, `cache` and `attention` as in `config.rollout`, `merge` as in `config.lora`. Raises
    ValueError if these devices do not support the named attention.
    """
    on_gpu = sharding.is_gpu(mesh)
    return Decoder(
        model,
        mesh,
        sampling,
        stop_ids,
        max_tokens,
        dtype,
        weights=weights,
        merge=merge,
        fuse=on_gpu and mesh.shape["tensor"] == 1,
        steps=_STEPS_ON_GPU if on_gpu else 1,
        kv_cache=choice.choose_decoding(attention, cache, model, mesh, dtype),
        norm=choice.choose_norm(mesh, dtype),
        sums=choice.choose_sums(mesh, dtype),
        frozen_product=choice.choose_frozen_product(mesh, dtype),
    )


@struct.dataclass
class Slots:
    """Completions in progress.

    The contents of a lane that is not live are used again only by a later turn of its completion.
    """

    cache: tuple  # per layer, in the form of `Decoder.kv_cache`
    column_1: Array  # ring column of every lane's next token
    prompt_length_R: Array
    key_RW2: Array  # uint32: the completion's random key
    token_RW: Array  # last token
    time_RW: Array  # its position among the lane's own tokens, those after the slot's prompt
    first_RW: Array  # position of the first of these in the completion; 0 unless it was read again
    limit_RW: Array  # own tokens that the lane may have by the end of its turn
    live_RW: Array  # bool
    stopped_RW: Array  # bool: ended by a stop token
    completion_RWC: Array
    logp_RWC: Array


def empty(decoder: Decoder, slots: int, lanes: int, prompt_tokens: int) -> Slots:
    """Slots with no completion in them."""
    model = decoder.model
    limit = decoder.max_tokens
    shape = CacheShape(slots, lanes, prompt_tokens, limit, model.num_kv_heads, model.head_size)
    return Slots(
        cache=tuple(decoder.kv_cache.empty(shape, decoder.dtype) for _ in range(model.num_layers)),
        column_1=jnp.zeros(1, jnp.int32),
        prompt_length_R=jnp.ones(slots, jnp.int32),
        key_RW2=jnp.zeros((slots, lanes, 2), jnp.uint32),
        token_RW=jnp.zeros((slots, lanes), jnp.int32),
        time_RW=jnp.zeros((slots, lanes), jnp.int32),
        first_RW=jnp.zeros((slots, lanes), jnp.int32),
        limit_RW=jnp.zeros((slots, lanes), jnp.int32),
        live_RW=jnp.zeros((slots, lanes), bool),
        stopped_RW=jnp.zeros((slots, lanes), bool),
        completion_RWC=jnp.zeros((slots, lanes, limit), jnp.int32),
        logp_RWC=jnp.zeros((slots, lanes, limit), jnp.float32),
    )


@jax.named_scope("choose")
def choose(decoder: Decoder, hidden_RWD, head_DV, key_RW2, time_RW, temperature):
    """The token at position `time_RW` of each completion and its log-probability, both [R, W].

    Without a temperature it is the token with the highest logit. The uniform number of a draw
    follows from the completion's key and the token's position.
    """
    lanes = key_RW2.shape[:2]
    scores = logits.logits(hidden_RWD, head_DV, decoder.model.logit_cap)
    scores_BV = scores.reshape(-1, scores.shape[-1])
    if temperature is None:
        token_B = jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
        logp_B1 = jnp.take_along_axis(jax.nn.log_softmax(scores_BV), token_B[:, None], axis=-1)
        return token_B.reshape(lanes), logp_B1.reshape(lanes)

    def uniform(key_2, time):
        key = jax.random.wrap_key_data(key_2, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, time))

    uniform_B = jax.vmap(uniform)(key_RW2.reshape(-1, 2), time_RW.reshape(-1))
    if not logits.takes_all(decoder.sampling, scores.shape[-1]):
        scores_BV = logits.sampling_logits(scores_BV, decoder.sampling, temperature=temperature)
        temperature = 1.0
    devices = sharding.num_shards_of(decoder.mesh, "vocab", scores.shape[-1])
    split = logits.VocabSplit(devices, decoder.mesh)
    token_B, logp_B = logits.sample(
        scores_BV, uniform_B, split, temperature=temperature, sums=decoder.sums
    )
    return token_B.reshape(lanes), logp_B.reshape(lanes)


def _by_part(parts: int, f):
    """Applies `f` to the slots of each part separately."""
    if parts == 1:
        return f

    def of_all(*arrays):
        split = lambda x: x.reshape(parts, -1, *x.shape[1:])  # noqa: E731
        out = jax.vmap(f)(*jax.tree.map(split, arrays))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)

    return of_all


def is_stop(decoder: Decoder, token: Array) -> Array:
    stop = jnp.zeros(token.shape, bool)
    for stop_id in decoder.stop_ids:
        stop |= token == stop_id
    return stop


@jax.named_scope("rollout/admit")
def admit(
    decoder: Decoder,
    params: Params,
    temperature: Array | None,
    slots: Slots,
    prompt_AQ: Array,
    length_A: Array,
    slot_A: Array,
    key_AW2: Array,
    used_AW: Array,
    first_AW: Array,
    limit_AW: Array,
) -> Slots:
    """Slots with A prompts prefilled and the first token of each of their completions drawn.

    Prompt a goes into slot `slot_A[a]`. A slot number past the end is dropped, so A can be padded.
    `used_AW`: lanes that hold a completion. `first_AW`, `limit_AW`: as in `Slots`.
    """
    model, how = decoder.model, decoder.how
    hidden_AD, fresh = transformer.prefill(params, model, prompt_AQ, length_A, how)
    lanes = used_AW.shape
    hidden_AWD = jnp.broadcast_to(hidden_AD[:, None], (*lanes, hidden_AD.shape[-1]))
    token_AW, logp_AW = choose(
        decoder, hidden_AWD, parameters.head_kernel(params), key_AW2, first_AW, temperature
    )
    stop_AW = is_stop(decoder, token_AW)
    by_part = functools.partial(_by_part, decoder.parts)
    how = {"mode": "drop", "wrap_negative_indices": False}  # no slot number is negative
    put_all = by_part(lambda old, new, slot_A: old.at[slot_A].set(new, **how))
    put = lambda old, new: put_all(old, new, slot_A)  # noqa: E731
    put_cache = by_part(functools.partial(decoder.kv_cache.admit, lanes=lanes[1]))
    put_first = by_part(lambda old, new, slot_A: old.at[slot_A, :, 0].set(new, **how))
    return slots.replace(
        cache=tuple(put_cache(*pair, slot_A, length_A) for pair in zip(slots.cache, fresh)),
        prompt_length_R=put(slots.prompt_length_R, length_A),
        key_RW2=put(slots.key_RW2, key_AW2),
        token_RW=put(slots.token_RW, token_AW),
        time_RW=put(slots.time_RW, jnp.zeros_like(first_AW)),
        first_RW=put(slots.first_RW, first_AW),
        limit_RW=put(slots.limit_RW, limit_AW),
        live_RW=put(slots.live_RW, used_AW & ~stop_AW & (limit_AW > 1)),
        stopped_RW=put(slots.stopped_RW, used_AW & stop_AW),
        completion_RWC=put_first(slots.completion_RWC, token_AW, slot_A),
        logp_RWC=put_first(slots.logp_RWC, logp_AW, slot_A),
    )


def slots_needed(live_PRW: Array, lanes: int) -> Array:
    """The number of slots of `lanes` lanes that the live completions of each part need.

    Each slot has one prompt.
    """
    return jnp.sum(-(-jnp.sum(live_PRW, axis=2) // lanes), axis=1)


@jax.named_scope("rollout/decode")
def decode(
    decoder: Decoder,
    params: Params,
    temperature: Array | None,
    next_slots: Array,
    next_lanes: Array,
    most: Array | None,
    enough_P: Array,
    slots: Slots,
    *,
    keeps: bool = False,
) -> Slots:
    """The slots, decoded until the host has something to do; no host round trip per token.

    A shard returns when it has no live lane, when `enough_P` slots of a part have no live lane,
    when the live completions of each part fit `next_slots` slots of `next_lanes` lanes, or after
    `most` steps if that is not None. It checks this every `decoder.steps` tokens. The donated cache
    is updated in place. `keeps`: later turns go on in lanes that are not live.
    """
    head_DV = parameters.head_kernel(params)
    r, w = (jax.lax.broadcasted_iota(jnp.int32, slots.live_RW.shape, axis) for axis in (0, 1))
    how = {"mode": "drop", "wrap_negative_indices": False}

    def go_on(slots: Slots) -> Array:
        live_PRW = slots.live_RW.reshape(decoder.parts, -1, slots.live_RW.shape[1])
        free_P = jnp.sum(~live_PRW.any(axis=2), axis=1)
        fits_P = slots_needed(live_PRW, next_lanes) <= next_slots
        return live_PRW.any() & (free_P < enough_P).all() & ~fits_P.all()

    def one_token(slots: Slots) -> Slots:
        live_RW = slots.live_RW
        step = DecodeStep(
            prompt_length_R=slots.prompt_length_R,
            time_RW=slots.time_RW,
            live_RW=live_RW,
            column=slots.column_1[0],
            limit=decoder.max_tokens,
            keeps=keeps,
        )
        hidden_RWD, cache = transformer.decode_token(
            params, decoder.model, slots.token_RW, slots.cache, step, decoder.how
        )
        time_RW = slots.time_RW + live_RW
        keys, place_RW = slots.key_RW2, slots.first_RW + time_RW
        token_RW, logp_RW = choose(decoder, hidden_RWD, head_DV, keys, place_RW, temperature)
        at = where(live_RW, time_RW, decoder.max_tokens)  # past the end: dropped
        stop_RW = live_RW & is_stop(decoder, token_RW)
        return slots.replace(
            cache=cache,
            column_1=split_index(slots.column_1 + 1, decoder.max_tokens)[1],
            token_RW=where(live_RW, token_RW, slots.token_RW),
            time_RW=time_RW,
            live_RW=live_RW & ~stop_RW & (time_RW + 1 < slots.limit_RW),
            stopped_RW=slots.stopped_RW | stop_RW,
            completion_RWC=slots.completion_RWC.at[r, w, at].set(token_RW, **how),
            logp_RWC=slots.logp_RWC.at[r, w, at].set(logp_RW, **how),
        )

    def tokens(slots: Slots) -> Slots:
        return jax.lax.fori_loop(0, decoder.steps, lambda _, slots: one_token(slots), slots)

    some_tokens = one_token if decoder.steps == 1 else tokens
    if most is None:
        return jax.lax.while_loop(go_on, some_tokens, slots)
    slots, _ = jax.lax.while_loop(
        lambda carry: go_on(carry[0]) & (carry[1] < most),
        lambda carry: (some_tokens(carry[0]), carry[1] + decoder.steps),
        (slots, jnp.int32(0)),
    )
    return slots


@jax.named_scope("rollout/compact")
def compact(decoder: Decoder, slots: Slots, slot_R: Array, lane_RW: Array, live_RW: Array) -> Slots:
    """A smaller batch: new slot r gets the prompt and lanes `lane_RW[r]` of slot `slot_R[r]`."""
    _, *sizes = slots.completion_RWC.shape

    def moved(slots: Slots, slot_R: Array, lane_RW: Array) -> Slots:
        lanes_of = lambda x: x[slot_R[:, None], lane_RW]  # noqa: E731
        by_lane = slots.replace(cache=(), prompt_length_R=())
        return jax.tree.map(lanes_of, by_lane).replace(
            cache=tuple(decoder.kv_cache.compact(x, slot_R, lane_RW, *sizes) for x in slots.cache),
            prompt_length_R=slots.prompt_length_R[slot_R],
        )

    of_slots = slots.replace(column_1=())
    moved_slots = _by_part(decoder.parts, moved)(of_slots, slot_R, lane_RW)
    return moved_slots.replace(column_1=slots.column_1, live_RW=live_RW)


@jax.named_scope("rollout/put_back")
def put_back(
    decoder: Decoder, slots: Slots, smaller: Slots, slot_R: Array, lane_RW: Array, live_RW: Array
) -> Slots:
    """The slots from which `compact` made `smaller`, with what its lanes have got since.

    That is what a later turn reads of it, the cache.
    """

    def put(caches: tuple, slot_R: Array, lane_RW: Array, live_RW: Array) -> tuple:
        slot_RW = where(live_RW, slot_R[:, None], len(slots.live_RW))  # past the end: dropped
        of_layer = functools.partial(decoder.kv_cache.put_back, limit=decoder.max_tokens)
        return tuple(of_layer(*pair, slot_RW, lane_RW) for pair in zip(*caches))

    caches = slots.cache, smaller.cache
    return slots.replace(cache=_by_part(decoder.parts, put)(caches, slot_R, lane_RW, live_RW))
