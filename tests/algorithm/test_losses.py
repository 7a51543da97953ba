"""The objective by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm import diagnostics, kl, losses, surrogates

LOG = np.log(np.float32([0.5, 1.0, 1.25, 2.0]))  # log-ratios: low, on-policy, inside or high, high


@pytest.mark.parametrize(
    ("advantage", "low", "high", "loss", "slope"),
    [
        # A = 2, clip to [0.8, 1.2]: min(2ρ, 2 clip(ρ)) = 1, 2, 2.4, 2.4; slope -ρA unless clipped.
        (2.0, 0.2, 0.2, [-1.0, -2.0, -2.4, -2.4], [-1.0, -2.0, 0.0, 0.0]),
        # A = -2: min(-2ρ, -2 clip(ρ)) = -1.6, -2, -2.5, -4: only the low ratio is clipped.
        (-2.0, 0.2, 0.2, [1.6, 2.0, 2.5, 4.0], [0.0, 2.0, 2.5, 4.0]),
        # Clip-higher, [0.8, 1.28]: 1.25 is inside now.
        (2.0, 0.2, 0.28, [-1.0, -2.0, -2.5, -2.56], [-1.0, -2.0, -2.5, 0.0]),
        # A low bound of 0.6 takes 0.5 in: [0.4, 1.2].
        (-2.0, 0.6, 0.2, [1.0, 2.0, 2.5, 4.0], [1.0, 2.0, 2.5, 4.0]),
        (0.0, 0.2, 0.2, [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_clipped_surrogate(advantage, low, high, loss, slope):
    surrogate = lambda d: surrogates.clipped_surrogate(d, jnp.float32(advantage), low, high)  # noqa: E731

    np.testing.assert_allclose(surrogate(LOG), loss, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(surrogate))(LOG), slope, rtol=1e-6, atol=1e-7)


def test_log_ratio_without_an_old_policy_is_zero_with_the_gradient_of_logp():
    logp = jnp.float32([-1.5, -0.1])

    np.testing.assert_array_equal(surrogates.log_ratio(logp, None), [0, 0])
    np.testing.assert_array_equal(
        jax.grad(lambda x: surrogates.log_ratio(x, None).sum())(logp), [1, 1]
    )
    np.testing.assert_array_equal(
        surrogates.log_ratio(logp, jnp.float32([-1.0, -1.1])), [-0.5, 1.0]
    )


def test_k3_by_hand():
    # d = ref - policy = ln 2, 0, -ln 2: 2 - ln 2 - 1, 0, 0.5 + ln 2 - 1.
    logp = jnp.float32([-1, -1, -1])
    ref_logp = logp + jnp.float32([np.log(2), 0, -np.log(2)])

    got = kl.k3(logp, ref_logp)

    np.testing.assert_allclose(got, [0.30685282, 0, 0.19314718], rtol=1e-5)


def test_k3_pulls_towards_the_reference_on_policy():
    # Policy (0.5, 0.3, 0.2), reference (0.2, 0.3, 0.5). Each token is drawn with the policy's
    # probability, so the expected gradient is sum_a p_a dk3(log p_a)/dlogits with p_a fixed.
    policy, ref = jnp.float32([0.5, 0.3, 0.2]), jnp.float32([0.2, 0.3, 0.5])

    def expected(logits):
        return jnp.sum(policy * kl.k3(jax.nn.log_softmax(logits), jnp.log(ref)))

    gradient = jax.grad(expected)(jnp.log(policy))

    # dk3/dlogp = 1 - ref/p, so the gradient is p - ref (softmax of the sum 0): (0.3, 0, -0.3).
    np.testing.assert_allclose(gradient, [0.3, 0.0, -0.3], atol=1e-6)
    divergence = lambda logits: jnp.sum(  # noqa: E731
        jax.nn.softmax(logits) * (jax.nn.log_softmax(logits) - jnp.log(ref))
    )
    assert divergence(jnp.log(policy) - 0.1 * gradient) < divergence(jnp.log(policy))


def test_k3_times_the_ratio_has_the_gradient_of_the_other_kl():
    # The same two distributions. Of KL(policy || reference) = sum p log(p / ref) the gradient in
    # the logits is p (log(p / ref) - KL), which sums to 0.
    policy, ref = jnp.float32([0.5, 0.3, 0.2]), jnp.float32([0.2, 0.3, 0.5])
    objective = losses.Objective(kl_estimator="k3_ratio")

    def expected(logits):
        logp = jax.nn.log_softmax(logits)
        given = terms(jnp.zeros(3), ref_logp=jnp.log(ref))
        return jnp.sum(policy * kl.loss(objective, logp, given))

    log_ratio = np.log(np.float64([2.5, 1.0, 0.4]))
    divergence = np.sum(np.float64([0.5, 0.3, 0.2]) * log_ratio)
    want = np.float64([0.5, 0.3, 0.2]) * (log_ratio - divergence)
    np.testing.assert_allclose(jax.grad(expected)(jnp.log(policy)), want, atol=1e-6)
    # Of KL(reference || policy) it is p - ref, see above.
    assert np.abs(want - [0.3, 0.0, -0.3]).max() > 0.01


@pytest.mark.parametrize("kl_estimator", ["k3", "k3_ratio"])
def test_the_kl_off_policy_is_as_trl_has_it(kl_estimator):
    """TRL 1.16, grpo_trainer.py, `use_bias_correction_kl` False and True; float64, by hand."""
    rng = np.random.default_rng(0)
    logp, old, ref = (rng.uniform(-4, -0.1, 50) for _ in range(3))
    d, ratio = ref - logp, np.exp(logp - old)
    k3 = np.exp(d) - d - 1
    corrected = kl_estimator == "k3_ratio"
    want = k3 * ratio if corrected else k3
    slope = ratio * (1 - np.exp(d)) + k3 * ratio if corrected else 1 - np.exp(d)
    objective = losses.Objective(kl_estimator=kl_estimator)
    given = terms(jnp.zeros(50), jnp.float32(old), jnp.float32(ref))
    loss = lambda logp: kl.loss(objective, logp, given)  # noqa: E731

    np.testing.assert_allclose(loss(jnp.float32(logp)), want, rtol=1e-5, atol=1e-6)
    got = jax.grad(lambda x: loss(x).sum())(jnp.float32(logp))
    np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-5)


def terms(advantage, old_logp=None, ref_logp=None, sampler_logp=None, sequence_log_ratio=None):
    return losses.TokenTerms(advantage, sampler_logp, old_logp, ref_logp, sequence_log_ratio)


def test_token_loss_adds_its_terms_by_hand():
    # On-policy -A = -2; k3 with d = ln 2 is 0.30685282; entropy 0.7.
    logp = jnp.float32([-1.0])
    given = terms(jnp.float32([2.0]), ref_logp=logp + np.float32(np.log(2)))
    objective = losses.Objective(kl_coef=0.5, entropy_coef=0.1)

    got = losses.token_loss(objective, logp, jnp.float32([0.7]), given)

    np.testing.assert_allclose(got, [-2 + 0.15342641 - 0.07], rtol=1e-6)


# Old policy over sampler: half as likely, alike, three times as likely.
OLD = jnp.float32([-2, -2, -2])
SAMPLER = OLD - jnp.log(jnp.float32([0.5, 1, 3]))


@pytest.mark.parametrize(
    ("correction", "weight", "capped"),
    [
        ("none", [1, 1, 1], 0),
        ("token_truncate", [0.5, 1, 2], 1),
        ("token_mask", [0.5, 1, 0], 1),
        # Of the whole completion, 0.5 * 1 * 3 = 1.5 for each of its tokens; 6 of another.
        ("sequence_truncate", [1.5, 1.5, 1.5], 0),
        ("sequence_mask", [1.5, 1.5, 1.5], 0),
        ("sequence_truncate of 6", [2, 2, 2], 3),
        ("sequence_mask of 6", [0, 0, 0], 3),
    ],
)
def test_importance_by_hand(correction, weight, capped):
    correction, _, other = correction.partition(" of ")
    level, _, bound = correction.partition("_")
    summed = losses.sequence_log_ratio(OLD, SAMPLER, jnp.ones(3, bool))
    np.testing.assert_allclose(summed, np.log(1.5), rtol=1e-6)
    log_ratio = jnp.broadcast_to(jnp.log(float(other)) if other else summed, 3)
    objective = losses.Objective(
        kl_coef=0.5, importance_level=level, importance_bound=bound, importance_cap=2.0
    )
    # Ratio 1.1 of policy to old policy, within the clip: -1.1 A = -2.2 a token, weighed; k3 of ln 2
    # times 0.5 is not.
    logp = OLD + jnp.log(1.1)
    ref = logp + np.float32(np.log(2))
    given = terms(jnp.float32([2.0] * 3), OLD, ref, SAMPLER, log_ratio)

    def loss(logp):
        return losses.token_loss(objective, logp, jnp.zeros(3), given)

    sums, _ = diagnostics.diagnostics(objective, logp, jnp.zeros(3), given, jnp.ones(3, bool))

    weight = np.float32(weight)
    np.testing.assert_allclose(loss(logp), -2.2 * weight + 0.15342641, rtol=1e-5)
    # The weight is fixed: the slope is -ρA, weighed, and of k3 (1 - exp(d)) * 0.5 = -0.5.
    slope = jax.grad(lambda x: loss(x).sum())(logp)
    np.testing.assert_allclose(slope, -2.2 * weight - 0.5, rtol=1e-5)
    np.testing.assert_allclose(sums["policy/importance_mean"], weight.sum(), rtol=1e-5)
    assert sums["policy/importance_capped_share"] == capped


def test_importance_of_one_update_has_no_gradient():
    """Without an old policy of its own the weight is made of the current one, which is fixed."""
    logp = OLD + 0.0
    given = terms(jnp.float32([2.0] * 3), sampler_logp=SAMPLER)
    objective = losses.Objective(importance_level="token")

    slope = jax.grad(lambda x: losses.token_loss(objective, x, jnp.zeros(3), given).sum())(logp)

    np.testing.assert_allclose(slope, [-1, -2, -4], rtol=1e-5)  # -A times 0.5, 1 and the cap


def test_a_completion_is_summed_over_its_own_tokens():
    sampler_PGC = jnp.float32([[[-1, -1, np.nan], [-1, -1, -1]]])
    old_PGC = jnp.float32([[[-1.5, -0.25, -np.inf], [-1, -2, -1]]])
    action_PGC = jnp.array([[[1, 1, 0], [1, 1, 1]]], bool)

    got = losses.sequence_log_ratio(old_PGC, sampler_PGC, action_PGC)

    np.testing.assert_allclose(got, [[0.25, -1.0]], rtol=1e-6)


ACTION_BT = jnp.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
TOKEN_BT = jnp.float32([[1, 2, 3, 4], [10, 50, 50, 50], [50, 50, 50, 50]])


@pytest.mark.parametrize(
    ("normalizer", "total", "count"),
    [
        ("token", 1 + 2 + 3 + 4 + 10, 5),  # five tokens alike
        ("sequence", 2.5 + 10, 2),  # means 2.5 and 10; the empty row is no sequence
        ("constant", 20, 3 * 8),  # three rows of at most eight tokens
    ],
)
def test_normalizers_by_hand(normalizer, total, count):
    objective = losses.Objective(normalizer=normalizer, max_tokens=8)

    weight_BT, divisor = losses.weights(ACTION_BT, objective)

    assert float(jnp.sum(weight_BT * TOKEN_BT)) == total
    assert float(divisor) == count
    assert weight_BT.dtype == divisor.dtype == jnp.float32


@pytest.mark.parametrize(("normalizer", "count"), [("token", 0), ("sequence", 0), ("constant", 8)])
def test_a_batch_without_an_action_weighs_nothing(normalizer, count):
    objective = losses.Objective(normalizer=normalizer, max_tokens=8)

    weight_BT, divisor = losses.weights(jnp.zeros((1, 4), bool), objective)

    np.testing.assert_array_equal(weight_BT, np.zeros((1, 4)))
    assert float(divisor) == count


def test_diagnostics_by_hand():
    # Ratios 0.5, 0.5, 1, 2, 2 and one past the end, 100, that no mean or maximum may see.
    logp = jnp.float32([-2, -2, -2, -2, -2, np.nan])
    old = logp - jnp.log(jnp.float32([0.5, 0.5, 1, 2, 2, 1]))
    old = old.at[5].set(-2 - np.log(100.0))
    advantage = jnp.float32([-1, 1, 1, 1, -1, np.inf])
    entropy = jnp.float32([0.5, 0.5, 1, 1, 2, np.nan])
    sampler = old + jnp.float32([0.25, -0.5, 0, 0, 0, 9])
    ref = logp + jnp.float32([np.log(2), 0, 0, 0, 0, np.nan])
    action = jnp.array([1, 1, 1, 1, 1, 0], bool)

    sums, maxima = diagnostics.diagnostics(
        losses.Objective(), logp, entropy, terms(advantage, old, ref, sampler), action
    )

    want_sums = {
        "policy/entropy": 5.0,
        "policy/kl": 0.30685282,  # k3 of ln 2
        "policy/clip_low_share": 1.0,  # ratio 0.5 with A < 0; with A > 0 it is not clipped
        "policy/clip_high_share": 1.0,  # ratio 2 with A > 0; with A < 0 it is not clipped
        "policy/drift_mean": 4 * 0.69314718,  # ln 2, down or up
        "policy/sampler_gap_mean": 0.75,  # of the old policy: what was learned since is no part
        "policy/importance_mean": 5.0,  # no correction
        "policy/importance_capped_share": 0.0,
    }
    assert set(sums) == set(want_sums)
    for name, want in want_sums.items():
        np.testing.assert_allclose(sums[name], want, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(maxima["policy/ratio_max"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(maxima["policy/drift_max"], 0.69314718, rtol=1e-6)
    np.testing.assert_allclose(maxima["policy/sampler_gap_max"], 0.5, rtol=1e-6)
    # Where there is one update the current policy is the old one.
    sums, maxima = diagnostics.diagnostics(
        losses.Objective(), old, entropy, terms(advantage, None, ref, sampler), action
    )
    np.testing.assert_allclose(sums["policy/sampler_gap_mean"], 0.75, rtol=1e-6)
    assert sums["policy/drift_mean"] == maxima["policy/drift_max"] == 0


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
def test_a_token_far_from_the_policy_does_not_refuse_an_update(advantage):
    """90 nats, of which no exponential is finite, beside a token with ratio 1.1."""
    logp = jnp.float32([-0.5, -1.0])
    old = logp - jnp.float32([90.0, np.log(1.1)])
    given = terms(jnp.float32([advantage] * 2), old, logp + jnp.float32([90.0, 0.0]))
    objective = losses.Objective(kl_coef=0.1)

    def loss(logp):
        return losses.token_loss(objective, logp, jnp.zeros(2), given)

    value, slope = loss(logp), jax.grad(lambda x: loss(x).sum())(logp)

    # The token counts as exp(20) = 485,165,195.4 and has no gradient; with A > 0 the clip cuts it
    # to 1.2. Its k3 is exp(20) - 21.
    far = {0.0: 0.0, 1.0: -1.2, -1.0: 485165195.4}[advantage] + 0.1 * 485165174.4
    np.testing.assert_allclose(value, [far, -1.1 * advantage], rtol=1e-6)
    np.testing.assert_allclose(slope, [0.0, -1.1 * advantage], rtol=1e-5)
    given = given.replace(sampler_logp=old)
    sums, maxima = diagnostics.diagnostics(objective, logp, jnp.zeros(2), given, jnp.ones(2, bool))
    assert np.isfinite([*sums.values(), *maxima.values()]).all()


def test_nearer_log_ratios_are_exponentiated_as_they_are():
    """To the last bit, and with their gradient: 20 nats are left alone, 20.1 are not."""
    d = jnp.float32([-90.0, -20.0, -0.3, 0.0, 0.3, 19.9, 20.1])

    given = terms(jnp.zeros(7), ref_logp=d)
    objective = losses.Objective(kl_coef=1.0)

    surrogate = surrogates.clipped_surrogate(d, jnp.float32(-1.0), 0.2, 0.2)
    k3 = kl.k3(jnp.zeros(7), d)
    slope = jax.grad(lambda x: losses.token_loss(objective, x, x, given).sum())(jnp.zeros(7))

    np.testing.assert_array_equal(surrogate[3:6], jnp.exp(d)[3:6])
    np.testing.assert_array_equal(k3[:6], (jnp.expm1(d) - d)[:6])
    np.testing.assert_allclose(slope[:6], -jnp.expm1(d)[:6], rtol=1e-6)
    assert surrogate[6] < jnp.exp(d[6]) and slope[6] == 0
