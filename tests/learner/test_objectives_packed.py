"""Every objective on packed rows: loss and gradient are those of a row for each completion."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.algorithm.objective import Objective
from grpo_jax.algorithm.presets import PRESETS
from grpo_jax.learner import logprobs, scoring, update
from grpo_jax.learner.scoring import Packed, Scorer
from grpo_jax.structs import Experience, Sampling

P, G, C = 4, 5, 9
BESIDE = {"kl_coef": 0.2, "kl_estimator": "k3_ratio", "entropy_coef": 0.05, "rollout.max_tokens": C}
OBJECTIVES = {
    **{name: Objective.of({**row, **BESIDE}) for name, row in PRESETS.items()},
    "drift": Objective.of({"max_sequence_drift": 0.05, "normalizer": "sequence", **BESIDE}),
    "corrected": Objective.of(
        {
            "ratio": "sequence",
            "rollout_correction.level": "sequence",
            "rollout_correction.floor": 0.5,
            **BESIDE,
        }
    ),
}


@pytest.fixture(scope="module")
def experience() -> Experience:
    rollouts, rng = tiny.rollouts(P, G, C), np.random.default_rng(0)
    near = lambda: (rollouts.logp_PGC + rng.normal(0, 0.5, (P, G, C))).astype(np.float32)  # noqa: E731
    action_PGC = np.arange(C) < rollouts.length_PG[..., None]
    action_PGC &= (rng.random((P, G, C)) > 0.1) | (np.arange(C) == 0)
    action_PGC[2, 1] = False  # a completion that is left out
    return Experience(
        rollouts=rollouts,
        advantage=rng.normal(size=(P, G)).astype(np.float32),
        action_PGC=action_PGC,
        old_logp_PGC=near(),
        ref_logp_PGC=near(),
    )


def by_objective(of_objective, parts, given):
    """Loss and gradient of every objective, summed over `parts`, by one program for all of them.

    `of_objective(objective, head, *given(part))`.
    """

    @jax.jit
    def all_of_them(head, part):
        rows = given(part)
        return {
            name: jax.value_and_grad(lambda h, o=objective: of_objective(o, h, *rows))(head)
            for name, objective in OBJECTIVES.items()
        }

    head = np.asarray(SCORER.head(tiny.params()))
    found = [all_of_them(head, part) for part in parts]
    return jax.device_get(jax.tree.map(lambda *each: sum(each), *found))


SCORER = Scorer(tiny.MODEL, tiny.one_device(), Sampling(temperature=0.9))


@pytest.fixture(scope="module")
def plain(experience):
    """A row for each completion; the arithmetic of `losses` on whole completions, [P, G, C]."""
    params = tiny.params()
    target = experience.rollouts.completion_PGC.reshape(P * G, C)
    action = jnp.asarray(experience.action_PGC)

    def of_objective(objective, head, hidden):
        logits = (hidden @ head) / 0.9
        log_prob = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(log_prob, target[..., None], -1)[..., 0]
        entropy = -(jnp.exp(log_prob) * log_prob).sum(-1)
        terms = PolicyLoss(objective).terms(
            experience, jnp.asarray, lambda x: x[..., None] * jnp.ones((P, G, C))
        )
        terms = terms.replace(action=action)
        shape = (P, G, C)
        per_token = losses.token_loss(objective, logp.reshape(shape), entropy.reshape(shape), terms)
        weight, count = losses.weights(action.reshape(-1, C), objective)
        return jnp.sum(weight.reshape(shape) * jnp.where(action, per_token, 0)) / count

    rollouts = jax.tree.map(jnp.asarray, experience.rollouts)
    return by_objective(of_objective, [rollouts], lambda part: [SCORER.hidden(params, part)])


def packed_losses(experience, scorer, order=None):
    """By the update's own functions, over all microbatches of the groups."""
    params = tiny.params()
    groups = np.arange(P) if order is None else order
    rows = scorer.microbatches(experience.rollouts, groups)
    parts = [[jnp.asarray(x[0, m]) for x in rows.arrays] for m in range(int(rows.number))]

    all_rows = jax.tree.map(jnp.asarray, experience)

    def given(where):
        packed = Packed.of(C, *where)
        part = scoring.rows(scorer, all_rows, where[0])
        return part, packed, scorer.hidden(params, part.rollouts, packed.layout)

    def of_objective(objective, head, *rows):
        component = PolicyLoss(objective)
        of_microbatch = update._by_completion if component.needs_completions else update._by_token
        count = component.weights(jnp.asarray(experience.action_PGC))[1]
        return of_microbatch(scorer, component, *rows, head)[0] / count

    return by_objective(of_objective, parts, given)


def assert_same(got, want, tolerance=1e-5):
    for name, (loss, slope) in want.items():
        np.testing.assert_allclose(got[name][0], loss, rtol=tolerance, atol=1e-6, err_msg=name)
        largest = np.abs(slope).max()
        assert largest > 1e-5, name
        np.testing.assert_allclose(
            got[name][1], slope, rtol=0, atol=tolerance * largest, err_msg=name
        )


# Tokens of a row: everything in one, one group, and less than a group, so that groups are split.
@pytest.mark.parametrize("at_once", [1000, 40, 24])
def test_packing_changes_no_loss_and_no_gradient(experience, plain, at_once, monkeypatch):
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    rows = SCORER.microbatches(experience.rollouts, np.arange(P))
    assert (int(rows.number) == 1) == (at_once == 1000)
    assert ((rows.groups_SMJ[0, : rows.number] >= 0).sum() > P) == (at_once == 24)
    order = np.array([2, 0, 3, 1]) if at_once == 40 else None
    assert_same(packed_losses(experience, SCORER, order), plain)


def test_the_way_by_completions_is_that_by_tokens(experience, monkeypatch):
    """Token-wise objectives through the sweep that keeps no logits, and the one that fuses all."""
    fused = packed_losses(experience, SCORER)
    monkeypatch.setattr(update, "_by_token", update._by_completion)
    assert_same(packed_losses(experience, SCORER), fused, 2e-6)


@pytest.mark.parametrize("with_entropy", [True, False])
def test_the_gradient_of_log_probabilities_is_that_of_log_softmax(with_entropy, monkeypatch):
    rng = np.random.default_rng(0)
    hidden = jnp.float32(rng.normal(size=(2, 7, 8)))
    head = jnp.float32(rng.normal(size=(8, 19)))
    target = jnp.asarray(rng.integers(0, 19, (2, 7)))
    weights = [jnp.float32(rng.normal(size=(2, 7))) for _ in range(2)]
    weights[0] = weights[0].at[0, 3].set(0.0)
    monkeypatch.setattr(logprobs, "_MAX_TOKENS", 4)  # chunks of two tokens
    for sampling in (Sampling(), Sampling(temperature=0.7, top_k=5), Sampling(top_p=0.8)):
        for cap in (None, 3.0):

            def ours(hidden, head, sampling=sampling, cap=cap):
                logp, entropy = logprobs.differentiable(
                    with_entropy, sampling, logprobs.UNSPLIT, cap, hidden, head, target
                )
                return (weights[0] * logp + with_entropy * weights[1] * entropy).sum()

            def fused(hidden, head, sampling=sampling, cap=cap):
                def of_token(logp, entropy, terms):
                    return terms[0] * logp + with_entropy * terms[1] * entropy

                ones = jnp.ones((2, 7))
                return logprobs.loss(
                    of_token, sampling, logprobs.UNSPLIT, cap, hidden, head, target, ones, weights
                )[0]

            got, want = (jax.grad(f, argnums=(0, 1))(hidden, head) for f in (ours, fused))
            for g, w in zip(got, want):
                np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
