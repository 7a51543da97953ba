"""The device's side of later turns: lanes go on from what they have in the cache.

Only what is new is computed: the last token that was drawn, which is not in the cache yet, and what
the environment said. It comes in chunks, see `kv_cache.Chunk`. The functions see the slots of one
shard, as those of `decode.py`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.kernels.kv_cache import Chunk
from grpo_jax.kernels.primitives import where
from grpo_jax.models import parameters, transformer
from grpo_jax.sampling import decode
from grpo_jax.sampling.decode import Decoder, Slots
from grpo_jax.structs import Array, Params


@jax.named_scope("rollout/align")
def align(decoder: Decoder, slots: Slots, shift_RW: Array) -> Slots:
    """The slots with the own tokens of each lane so many columns further along the ring."""
    move = lambda x: decoder.kv_cache.align(x, shift_RW, decoder.max_tokens)  # noqa: E731
    return slots.replace(cache=tuple(map(move, slots.cache)))


@jax.named_scope("rollout/append")
def append(
    decoder: Decoder,
    params: Params,
    temperature: Array | None,
    column: Array,
    age: Array,
    slots: Slots,
    ids_RWM: Array,
    length_RW: Array,
    count_RW: Array,
    limit_RW: Array,
) -> Slots:
    """The slots with a chunk of tokens in each lane; after the last one the next tokens are drawn.

    `column`, `age`, `length_RW` and `count_RW`: as in `Chunk`. `limit_RW`: as in `Slots`.
    """
    chunk = Chunk(slots.prompt_length_R, length_RW, count_RW, age, column, limit=decoder.max_tokens)
    hidden_RWD, cache = transformer.append_tokens(
        params, decoder.model, ids_RWM, slots.cache, chunk, decoder.how
    )
    head_DV, place_RW = parameters.head_kernel(params), slots.first_RW + length_RW
    token_RW, logp_RW = decode.choose(
        decoder, hidden_RWD, head_DV, slots.key_RW2, place_RW, temperature
    )
    goes_on_RW = (count_RW > 0) & (age == 0)
    stop_RW = decode.is_stop(decoder, token_RW)
    own = lambda new, old: where(goes_on_RW, new, old)  # noqa: E731
    r, w = jnp.meshgrid(*(jnp.arange(n) for n in length_RW.shape), indexing="ij")
    at = where(goes_on_RW, length_RW, decoder.max_tokens)  # past the end: dropped
    return slots.replace(
        cache=cache,
        column_1=jnp.full_like(slots.column_1, column),
        token_RW=own(token_RW, slots.token_RW),
        time_RW=own(length_RW, slots.time_RW),
        limit_RW=own(limit_RW, slots.limit_RW),
        live_RW=goes_on_RW & ~stop_RW & (length_RW + 1 < limit_RW),
        stopped_RW=own(stop_RW, slots.stopped_RW),
        completion_RWC=slots.completion_RWC.at[r, w, at].set(token_RW, mode="drop"),
        logp_RWC=slots.logp_RWC.at[r, w, at].set(logp_RW, mode="drop"),
    )
