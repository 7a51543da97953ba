"""Hybrids: values and gradients are those of the papers, however the completions are packed."""

from __future__ import annotations

import dataclasses

import hybrid_papers as papers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
import torch

from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.algorithm.hybrid_loss import HybridLoss
from grpo_jax.algorithm.hybrid_methods import METHODS
from grpo_jax.algorithm.hybrids import Hybrid, Weigh
from grpo_jax.algorithm.objective import Objective
from grpo_jax.devices import sharding, transfer
from grpo_jax.environments.demonstrations import Hints, OneMore
from grpo_jax.learner import scoring, update
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Packed, Scorer
from grpo_jax.structs import Rollouts, Sampling

P, G, C, MU, GAMMA = 8, 3, 7, 0.3, 0.6
SCORER = Scorer(tiny.MODEL, tiny.one_device(), Sampling(temperature=0.9))
HIDDEN = jax.jit(lambda rollouts, layout=None: SCORER.hidden(tiny.params(), rollouts, layout))
RNG = np.random.default_rng(3)
REWARD_PG = RNG.choice([0.0, 0.5, 1.0], (P, G)).astype(np.float32)
REWARD_PG[2], REWARD_PG[5] = 0.0, 1.0  # one group that fails, and one that is solved
REWARD_PG[1] = 1.0, 0.0, 1.0  # more than GAMMA of the drawn ones, and less of all
OF_DEMO_P = np.float32([1.0, 0.5, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
DEMOS = [RNG.integers(2, tiny.MODEL.vocab_size, n).tolist() for n in (3, 5, 1, 7, 2, 4, 6, 0)]
PAPERS = {
    "luffy": papers.luffy,
    "chord": lambda groups: papers.chord(groups, MU),
    "chord_phi": lambda groups: papers.chord_phi(groups, MU),
    "srft": papers.srft,
    "hpt": lambda groups: papers.hpt(groups, GAMMA),
    "uft": papers.uft,
    "positive_nll": papers.positive_nll,
}


def hybrid_of(name: str) -> Hybrid:
    method = METHODS[name]
    return Hybrid(method, method.nll_coef, max_pass_rate=GAMMA)


def given_to(name: str) -> Rollouts:
    """Random completions with the demonstrations of a method."""
    drawn = tiny.rollouts(P, G, C)
    prompts = [ids[:n].tolist() for ids, n in zip(drawn.prompt_PQ, drawn.prompt_length_P)]
    if METHODS[name].given == "completion":
        return OneMore(prompts, DEMOS).joined(drawn)
    if METHODS[name].given == "prefix":
        hints = [ids[: min(len(ids), 4)] for ids in DEMOS]
        return Hints(prompts, prompts, hints, C).joined(drawn)
    return drawn


def reward_of(rollouts: Rollouts) -> np.ndarray:
    more = rollouts.length_PG.shape[1] > G
    return np.concatenate([REWARD_PG, OF_DEMO_P[:, None]], axis=1) if more else REWARD_PG


def prepared(name: str, mesh=SCORER.mesh, minibatches: int = 1):
    """The experience of a method, by the programs of a run; old log-probabilities are near."""
    rollouts, scorer = given_to(name), dataclasses.replace(SCORER, mesh=mesh)
    prepare = make_prepare(
        scorer,
        AdvantageOptions(),
        mask_truncated=False,
        with_old=False,
        num_minibatches=minibatches,
        weigh=Weigh(hybrid_of(name), Objective(), minibatches),
    )
    rows = transfer.shard_rows(mesh, rollouts)
    log_probs = prepare.log_probs(tiny.params(), None, rows)
    made = prepare(log_probs, transfer.shard_rows(mesh, reward_of(rollouts)))
    old = np.random.default_rng(1).normal(0, 0.3, rollouts.logp_PGC.shape).astype(np.float32) - 3
    old = old if log_probs.order_P is None else old[log_probs.order_P]
    mix = np.full(rollouts.length_PG.shape, MU, np.float32)
    mix = transfer.shard_rows(mesh, mix) if METHODS[name].mixes else None
    return made.replace(old_logp_PGC=transfer.shard_rows(mesh, old), mix_PG=mix)


@pytest.fixture(scope="module")
def experiences():
    return {name: jax.device_get(prepared(name)) for name in METHODS}


def of_paper(name: str, experience) -> tuple[float, np.ndarray]:
    """Loss and gradient in the head, from a row for each completion."""
    rollouts = experience.rollouts
    hidden = np.asarray(HIDDEN(rollouts), np.float64)
    head = torch.tensor(np.float64(SCORER.head(tiny.params())), requires_grad=True)
    log_prob = torch.log_softmax(torch.tensor(hidden) @ head / 0.9, -1)
    entropy = -(log_prob.exp() * log_prob).sum(-1)
    group, groups = rollouts.length_PG.shape[1], []
    reward = reward_of(rollouts)
    for p in range(P):
        ones = []
        for g in range(group):
            n, row = int(rollouts.length_PG[p, g]), p * group + g
            target = torch.tensor(np.int64(rollouts.completion_PGC[p, g, :n]))
            given = 0 if rollouts.given_PGC is None else int(rollouts.given_PGC[p, g].sum())
            ones.append(
                {
                    "logp": log_prob[row, torch.arange(n), target],
                    "entropy": entropy[row, :n],
                    "old": torch.tensor(np.float64(experience.old_logp_PGC[p, g, :n])),
                    "hint": given if group == G else 0,
                    "reward": float(reward[p, g]),
                }
            )
        demo = ones.pop() if group > G else None
        groups.append({"drawn": ones, "demo": demo if demo and DEMOS[p] else None})
    loss = PAPERS[name](groups)
    loss.backward()
    return float(loss.detach()), head.grad.numpy()


def packed(experiences, order, objective=Objective()):  # noqa: B008
    """By the update's own functions, over all microbatches: every method in one program."""
    parts = {}
    for name, experience in experiences.items():
        rows = SCORER.microbatches(experience.rollouts, order)
        for m in range(int(rows.number)):
            where = [jnp.asarray(x[0, m]) for x in rows.arrays]
            part = scoring.rows(SCORER, experience, where[0])
            found = Packed.of(experience.action_PGC.shape[-1], *where)
            hidden = HIDDEN(part.rollouts, found.layout)
            parts.setdefault(name, []).append((part, found, hidden))

    def of_method(name, head):
        component = HybridLoss(PolicyLoss(objective), hybrid_of(name))
        of_microbatch = update._by_completion if component.needs_completions else update._by_token
        return sum(
            of_microbatch(SCORER, component, part, found, hidden, head)[0]
            for part, found, hidden in parts[name]
        )

    @jax.jit
    def all_of_them(head):
        return {n: jax.value_and_grad(lambda h, n=n: of_method(n, h))(head) for n in parts}

    return jax.device_get(all_of_them(np.asarray(SCORER.head(tiny.params()))))


# Tokens of a row: everything in one, and a few groups.
@pytest.mark.parametrize("at_once", [1000, 60])
def test_loss_and_gradient_are_those_of_the_papers(experiences, at_once, monkeypatch):
    monkeypatch.setattr(scoring, "_TOKENS_AT_ONCE_ON_CPU", at_once)
    names, order = tuple(PAPERS), np.arange(P)
    assert METHODS.keys() == PAPERS.keys()
    if at_once < 1000:
        names, order = ("hpt", "uft"), np.array([2, 0, 3, 1, 7, 6, 5, 4])
        assert int(SCORER.microbatches(experiences["hpt"].rollouts, order).number) > 2
    found = packed({name: experiences[name] for name in names}, order)
    for name, (loss, slope) in found.items():
        want, want_slope = of_paper(name, experiences[name])
        np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6, err_msg=name)
        largest = np.abs(want_slope).max()
        assert largest > 1e-4, name
        np.testing.assert_allclose(slope, want_slope, rtol=0, atol=1e-5 * largest, err_msg=name)


def test_a_demonstration_is_in_no_ratio_of_a_completion(experiences):
    """GSPO's ratio and its count are of drawn tokens: garbage in given ones changes nothing."""
    objective = Objective(ratio="sequence", normalizer="sequence")
    names = ("chord", "uft")
    kept = {name: experiences[name] for name in names}
    changed = {}
    for name, one in kept.items():
        given_PGC = one.rollouts.given_PGC
        old = np.where(given_PGC, np.float32(-9.0), one.old_logp_PGC)
        changed[name] = one.replace(old_logp_PGC=old)
    found, want = (packed(x, np.arange(P), objective) for x in (changed, kept))
    for name in names:
        np.testing.assert_allclose(found[name][1], want[name][1], atol=1e-7)
        assert abs(want[name][0]) > 1e-3


def test_a_mesh_changes_nothing(name="srft"):
    """Eight devices and one, in the second of two minibatches, which has its own counts."""

    made = prepared(name, minibatches=2)
    for weight_PGC in (made.policy_weight_PGC, made.nll_weight_PGC):
        of_each = weight_PGC.reshape(P // 2, 2, -1).sum((0, 2))  # by minibatch
        np.testing.assert_allclose(of_each, [1, 1], rtol=1e-6)

    def metrics(mesh, index):
        scorer = dataclasses.replace(SCORER, mesh=mesh)
        component = HybridLoss(PolicyLoss(Objective()), hybrid_of(name))
        make = update.make_update(scorer, component, optax.sgd(0.5), num_minibatches=2)
        experience = prepared(name, mesh, 2)
        state = update.train_state.start(tiny.params(), tiny.MODEL, mesh, optax.sgd(0.5))
        state, values = make(state, experience, index)
        return jax.device_get((state.params, values))

    one, eight = (metrics(m, 1) for m in (tiny.one_device(), sharding.make_mesh(2, 2, 2)))
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(eight[0])):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0)
    assert one[1].keys() == eight[1].keys() >= {"hybrid/loss", "policy/loss", "hybrid/nll"}
    for key, value in one[1].items():
        np.testing.assert_allclose(eight[1][key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    assert one[1]["hybrid/nll_tokens"] > 0
