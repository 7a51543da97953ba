"""From hidden states to the distribution that tokens are drawn from.

Sampler and scorer both go through `log_probs`, so temperature, top-k and top-p cannot differ
between them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.structs import Array, Sampling


def logits(hidden: Array, head_DV: Array) -> Array:
    """Float32 scores over the vocabulary [..., V] of hidden states [..., D]."""
    return jnp.einsum(
        "...d,dv->...v", hidden, head_DV.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def support(logits: Array, sampling: Sampling) -> Array | None:
    """True where a token may be drawn, bool [..., V]; None when every token may.

    `logits` are already divided by the temperature. Of equal logits at the edge all are kept.
    """
    keep = None
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][..., -1:]
        keep = logits >= kth
        logits = jnp.where(keep, logits, -jnp.inf)
    if sampling.top_p < 1.0:  # after top-k, on what it left, as Hugging Face does
        sorted_desc = -jnp.sort(-logits, axis=-1)
        prob = jax.nn.softmax(sorted_desc, axis=-1)
        before = jnp.cumsum(prob, axis=-1) - prob  # probability of all likelier tokens
        inside = before < sampling.top_p
        edge = jnp.min(jnp.where(inside, sorted_desc, jnp.inf), axis=-1, keepdims=True)
        within = logits >= edge
        keep = within if keep is None else keep & within
    return keep


def log_probs(
    logits: Array,
    sampling: Sampling,
    *,
    temperature: Array | float | None = None,
    always: Array | None = None,
) -> Array:
    """Log-probabilities float32 [..., V] of the distribution that tokens are drawn from.

    Tokens outside top-k or top-p get -inf. `temperature` overrides `sampling.temperature`, so that
    it may be traced; 0 (greedy) leaves the logits as they are. `always` [...] names a token that
    stays in: a scored token was drawn, even where rounding or an update has since moved it out.
    """
    temperature = sampling.temperature if temperature is None else temperature
    logits = logits / jnp.where(temperature == 0, 1.0, temperature)
    keep = support(logits, sampling)
    if keep is not None:
        if always is not None:
            keep |= jax.nn.one_hot(always, logits.shape[-1], dtype=bool)
        logits = jnp.where(keep, logits, -jnp.inf)
    return jax.nn.log_softmax(logits, axis=-1)


def draw(log_prob_BV: Array, uniform_B: Array) -> Array:
    """The token at each row's uniform number in [0, 1), by the inverse cumulative distribution.

    One number per row, where Gumbel noise needs one per row and token: a third of the time on CPU
    at a vocabulary of 152k. A token of probability 0 is never drawn.
    """
    prob_BV = jnp.exp(log_prob_BV)
    below_BV = jnp.cumsum(prob_BV, axis=-1)
    target_B1 = uniform_B[:, None] * below_BV[:, -1:]
    id_1V, likely_BV = jnp.arange(prob_BV.shape[-1])[None], prob_BV > 0
    # Rounding may leave the target at the very end: then the last token that can be drawn.
    last_B1 = jnp.max(jnp.where(likely_BV, id_1V, 0), axis=-1, keepdims=True)
    # Nor may the sum move over a token of probability 0, and yet its last bit does: it is computed
    # in parallel, each entry by additions in an order of its own.
    beyond_BV = likely_BV & (below_BV > target_B1)
    return jnp.min(jnp.where(beyond_BV, id_1V, last_B1), axis=-1).astype(jnp.int32)
