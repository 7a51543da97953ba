"""Losses of preferences on packed rows and on meshes are those of a row for each completion."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm.preference_losses import PairLoss, UnpairedLoss
from grpo_jax.algorithm.preferences import Preference
from grpo_jax.algorithm.presets import PAIRS
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import scoring, update
from grpo_jax.learner.scoring import Packed, Scorer
from grpo_jax.learner.train_state import start
from grpo_jax.learner.update import make_update
from grpo_jax.models import parameters
from grpo_jax.structs import Experience, Sampling

P, C = 8, 9
SCORER = Scorer(tiny.MODEL, tiny.one_device(), Sampling(), whole=True)
LOSSES = {
    name: (PairLoss if name in PAIRS else UnpairedLoss)(
        Preference(name, beta=0.4, label_smoothing=0.1, undesirable_weight=0.7)
    )
    for name in ("sigmoid", "ipo", "orpo", "kto")  # by sums, by means, without a reference, alone
}


@pytest.fixture(scope="module")
def experience() -> Experience:
    """Eight pairs, of which one is filler; the reference is near the policy."""
    rollouts, rng = tiny.rollouts(P, 2, C), np.random.default_rng(0)
    action_PGC = np.arange(C) < rollouts.length_PG[..., None]
    action_PGC[5] = False
    logp_PGC = np.asarray(tiny.logp(SCORER, tiny.params(), rollouts))
    near_PG = (logp_PGC * action_PGC).sum(-1) + rng.normal(0, 2, (P, 2))
    return Experience(
        rollouts=rollouts,
        advantage=np.zeros((P, 2), np.float32),
        action_PGC=action_PGC,
        old_logp_PGC=None,
        ref_logp_PGC=None,
        ref_logp_PG=near_PG.astype(np.float32),
        nll_weight_PG=np.tile(np.float32([0.3, 0]), (P, 1)),
        desirable_PG=rng.random((P, 2)) > 0.5,
        divergence_PG=np.full((P, 2), 0.4, np.float32),
    )


def of_each_loss(total, parts, given):
    """Loss and gradient in the head by every loss, summed over `parts`, by one program for all.

    `total(component, head, *given(part))`.
    """

    @jax.jit
    def all_of_them(head, part):
        rows = given(part)
        return {
            name: jax.value_and_grad(lambda h, c=component: total(c, h, *rows))(head)
            for name, component in LOSSES.items()
        }

    found = [all_of_them(SCORER.head(tiny.params()), part) for part in parts]
    return jax.device_get(jax.tree.map(lambda *each: sum(each), *found))


@pytest.fixture(scope="module")
def plain(experience):
    """A row for each completion, log_softmax of all logits."""
    params = tiny.params()
    target = experience.rollouts.completion_PGC.reshape(2 * P, C)
    action = jnp.asarray(experience.action_PGC)

    def total(component, head, hidden):
        log_prob = jax.nn.log_softmax(hidden @ head)
        logp = jnp.take_along_axis(log_prob, target[..., None], -1).reshape(P, 2, C)
        terms = component.terms(experience, jnp.asarray, None)
        loss = component.loss(jnp.where(action, logp, 0), None, terms)
        weight, divisor = component.weights(action)
        return (weight * loss).sum() / divisor

    rollouts = jax.tree.map(jnp.asarray, experience.rollouts)
    return of_each_loss(total, [rollouts], lambda part: [SCORER.hidden(params, part)])


def assert_same(got, want, tolerance=1e-5):
    for name, (loss, slope) in want.items():
        np.testing.assert_allclose(got[name][0], loss, rtol=tolerance, err_msg=name)
        largest = np.abs(slope).max()
        assert largest > 1e-3, name
        np.testing.assert_allclose(
            got[name][1], slope, rtol=0, atol=tolerance * largest, err_msg=name
        )


# Tokens of a row: everything in one, two pairs, and less than a pair, which gets a row of its own.
@pytest.mark.parametrize("at_once", [1000, 44, 8])
def test_packing_divides_no_pair_and_changes_nothing(experience, plain, at_once, monkeypatch):
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    order = np.array([7, 2, 0, 3, 1, 5, 6, 4]) if at_once == 44 else np.arange(P)
    rows = SCORER.microbatches(experience.rollouts, order)
    assert (int(rows.number) == 1) == (at_once == 1000)
    filled = rows.groups_SMJ[0, : rows.number]
    assert sorted(filled[filled >= 0]) == list(range(P))
    assert rows.own_SMJG[0, : rows.number][filled >= 0].all()  # with both completions
    divided = dataclasses.replace(SCORER, whole=False).microbatches(experience.rollouts, order)
    assert ((divided.groups_SMJ[0, : divided.number] >= 0).sum() > P) == (at_once == 8)
    params = tiny.params()
    parts = [[jnp.asarray(x[0, m]) for x in rows.arrays] for m in range(int(rows.number))]

    all_rows = jax.tree.map(jnp.asarray, experience)

    def given(where):
        packed = Packed.of(C, *where)
        part = scoring.rows(SCORER, all_rows, where[0])
        return part, packed, SCORER.hidden(params, part.rollouts, packed.layout)

    def total(component, head, *rows):
        found = update._by_completion(SCORER, component, *rows, head)[0]
        return found / component.weights(jnp.asarray(experience.action_PGC))[1]

    assert_same(of_each_loss(total, parts, given), plain)


def updated(mesh, component, experience):
    """Metrics of an update and the parameters after it."""
    scorer, optimizer = Scorer(tiny.MODEL, mesh, Sampling(), whole=True), optax.sgd(0.5)
    placed = sharding.tree_shardings(mesh, parameters.logical_axes(tiny.MODEL), tiny.params())
    state = start(jax.device_put(tiny.params(), placed), tiny.MODEL, mesh, optimizer)
    step = make_update(scorer, component, optimizer, num_minibatches=1)
    state, metrics = step(state, transfer.shard_rows(mesh, experience), 0)
    return jax.device_get((metrics, state.params))


# Rows that are split over the devices of a shard, and eight data shards.
@pytest.mark.parametrize(("name", "shape"), [("sigmoid", (1, 2, 2, 2)), ("kto", (8, 1, 1, 1))])
def test_a_mesh_changes_nothing(experience, plain, name, shape):
    want, want_params = updated(tiny.one_device(), LOSSES[name], experience)
    np.testing.assert_allclose(want["preference/loss"], plain[name][0], rtol=1e-5)
    got, params = updated(sharding.make_mesh(*shape), LOSSES[name], experience)
    assert set(got) == set(want)
    for metric in want:
        np.testing.assert_allclose(got[metric], want[metric], atol=2e-5, err_msg=metric)
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5, rtol=1e-5), params, want_params
    )
