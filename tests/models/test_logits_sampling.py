"""Which tokens may be drawn, and that they are drawn as often as their probability says."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from grpo_jax.models import logits
from grpo_jax.structs import Sampling

B, V = 64, 50


def log_probs(scores, sampling: Sampling, **options) -> jax.Array:
    """Log-probabilities [..., V] of the distribution that tokens are drawn from."""
    return jax.nn.log_softmax(logits.sampling_logits(scores, sampling, **options))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.3), (0, 0.9), (12, 0.8), (50, 0.5)]
)
def test_support_equals_transformers(top_k, top_p, temperature):
    scores_BV = 2 * np.random.default_rng(0).normal(size=(B, V)).astype(np.float32)
    theirs = torch.tensor(scores_BV / np.float32(temperature))
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    want_BV = torch.log_softmax(theirs, dim=-1).numpy()

    got_BV = np.asarray(log_probs(jnp.array(scores_BV), Sampling(temperature, top_k, top_p)))

    np.testing.assert_array_equal(got_BV > -np.inf, want_BV > -np.inf)
    kept = want_BV > -np.inf
    np.testing.assert_allclose(got_BV[kept], want_BV[kept], atol=1e-5, rtol=0)


def test_support_by_hand():
    # Probabilities 0.5, 0.3, 0.15, 0.05: 0.5 alone does not reach 0.6, with 0.3 it does.
    scores_V = jnp.log(jnp.float32([0.05, 0.5, 0.15, 0.3]))
    keep = lambda **kw: logits.keep_mask(scores_V, Sampling(**kw)).tolist()  # noqa: E731

    assert keep(top_p=0.6) == [False, True, False, True]
    assert keep(top_p=0.4) == [False, True, False, False]
    assert keep(top_p=0.9) == [False, True, True, True]
    assert keep(top_k=3) == [False, True, True, True]
    # Of the three left by top-k, 0.5 / 0.95 = 0.526 does not reach 0.53, 0.8 / 0.95 does.
    assert keep(top_k=3, top_p=0.53) == [False, True, False, True]
    assert keep(top_k=3, top_p=0.52) == [False, True, False, False]
    assert logits.keep_mask(scores_V, Sampling()) is None


def test_always_keeps_one_token_more():
    scores_V = jnp.log(jnp.float32([0.05, 0.5, 0.15, 0.3]))

    inside = log_probs(scores_V, Sampling(top_k=2), always=jnp.int32(3))
    outside = log_probs(scores_V, Sampling(top_k=2), always=jnp.int32(0))

    np.testing.assert_allclose(np.exp(inside), [0, 0.625, 0, 0.375], atol=1e-6)
    np.testing.assert_allclose(np.exp(outside), [1 / 17, 10 / 17, 0, 6 / 17], atol=1e-6)


def test_temperature_zero_leaves_the_logits_and_an_argument_overrides():
    scores_V = jnp.float32([0.0, 1.0, 3.0])
    log_softmax = lambda x: np.asarray(jax.nn.log_softmax(x))  # noqa: E731

    zero = log_probs(scores_V, Sampling(temperature=0.0))
    two = log_probs(scores_V, Sampling(temperature=0.5), temperature=2.0)

    np.testing.assert_array_equal(zero, log_softmax(scores_V))
    np.testing.assert_array_equal(two, log_softmax(scores_V / 2))


draw_both = jax.jit(logits.sample)


def draw(*args):
    return draw_both(*args)[0]


def test_a_draw_divides_by_the_temperature():
    score_BV = 3 * jax.random.normal(jax.random.key(0), (B, 1000))
    uniform_B = jax.random.uniform(jax.random.key(1), (B,))
    want = draw_both(score_BV / 0.7, uniform_B)

    got = jax.jit(logits.sample)(score_BV, uniform_B, temperature=0.7)

    assert (want[0] != draw(score_BV, uniform_B)).any()
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 5, 64, 1000, 1536])
def test_drawn_log_probability_is_the_softmax(vocab):
    score_BV = 3 * jax.random.normal(jax.random.key(0), (B, vocab)) + 50
    uniform_B = jax.random.uniform(jax.random.key(1), (B,))

    token_B, got_B = draw_both(score_BV, uniform_B)

    want_BV = np.asarray(jax.nn.log_softmax(score_BV))
    np.testing.assert_allclose(got_B, want_BV[np.arange(B), token_B], atol=1e-5)
    sum_BV = np.cumsum(np.exp(want_BV.astype(np.float64)), axis=1)
    below_B = np.where(token_B > 0, sum_BV[np.arange(B), token_B - 1], 0)
    assert (below_B <= uniform_B + 1e-5).all()
    assert (uniform_B - 1e-5 <= sum_BV[np.arange(B), token_B]).all()


@pytest.mark.parametrize(
    ("vocab", "width"),
    [(151_936, 128), (152_064, 384), (128_256, 384), (32_000, 160), (50_257, 256), (1, 1)],
)
def test_blocks_are_full_where_a_width_near_the_square_root_divides(vocab, width):
    """Of Qwen2.5, its 7B, Llama 3, Llama 2 and GPT-2, whose vocabulary nothing divides."""
    assert logits._block_width(vocab) == width


def test_draw_by_hand():
    log_prob_BV = jnp.log(jnp.float32([[0, 0.25, 0, 0.5, 0.25, 0]] * 6))

    got = draw(log_prob_BV, jnp.float32([0.0, 0.2, 0.25, 0.5, 0.75, 1 - 2**-24]))

    assert got.tolist() == [1, 1, 3, 3, 4, 4]


def test_draw_matches_the_distribution():
    prob_V = np.array([0.0, 0.4, 0.25, 0.0, 0.2, 0.1, 0.05, 0.0])
    n = 20_000
    uniform_B = jax.random.uniform(jax.random.key(0), (n,))

    token_B = draw(jnp.broadcast_to(jnp.log(jnp.float32(prob_V)), (n, 8)), uniform_B)

    count_V = np.bincount(token_B, minlength=8)
    live = prob_V > 0
    assert count_V[~live].sum() == 0
    chi_square = np.sum((count_V[live] - n * prob_V[live]) ** 2 / (n * prob_V[live]))
    assert chi_square < 18.5  # four degrees of freedom: passed by 99.9 % of fair draws


@pytest.mark.parametrize(("mass", "first"), [([1.0, 0, 0], 0), ([0, 1.0, 0], 1), ([0, 0, 1.0], 2)])
def test_a_target_at_the_very_end_takes_the_last_entry_there_is(mass, first):
    """As rounding leaves it: nothing passes the whole sum."""
    found, _ = logits._first_beyond(jnp.float32([mass]), jnp.float32([[1.0]]))
    assert found.tolist() == [[first]]


def test_draw_never_takes_a_token_of_probability_0():
    """Also where sums of one value, added in another order, differ in their last bit."""
    rng = np.random.default_rng(0)
    num_vocab = 1000
    log_prob_V = np.full(num_vocab, -np.inf, np.float32)
    alive = np.sort(rng.choice(num_vocab, 60, replace=False))
    log_prob_V[alive] = np.log(rng.dirichlet(np.ones(60)))
    # The uniform numbers at which the target falls on the edges of tokens, and near them.
    edge_V = np.asarray(jax.jit(jnp.cumsum)(jnp.exp(log_prob_V)))
    edge_V = edge_V / edge_V[-1]
    uniform_B = np.concatenate(
        [np.nextafter(edge_V, np.float32(side)) for side in (0, 1)] + [edge_V, np.zeros(1)]
    ).astype(np.float32)
    uniform_B = np.clip(uniform_B, 0, 1 - 2**-24)

    token_B = np.asarray(draw(np.broadcast_to(log_prob_V, (len(uniform_B), num_vocab)), uniform_B))

    assert set(token_B) <= set(alive)
    assert token_B[-1] == alive[0]
    assert draw(log_prob_V[None], jnp.float32([1 - 2**-24])).tolist() == [alive[-1]]
