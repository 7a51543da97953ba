"""Log-probability and entropy of tokens from hidden states, chunk by chunk over the rows.

Logits over the vocabulary exist for one chunk of tokens at a time, never for a batch. With a loss
on top, one sweep does everything: the chunk computes log-probability and entropy, differentiates
the per-token loss, and forms the gradients of hidden states and head at once, so the backward pass
of the vocabulary costs no second product with the head.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh

from grpo_jax.devices import by_shard
from grpo_jax.kernels.primitives import take_along, where
from grpo_jax.models import logits as logits_lib
from grpo_jax.structs import Array, Sampling

# Per-token loss [..., tokens] of log-probability, entropy and fixed terms of the same shape; with a
# teacher, also of the divergence from it.
TokenLoss = Callable[..., Array]

# Elements of one chunk's logits: 512 MiB of float32, or 8 per hidden element: no more memory than
# the backward pass of one layer's MLP.
# A chunk reads the head and adds to its gradient whole, so few chunks are fast.
_MAX_LOGITS = 2**27
_LOGITS_FOR_HIDDEN = 8
_MAX_TOKENS = 4096  # a larger product is no faster on any device
_TILE = 64  # in tokens; GPUs copy operands whose width is no multiple of 8


@dataclasses.dataclass(frozen=True)
class SequenceSplit:
    """The devices that split each row along its tokens."""

    mesh: Mesh | None = None  # None: one device

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["sequence"]

    def split(self, x: Array) -> Array:
        """Values by token [B, T, ...], sharded so that each device has its part of every row."""
        axes = ("shard_rows", "tokens") + (None,) * (x.ndim - 2)
        return x if self.mesh is None else by_shard.place_within_shard(self.mesh, x, axes)


UNSPLIT = SequenceSplit()


def _chunk_width(hidden_BTD: Array, vocab: int, devices: int) -> int:
    """Tokens of each row in a chunk, so that its logits stay under both limits on each device.

    The chunks of a row are about equally long.
    """
    rows, tokens, _ = hidden_BTD.shape
    logits = max(_MAX_LOGITS, _LOGITS_FOR_HIDDEN * hidden_BTD.size // devices)
    most = max(min(logits // vocab, _MAX_TOKENS) * devices // rows, 1)
    if most < tokens:
        width, tile = -(-tokens // -(-tokens // most)), _TILE * devices
        most = -(-width // tile) * tile if most >= tile else most
    return -(-min(tokens, most) // devices) * devices


def _split(x_BT: Array, width: int) -> Array:
    """[B, T, ...] as chunks along T, [chunks, B, width, ...], the last one padded with zeros.

    Devices split the batch by row, so no chunk moves between devices.
    """
    rows, tokens, *rest = x_BT.shape
    chunks = -(-tokens // width)
    pad = [(0, 0)] * x_BT.ndim
    pad[1] = (0, chunks * width - tokens)
    x = jnp.pad(x_BT, pad).reshape(rows, chunks, width, *rest)
    return jnp.moveaxis(x, 1, 0)


def _join(x: Array, tokens: int) -> Array:
    """The inverse of `_split`."""
    chunks, rows, width, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(rows, chunks * width, *rest)[:, :tokens]


@struct.dataclass
class Teacher:
    """Another model's predictions of the same tokens, which a loss compares the policy's with."""

    hidden_BTD: Array  # its own width
    head_DV: Array  # of the policy's vocabulary
    beta: float = struct.field(pytree_node=False)  # as in `_divergence`
    cap: float | None = struct.field(pytree_node=False, default=None)  # of its logits


class _Statistics(NamedTuple):
    """Softmax statistics of tokens [...] from their `sampling_logits` [..., V]."""

    scores: Array
    is_drawn: Array | None  # bool [..., V]: within top-k and top-p; None: everywhere
    slope: Array | None  # d capped logits / d uncapped logits; None: 1
    normalizer: Array  # log-sum-exp of the scores
    logp: Array
    entropy: Array
    best: Array  # log-probability of the likeliest token

    def log_prob(self) -> Array:
        """Log-probabilities [..., V]; 0 where the probability is 0."""
        log_prob = self.scores - self.normalizer[..., None]
        return log_prob if self.is_drawn is None else where(self.is_drawn, log_prob, 0.0)

    def prob(self) -> Array:
        return jnp.exp(self.scores - self.normalizer[..., None])


def _statistics(
    hidden: Array, head: Array, target: Array, sampling: Sampling, cap: float | None
) -> _Statistics:
    """The scores are read twice: for their maximum, and for the sums that give the rest."""
    scores = logits_lib.logits(hidden, head, cap)
    slope = None if cap is None else 1 - (scores / cap) ** 2  # derivative of the tanh
    scores = logits_lib.sampling_logits(scores, sampling, always=target)
    is_drawn = scores > -jnp.inf if sampling.is_cut else None
    peak = scores.max(-1, keepdims=True)
    below = scores - peak
    weight = jnp.exp(below)
    if is_drawn is not None:
        below = where(is_drawn, below, 0.0)
    mass, moment = weight.sum(-1), (weight * below).sum(-1)
    normalizer = peak[..., 0] + jnp.log(mass)
    logp = take_along(scores, target[..., None])[..., 0] - normalizer
    best = peak[..., 0] - normalizer
    entropy = jnp.log(mass) - moment / mass
    return _Statistics(scores, is_drawn, slope, normalizer, logp, entropy, best)


@jax.named_scope("vocabulary")
def token_logprobs(
    hidden_BTD: Array,
    head_DV: Array,
    target_BT: Array,
    sampling: Sampling,
    along: SequenceSplit = UNSPLIT,
    cap: float | None = None,
) -> tuple[Array, Array]:
    """Log-probability of each target token and entropy at it, float32 [B, T], in nats.

    Under the distribution of `sampling`: temperature, top-k and top-p as the sampler applied them.
    `cap`: of the logits, as `ModelConfig.logit_cap`. Not meant to be differentiated; see `loss` and
    `differentiable`.
    """
    width = _chunk_width(hidden_BTD, head_DV.shape[-1], along.devices)
    head = head_DV.astype(hidden_BTD.dtype)  # cast once, not in every chunk

    def chunk(carry, xs):
        hidden, target = map(along.split, xs)
        found = _statistics(hidden, head, target, sampling, cap)
        return carry, (found.logp, found.entropy)

    _, (logp, entropy) = jax.lax.scan(
        chunk, None, (_split(hidden_BTD, width), _split(target_BT, width))
    )
    tokens = target_BT.shape[1]
    return _join(logp, tokens), _join(entropy, tokens)


def _by_logits(
    found: _Statistics, target: Array, by_logp: Array, by_entropy: Array | None
) -> Array:
    """The gradient [..., V] in the logits, at temperature 1, from those in logp and entropy."""
    # d logp / d logits = onehot - p;  d entropy / d logits = -p (log p + entropy)
    prob = found.prob()
    chosen = jax.nn.one_hot(target, prob.shape[-1])
    by_logits = by_logp[..., None] * (chosen - prob)
    if by_entropy is not None:
        by_logits -= by_entropy[..., None] * prob * (found.log_prob() + found.entropy[..., None])
    if found.slope is not None:
        by_logits *= found.slope
    return by_logits


def _divergence(found: _Statistics, other: _Statistics, beta: float) -> tuple[Array, ...]:
    """Divergence of policy p and teacher q at each token [...]; KL(p || q); and by logits [..., V].

    The generalised Jensen-Shannon divergence beta KL(q || m) + (1 - beta) KL(p || m) with m = beta
    q + (1 - beta) p (Agarwal et al. 2023, arXiv:2306.13649, equation 1); with beta 0 KL(q || p),
    and with beta 1 KL(p || q), as in TRL. The last result is its gradient in the policy's scores.
    """
    log_p, log_q = found.log_prob(), other.log_prob()
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    kl = (p * (log_p - log_q)).sum(-1)
    if beta == 0:
        return (q * (log_q - log_p)).sum(-1), kl, p - q
    if beta == 1:
        return kl, kl, p * (log_p - log_q - kl[..., None])
    log_m = jnp.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
    of_policy = (p * (log_p - log_m)).sum(-1)
    of_teacher = (q * (log_q - log_m)).sum(-1)
    by_scores = (1 - beta) * p * (log_p - log_m - of_policy[..., None])
    return beta * of_teacher + (1 - beta) * of_policy, kl, by_scores


def _summed_product(hidden_BTD: Array, by_logits_BTV: Array) -> Array:
    """The product summed over all tokens, float32 [D, V]."""

    def product(x: Array, y: Array) -> Array:
        return jnp.einsum("btd,btv->dv", x, y, preferred_element_type=jnp.float32)

    def in_float32(x: Array, y: Array) -> Array:
        return product(x.astype(jnp.float32), y.astype(jnp.float32))

    if hidden_BTD.dtype == jnp.float32:
        return product(hidden_BTD, by_logits_BTV)
    # XLA for CPU (jaxlib 0.10.2) lacks this bfloat16 product if the head is transposed.
    return jax.lax.platform_dependent(hidden_BTD, by_logits_BTV, cpu=in_float32, default=product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 10))
def loss(
    token_loss: TokenLoss,
    sampling: Sampling,
    along: SequenceSplit,
    cap: float | None,
    hidden_BTD: Array,
    head_DV: Array,
    target_BT: Array,
    weight_BT: Array,
    terms: Any,
    teacher: Teacher | None = None,
    with_best: bool = False,
) -> tuple[Array, ...]:
    """Weighted sum of per-token losses, with the log-probabilities and entropies [B, T] behind it.

    Differentiable in the first result, with respect to `hidden_BTD` and `head_DV` alone.
    `token_loss(logp, entropy, terms)` sees arrays of one chunk; `terms` is a pytree of [B, T]
    arrays that stay fixed. `cap` as in `token_logprobs`. Tokens of weight 0 contribute nothing,
    whatever their values. With a `teacher` there are two more results, divergence and KL(policy ||
    teacher) [B, T], and `token_loss` gets the divergence as its last argument. `with_best`: the
    last result is the log-probability of the likeliest token [B, T].
    """
    if teacher is not None or with_best:
        how, beside = (token_loss, sampling, along, cap), (terms, teacher, with_best)
        return _loss_forward(*how, hidden_BTD, head_DV, target_BT, weight_BT, *beside)[0]
    logp_BT, entropy_BT = token_logprobs(hidden_BTD, head_DV, target_BT, sampling, along, cap)
    per_token = where(weight_BT != 0, token_loss(logp_BT, entropy_BT, terms), 0.0)
    return jnp.sum(weight_BT * per_token), logp_BT, entropy_BT


@jax.named_scope("vocabulary")
def _loss_forward(
    token_loss,
    sampling,
    along,
    cap,
    hidden_BTD,
    head_DV,
    target_BT,
    weight_BT,
    terms,
    teacher=None,
    with_best=False,
):
    tokens = target_BT.shape[1]
    width = _chunk_width(hidden_BTD, head_DV.shape[-1], along.devices)
    temperature = sampling.temperature or 1.0
    head = head_DV.astype(hidden_BTD.dtype)
    of_teacher_DV = None if teacher is None else teacher.head_DV.astype(teacher.hidden_BTD.dtype)

    def chunk(carry, xs):
        total, grad_head = carry
        hidden, target, weight, terms, of_teacher = jax.tree.map(along.split, xs)
        found = _statistics(hidden, head, target, sampling, cap)
        compared = ()
        if teacher is not None:
            other = _statistics(of_teacher, of_teacher_DV, target, sampling, teacher.cap)
            *compared, by_scores = _divergence(found, other, teacher.beta)

        def weighted(logp, entropy, *divergence):
            per_token = token_loss(logp, entropy, terms, *divergence)
            per_token = where(weight != 0, per_token, 0.0)
            return jnp.sum(weight * per_token)

        values = found.logp, found.entropy, *compared[:1]
        part, by_values = jax.value_and_grad(weighted, argnums=tuple(range(len(values))))(*values)
        # A token of weight 0 has a cotangent of 0; 0 times an infinite term would be NaN.
        by_values = [where(weight != 0, g, 0.0) for g in by_values]
        by_logits = _by_logits(found, target, *by_values[:2])
        if teacher is not None:
            by_scores *= 1.0 if found.slope is None else found.slope
            by_logits += by_values[2][..., None] * by_scores
        by_logits = (by_logits / temperature).astype(hidden.dtype)
        by_hidden = jnp.einsum("btv,dv->btd", by_logits, head)
        grad_head += _summed_product(hidden, by_logits)
        best = (found.best,) * with_best
        values = found.logp, found.entropy, *compared, *best
        return (total + part, grad_head), (*values, by_hidden)

    of_teacher = None if teacher is None else teacher.hidden_BTD
    xs = hidden_BTD, target_BT, weight_BT, terms, of_teacher
    xs = jax.tree.map(lambda x: _split(x, width), xs)
    start = jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32)
    (total, grad_head), ys = jax.lax.scan(chunk, start, xs)
    *found, grad_hidden = (_join(y, tokens) for y in ys)
    return (total, *found), (grad_hidden, grad_head.astype(head_DV.dtype))


@jax.named_scope("vocabulary")
def _loss_backward(token_loss, sampling, along, cap, with_best, residuals, cotangents):
    grad_hidden, grad_head = residuals
    by_total = cotangents[0]  # log-probabilities and entropies are diagnostics
    scale = lambda g: (g * by_total).astype(g.dtype)  # noqa: E731
    return scale(grad_hidden), scale(grad_head), None, None, None, None


loss.defvjp(_loss_forward, _loss_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def differentiable(
    with_entropy: bool,
    sampling: Sampling,
    along: SequenceSplit,
    cap: float | None,
    hidden_BTD: Array,
    head_DV: Array,
    target_BT: Array,
) -> tuple[Array, Array]:
    """As `token_logprobs`, differentiable with respect to `hidden_BTD` and `head_DV`.

    For losses that read whole completions. The backward pass computes the logits again, so that the
    vocabulary costs four products where `loss` has three. Without `with_entropy` the entropy has no
    gradient. A token whose gradient is 0 contributes nothing, whatever its values.
    """
    return token_logprobs(hidden_BTD, head_DV, target_BT, sampling, along, cap)


def _differentiable_forward(with_entropy, sampling, along, cap, hidden_BTD, head_DV, target_BT):
    found = token_logprobs(hidden_BTD, head_DV, target_BT, sampling, along, cap)
    return found, (hidden_BTD, head_DV, target_BT)


@jax.named_scope("vocabulary")
def _differentiable_backward(with_entropy, sampling, along, cap, residuals, cotangents):
    hidden_BTD, head_DV, target_BT = residuals
    width = _chunk_width(hidden_BTD, head_DV.shape[-1], along.devices)
    temperature = sampling.temperature or 1.0
    head = head_DV.astype(hidden_BTD.dtype)

    def chunk(grad_head, xs):
        hidden, target, by_logp, by_entropy = map(along.split, xs)
        found = _statistics(hidden, head, target, sampling, cap)
        by_entropy = by_entropy if with_entropy else None
        by_logits = _by_logits(found, target, by_logp, by_entropy) / temperature
        is_zero = by_logp == 0 if by_entropy is None else (by_logp == 0) & (by_entropy == 0)
        by_logits = where(is_zero[..., None], 0.0, by_logits).astype(hidden.dtype)
        grad_head += _summed_product(hidden, by_logits)
        return grad_head, jnp.einsum("btv,dv->btd", by_logits, head)

    xs = tuple(_split(x, width) for x in (hidden_BTD, target_BT, *cotangents))
    grad_head, grad_hidden = jax.lax.scan(chunk, jnp.zeros(head_DV.shape, jnp.float32), xs)
    grad_hidden = _join(grad_hidden, target_BT.shape[1])
    return grad_hidden, grad_head.astype(head_DV.dtype), None


differentiable.defvjp(_differentiable_forward, _differentiable_backward)
