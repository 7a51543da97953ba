"""The distribution from which tokens are drawn, from hidden states.

Sampler and scorer both go through `sampling_logits`, so temperature, top-k and top-p cannot differ
between them. If every token may be drawn, only the temperature remains, and `sample` divides by it.
Beside the axes of `structs.py`, N are blocks of the vocabulary here, and W the tokens of one.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.devices import by_shard
from grpo_jax.kernels import attention, quantize
from grpo_jax.kernels.block_sums import Sums, sums_of_blocks
from grpo_jax.kernels.primitives import rows_of_each, split_index, take_along, where
from grpo_jax.structs import Array, Sampling


def logits(hidden: Array, head_DV: Array, cap: float | None = None) -> Array:
    """Float32 scores over the vocabulary [..., V] of hidden states [..., D].

    `cap`: of the scores, as `ModelConfig.logit_cap`.
    """
    return attention.capped(quantize.product(hidden, head_DV, jnp.float32), cap)


def keep_mask(logits: Array, sampling: Sampling) -> Array | None:
    """True for tokens that may be drawn, bool [..., V]; None if every token may be drawn.

    `logits` are already divided by the temperature. Of equal logits at the threshold all are kept.
    """
    keep = None
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        keep = logits >= kth
        logits = where(keep, logits, -jnp.inf)
    if sampling.top_p < 1.0:  # on the tokens that top-k kept, as in Hugging Face
        sorted_desc = -jnp.sort(-logits, axis=-1)
        prob = jax.nn.softmax(sorted_desc, axis=-1)
        before = jnp.cumsum(prob, axis=-1) - prob  # total probability of more likely tokens
        inside = before < sampling.top_p
        edge = jnp.min(where(inside, sorted_desc, jnp.inf), axis=-1, keepdims=True)
        within = logits >= edge
        keep = within if keep is None else keep & within
    return keep


def takes_all(sampling: Sampling, vocab: int) -> bool:
    """Whether every token of the vocabulary may be drawn."""
    return not 0 < sampling.top_k < vocab and sampling.top_p >= 1.0


def sampling_logits(
    logits: Array,
    sampling: Sampling,
    *,
    temperature: Array | float | None = None,
    always: Array | None = None,
) -> Array:
    """Logits over temperature, float32 [..., V], -inf outside top-k and top-p.

    `temperature` overrides `sampling.temperature`, so that it may be traced; 0 (greedy) leaves the
    logits as they are. `always` [...] is a token that is kept: a scored token was drawn, even if
    rounding or an update has moved it out since.
    """
    temperature = sampling.temperature if temperature is None else temperature
    logits = logits / where(temperature == 0, 1.0, temperature)
    keep = keep_mask(logits, sampling)
    if keep is None:
        return logits
    if always is not None:
        keep |= jax.nn.one_hot(always, logits.shape[-1], dtype=bool)
    return where(keep, logits, -jnp.inf)


@dataclasses.dataclass(frozen=True)
class VocabSplit:
    """The devices that split a vocabulary equally."""

    devices: int = 1
    mesh: Mesh | None = None  # its tensor axis splits the vocabulary

    def whole(self, x: Array) -> Array:
        """The same array, replicated on these devices."""
        return x if self.mesh is None else by_shard.place_in_slots(self.mesh, x)


UNSPLIT = VocabSplit()
_ALIGNED = 32  # divides a block's width, if no block is padded
_UNEVEN = 8  # limit of width / sqrt(V), either way


def sample(
    score_BV: Array,
    uniform_B: Array,
    split: VocabSplit = UNSPLIT,
    *,
    temperature: Array | float = 1.0,
    sums: Sums = sums_of_blocks,
) -> tuple[Array, Array]:
    """The token at each row's uniform number in [0, 1), and its log-probability, both [B].

    Uses the inverse cumulative distribution of softmax(scores / temperature) in two levels: the
    sums of blocks of tokens, then the tokens of the block that the number falls in. So the
    vocabulary is read twice (maximum, sums; `sums` may combine them) and no array of its size is
    written. Gumbel noise would also need a random number for each token. A token of probability 0
    is never drawn.

    No block is split over devices. They exchange only the blocks' sums and one block, 500 times
    less than the scores of a vocabulary of 150,000.
    """
    rows, vocab = score_BV.shape
    part = vocab // split.devices
    width = _block_width(part)
    pad = [(0, 0), (0, 0), (0, -part % width)]
    parts = jnp.pad(score_BV.reshape(rows, -1, part), pad, constant_values=-jnp.inf)
    blocks_BNW = parts.reshape(rows, -1, width)
    mass_BN, peak_B1 = sums(blocks_BNW, temperature)
    # Otherwise XLA computes the sum over blocks from the scores, and reads the vocabulary once
    # more.
    mass_BN = jax.lax.optimization_barrier(split.whole(mass_BN))
    target_B1 = uniform_B[:, None] * mass_BN.sum(-1, keepdims=True)
    block_B1, below_B1 = _first_beyond(mass_BN, target_B1)
    score_BW = split.whole(rows_of_each(blocks_BNW, block_B1[:, 0]))
    score_BW = score_BW / temperature
    inside_B1, _ = _first_beyond(jnp.exp(score_BW - peak_B1), target_B1 - below_B1)
    chosen_B1 = take_along(score_BW, inside_B1)
    log_prob_B1 = chosen_B1 - peak_B1 - jnp.log(mass_BN.sum(-1, keepdims=True))
    blocks = blocks_BNW.shape[1] // split.devices  # of a part
    part_B1, in_part_B1 = split_index(block_B1, blocks)
    token_B1 = part_B1 * part + in_part_B1 * width + inside_B1
    return token_B1[:, 0], log_prob_B1[:, 0]


def _block_width(vocab: int) -> int:
    """Tokens of a block: about as many as there are blocks. All blocks are full if possible.

    A padded last block makes the sums of all blocks slower: 1.6 times on a GPU, 5 on a CPU.
    """
    root = math.sqrt(vocab)
    near = range(_ALIGNED, int(_UNEVEN * root) + 1, _ALIGNED)
    whole = [width for width in near if vocab % width == 0 and width * _UNEVEN >= root]
    if whole:
        return min(whole, key=lambda width: max(width / root, root / width))
    return 1 << math.isqrt(vocab - 1).bit_length()


def _first_beyond(mass_BN: Array, target_B1: Array) -> tuple[Array, Array]:
    """The first entry above 0 at which the running sum passes the target, and the sum before it.

    If rounding leaves the target at the very end, it is the last entry above 0.
    """
    id_1N, likely_BN = jnp.arange(mass_BN.shape[-1])[None], mass_BN > 0
    last_B1 = jnp.max(where(likely_BN, id_1N, 0), axis=-1, keepdims=True)
    # The running sum should not change at an entry of 0, but its last bit may: it is computed in
    # parallel, with a different order of additions for each entry.
    sum_BN = jnp.cumsum(mass_BN, axis=-1)
    beyond_BN = likely_BN & (sum_BN > target_B1)
    first_B1 = jnp.min(where(beyond_BN, id_1N, last_B1), axis=-1, keepdims=True)
    before_B1 = take_along(sum_BN, jnp.maximum(first_B1 - 1, 0))
    return first_B1.astype(jnp.int32), where(first_B1 > 0, before_B1, 0.0)
