"""Chunked log-probabilities and their loss against plain log_softmax and autodiff."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.algorithm.losses import TokenTerms
from grpo_jax.learner import logprobs
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.train_state import state_like
from grpo_jax.learner.update import make_update
from grpo_jax.models.lora import Weights
from grpo_jax.structs import Experience, Sampling

B, T, D, V = 3, 7, 8, 19

SAMPLINGS = {
    "plain": Sampling(),
    "cold": Sampling(temperature=0.6),
    "hot": Sampling(temperature=1.7),
    "top-k": Sampling(temperature=0.8, top_k=4),
    "top-p": Sampling(temperature=1.2, top_p=0.7),
    "both": Sampling(top_k=6, top_p=0.8),
    "greedy": Sampling(temperature=0.0),
}
OBJECTIVE = losses.Objective(kl_coef=0.3, entropy_coef=0.2)


def numpy_log_probs(scores_V: np.ndarray, sampling: Sampling, target: int) -> np.ndarray:
    """The definition, one row at a time in float64: sort, keep, renormalize."""
    scores_V = scores_V.astype(np.float64) / (sampling.temperature or 1.0)
    order = np.argsort(-scores_V, kind="stable")
    kept = order[: sampling.top_k] if sampling.top_k else order
    prob = np.exp(scores_V[kept] - scores_V[kept].max())
    prob /= prob.sum()
    if sampling.top_p < 1:
        before = np.cumsum(prob) - prob
        kept = kept[before < sampling.top_p]
    keep = np.isin(np.arange(len(scores_V)), [*kept, target])
    masked = np.where(keep, scores_V, -np.inf)
    peak = masked.max()
    return masked - (peak + np.log(np.exp(masked - peak).sum()))


@pytest.mark.parametrize(
    ("shape", "vocab", "devices", "width"),
    [
        ((1, 500, 1536), 152_000, 1, 500),  # all at once
        ((1, 2000, 1536), 152_000, 1, 704),  # 882 at most: three of 667, by tiles
        ((1, 32_768, 1536), 152_000, 1, 2560),  # 8 * 1,536 for each token: 2,648, 13 of 2,521
        ((1, 32_768, 1536), 152_000, 4, 3328),  # of which each device has a quarter
        ((8, 600, 256), 512, 1, 320),  # 4,096 tokens of eight rows
        ((8, 5, 4), 2**27, 1, 1),
    ],
)
def test_chunks_of_the_vocabulary(shape, vocab, devices, width):
    hidden = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert logprobs._chunk_width(hidden, vocab, devices) == width


def test_a_tied_head_in_bfloat16():
    """The embedding turned round, of few tokens, as a new model has it; near float32's gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden_BTD = jax.random.normal(keys[0], (8, 42, 32))
    table_VD = jax.random.normal(keys[1], (20, 32))
    target_BT = jax.random.randint(keys[2], (8, 42), 0, 20)

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(table_VD, dtype):
        def total(table_VD):
            hidden = hidden_BTD.astype(dtype)
            ones = jnp.ones(target_BT.shape)
            return logprobs.loss(
                lambda logp, entropy, terms: -logp, Sampling(), logprobs.UNSPLIT, None, hidden,
                table_VD.T, target_BT, ones, {},
            )[0]  # fmt: skip

        return jax.grad(total)(table_VD)

    want, got = (gradient(table_VD, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert 0 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.02


@pytest.fixture(scope="module")
def batch():
    """Hidden states, head, targets, ragged weights and terms; half of the ratios are clipped."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    hidden_BTD, head_DV = draw(B, T, D), draw(D, V)
    target_BT = rng.integers(0, V, (B, T))
    weight_BT = (np.arange(T) < np.array([[7], [1], [4]])) * rng.uniform(0.2, 2, (B, T))
    terms = TokenTerms(draw(B, T), None, -3 + draw(B, T), -3 + draw(B, T), None)
    return hidden_BTD, head_DV, target_BT, weight_BT.astype(np.float32), terms


def plain_log_probs(hidden, head, target, sampling: Sampling, cap: float | None):
    """Differentiable log-probabilities [B, T, V] with the support of the definition above."""
    scores = hidden @ head
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    keep = np.array(
        [
            [numpy_log_probs(s, sampling, t) > -np.inf for s, t in zip(*row)]
            for row in zip(np.asarray(jax.lax.stop_gradient(scores)), target)
        ]
    )
    scores = scores / (sampling.temperature or 1.0)
    return jax.nn.log_softmax(jnp.where(keep, scores, -jnp.inf), axis=-1)


def plain_loss(hidden, head, target, weight, terms, sampling: Sampling, cap: float | None):
    log_prob = plain_log_probs(hidden, head, target, sampling, cap)
    logp = jnp.take_along_axis(log_prob, target[..., None], axis=-1)[..., 0]
    finite = jnp.where(log_prob > -jnp.inf, log_prob, 0.0)
    entropy = -jnp.sum(jnp.exp(log_prob) * finite, axis=-1)
    return jnp.sum(weight * losses.token_loss(OBJECTIVE, logp, entropy, terms))


@pytest.mark.parametrize("max_tokens", [4096, 2 * B, 1], ids=["one chunk", "four", "seven"])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_score_equals_log_softmax(batch, name, max_tokens, monkeypatch):
    monkeypatch.setattr(logprobs, "_MAX_TOKENS", max_tokens)
    hidden_BTD, head_DV, target_BT, *_ = batch
    log_prob_BTV = np.array(
        [
            [numpy_log_probs(h @ head_DV, SAMPLINGS[name], t) for h, t in zip(*row)]
            for row in zip(hidden_BTD, target_BT)
        ]
    )
    prob_BTV = np.exp(log_prob_BTV)
    want_entropy = -np.sum(prob_BTV * np.where(prob_BTV > 0, log_prob_BTV, 0), axis=-1)

    logp_BT, entropy_BT = jax.jit(logprobs.token_logprobs, static_argnums=3)(
        hidden_BTD, head_DV, target_BT, SAMPLINGS[name]
    )

    want = np.take_along_axis(log_prob_BTV, target_BT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logp_BT, want, atol=1e-5, rtol=0)
    np.testing.assert_allclose(entropy_BT, want_entropy, atol=1e-5, rtol=0)


def test_some_targets_lie_outside_the_support(batch):
    """Else the tests here would not see what becomes of such a target."""
    hidden_BTD, head_DV, target_BT, *_ = batch
    for name in ("top-k", "top-p"):
        supports = [
            np.sum(numpy_log_probs(h @ head_DV, SAMPLINGS[name], t) > -np.inf)
            - np.sum(
                numpy_log_probs(h @ head_DV, SAMPLINGS[name], np.argmax(h @ head_DV)) > -np.inf
            )
            for h, t in zip(hidden_BTD.reshape(-1, D), target_BT.ravel())
        ]
        assert set(supports) == {0, 1}


def value_and_grads(batch, sampling: Sampling, cap: float | None = None):
    hidden_BTD, head_DV, target_BT, weight_BT, terms = batch
    token_loss = functools.partial(losses.token_loss, OBJECTIVE)

    @jax.jit
    def run(hidden, head, terms):
        total = lambda h, k: logprobs.loss(  # noqa: E731
            token_loss, sampling, logprobs.UNSPLIT, cap, h, k, target_BT, weight_BT, terms
        )[0]
        # Times 3, so that a backward pass that forgets its cotangent is seen.
        return jax.value_and_grad(lambda h, k: 3 * total(h, k), argnums=(0, 1))(hidden, head)

    return run(hidden_BTD, head_DV, terms)


@pytest.mark.parametrize(
    ("name", "cap"), [*((name, None) for name in SAMPLINGS), ("cold", 1.5), ("both", 2.0)]
)
def test_loss_equals_plain_autodiff(batch, name, cap):
    hidden_BTD, head_DV, *rest = batch
    want, want_grads = jax.value_and_grad(
        lambda h, k: 3 * plain_loss(h, k, *rest, SAMPLINGS[name], cap), argnums=(0, 1)
    )(hidden_BTD, head_DV)

    got, got_grads = value_and_grads(batch, SAMPLINGS[name], cap)

    np.testing.assert_allclose(got, want, rtol=1e-5)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert np.abs(w).max() > 0.1
        np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max(), rtol=0)


@pytest.mark.parametrize("max_tokens", [2 * B, 1], ids=["four chunks", "seven"])
def test_chunks_do_not_change_the_loss(batch, max_tokens, monkeypatch):
    want, want_grads = value_and_grads(batch, SAMPLINGS["both"])
    monkeypatch.setattr(logprobs, "_MAX_TOKENS", max_tokens)

    got, got_grads = value_and_grads(batch, SAMPLINGS["both"])

    np.testing.assert_allclose(got, want, rtol=1e-6)
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_allclose(g, w, atol=1e-6 * np.abs(w).max(), rtol=0)


def test_loss_alone_equals_loss_with_gradient(batch):
    """Without a gradient the custom rule is not run: two programs, one value."""
    token_loss = functools.partial(losses.token_loss, OBJECTIVE)
    how = token_loss, Sampling(), logprobs.UNSPLIT, None
    alone, logp_BT, entropy_BT = logprobs.loss(*how, *batch)

    (total, aux), _ = jax.value_and_grad(
        lambda h: (lambda out: (out[0], out[1:]))(logprobs.loss(*how, h, *batch[1:])),
        has_aux=True,
    )(batch[0])

    np.testing.assert_allclose(total, alone, rtol=1e-6)
    np.testing.assert_allclose(aux[0], logp_BT, atol=1e-6)
    np.testing.assert_allclose(aux[1], entropy_BT, atol=1e-6)


@pytest.mark.parametrize("garbage", [np.inf, -np.inf, np.nan, 1e30])
@pytest.mark.parametrize("term", ["advantage", "old_logp", "ref_logp"])
def test_garbage_in_tokens_of_weight_0_is_harmless(batch, term, garbage):
    *rest, weight_BT, terms = batch
    before = getattr(terms, term)
    spoiled = terms.replace(**{term: np.where(weight_BT == 0, np.float32(garbage), before)})
    assert not np.array_equal(getattr(spoiled, term), before)
    want, want_grads = value_and_grads(batch, SAMPLINGS["plain"])

    got, got_grads = value_and_grads((*rest, weight_BT, spoiled), SAMPLINGS["plain"])

    assert got == want
    for g, w in zip(got_grads, want_grads, strict=True):
        np.testing.assert_array_equal(g, w)


def avals(jaxpr):
    """Every array that a program makes, those of the programs inside it included."""
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from avals(inner)


def largest(program, *args) -> int:
    return max(np.prod(a.shape, dtype=int) for a in avals(program.trace(*args).jaxpr.jaxpr))


def test_no_array_holds_the_logits_of_a_batch(monkeypatch):
    """Neither in the old and reference passes nor in the update, forward and backward."""
    model = dataclasses.replace(tiny.MODEL, vocab_size=512)
    rollouts = tiny.rollouts(prompts=4, group=4, tokens=16)
    size = rollouts.completion_PGC.size * model.vocab_size  # B * T * V
    sampling = Sampling(top_k=5, top_p=0.9)
    scorer = Scorer(model, tiny.one_device(), sampling, microbatch=4)
    optimizer = optax.sgd(0.1)
    state = state_like(model, scorer.mesh, optimizer)
    component = PolicyLoss(losses.Objective(kl_coef=0.1, entropy_coef=0.1))
    experience = jax.eval_shape(
        lambda rollouts: Experience(
            rollouts, jnp.zeros((4, 4)), rollouts.completion_PGC > 0, *[rollouts.logp_PGC] * 2
        ),
        rollouts,
    )
    full = rollouts.replace(length_PG=np.full((4, 4), 16))
    where = scorer.microbatches(full, np.arange(4))
    weights = Weights(state.params)

    def largest_of_both():
        """Of programs that are made anew: the limit is read while tracing."""
        prepare = make_prepare(scorer, AdvantageOptions(), mask_truncated=False, with_old=True)
        update = make_update(scorer, component, optimizer, num_minibatches=1)
        carry = jax.eval_shape(update.zero_gradient)
        return (
            largest(prepare.score, state.params, where.number, rollouts, *where.arrays),
            largest(update.gradient, weights, where.number, carry, experience, *where.arrays),
        )

    assert min(largest_of_both()) >= size  # one chunk: the walk sees the logits
    monkeypatch.setattr(logprobs, "_MAX_TOKENS", 64)  # 4 of the 16 tokens of each row
    assert max(largest_of_both()) < size
