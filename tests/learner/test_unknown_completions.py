"""Completions whose reward is unknown: the others learn as if they had been sampled without them.

Each group of three has one such completion, at another place. It is compared with the same prompts
and the other two.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import advantages
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.algorithm.gae import GAE
from grpo_jax.algorithm.hybrid_methods import METHODS
from grpo_jax.algorithm.hybrids import Hybrid, Weigh
from grpo_jax.algorithm.objective import Objective
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import train_state, update
from grpo_jax.learner.experience import _make_advantages, make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.structs import Rollouts, Sampling

P, G, C = 8, 3, 5
WEIGHTS = (1.0, -0.5)
RNG = np.random.default_rng(0)
WHOLE = tiny.rollouts(P, G, C)
OUT_P = np.arange(P) % G  # the unknown completion of each group
KNOWN_PG = np.arange(G) != OUT_P[:, None]
REWARD_PGR = RNG.normal(size=(P, G, 2)).astype(np.float32).round(1)
REWARD_PGR[~KNOWN_PG] = np.nan
GREEDY_PR = RNG.normal(size=(P, 2)).astype(np.float32)
VALUE_PGC, REF_PGC = RNG.normal(size=(2, P, G, C)).astype(np.float32)
CASES = {
    "mean": {},
    "lengths": {"scale_by": "mean", "baseline": "length_weighted"},
    "leave one out": {"baseline": "leave_one_out", "scale_by": "batch_std", "whiten": "tokens"},
    "greedy": {"scale_by": "none", "baseline": "greedy", "whiten": "completions"},
    "gdpo": {"aggregate": "each", "scale_by": "sample_std"},
    "gdpo by token": {"aggregate": "each", "credit": "rank", "whiten": "tokens"},
    "best": {"credit": "best", "scale_by": "none"},
    "reinforce": {"baseline": "none", "scale_by": "none", "whiten": "tokens"},
    "kl": {"kl_in": "reward", "kl_coef": 0.3, "scale_by": "sample_std"},
}


def others(x: np.ndarray) -> np.ndarray:
    """The two known completions of each group."""
    return x[KNOWN_PG].reshape(P, G - 1, *x.shape[2:])


def without(rollouts: Rollouts) -> Rollouts:
    of_prompts = ("prompt_PQ", "prompt_length_P")
    fields = {f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts)}
    return Rollouts(
        **{n: x if n in of_prompts or x is None else others(x) for n, x in fields.items()}
    )


def of_both(options: AdvantageOptions, gae: GAE | None = None):
    """The experience with unknown completions, and without them."""
    program = _make_advantages(options, gae, False, None)
    reward, greedy = REWARD_PGR, GREEDY_PR
    if not options.reads_each_reward:
        reward, greedy = reward @ np.float32(WEIGHTS), greedy @ np.float32(WEIGHTS)
    log_probs = (WHOLE.logp_PGC, REF_PGC) if options.reads_log_probs else None
    found = []
    for cut, known_PG in ((lambda x: x, KNOWN_PG), (others, None)):
        rollouts = WHOLE if known_PG is not None else without(WHOLE)
        value_PGC = None if gae is None else cut(VALUE_PGC)
        pair = log_probs and tuple(map(cut, log_probs))
        given = rollouts, cut(reward), greedy if options.baseline == "greedy" else None
        found.append(jax.device_get(program(*given, pair, value_PGC, known_PG)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_others_have_the_advantages_of_a_group_without_it(case):
    options = AdvantageOptions(**CASES[case], weights=WEIGHTS)
    whole, alone = of_both(options)
    np.testing.assert_allclose(others(whole.advantage), alone.advantage, rtol=1e-5, atol=1e-6)
    assert np.abs(alone.advantage).max() > 0.1
    assert not whole.advantage[~KNOWN_PG].any() and not whole.action_PGC[~KNOWN_PG].any()
    np.testing.assert_array_equal(others(whole.action_PGC), alone.action_PGC)
    # In float64, from the numbers of the known ones alone.
    want = advantages.evaluate(
        CASES[case],
        others(REWARD_PGR).astype(np.float64),
        WEIGHTS,
        length_PG=others(WHOLE.length_PG),
        greedy_PR=GREEDY_PR,
        action_PGC=alone.action_PGC,
        logp_PGC=others(WHOLE.logp_PGC),
        ref_logp_PGC=others(REF_PGC),
    )
    np.testing.assert_allclose(others(whole.advantage), want, rtol=1e-4, atol=1e-5)


def test_tokens_of_ppo_have_the_advantages_of_a_batch_without_it():
    options = AdvantageOptions("none", "none", whiten="tokens", kl_in="reward", kl_coef=0.1)
    whole, alone = of_both(options, GAE(0.9, 0.8, 0.7))
    for name in ("advantage", "return_PGC"):
        found, want = getattr(whole, name), getattr(alone, name)
        np.testing.assert_allclose(others(found), want, rtol=1e-5, atol=1e-6)
        assert np.abs(want).max() > 0.1 and not found[~KNOWN_PG].any()


def test_a_group_with_one_known_completion_has_no_gradient():
    """By hand: of [5, ?, ?], [1, 3, ?]: whitened over completions, [0, ...] and -1, 1 / sqrt(2)."""
    nan = np.nan
    reward_PGR = np.array([[5, nan, nan], [1, 3, nan]])[..., None]
    for name in ("mean", "gdpo", "best", "reinforce"):
        options = CASES[name]
        given = {"baseline": "mean", "scale_by": "std", **options}
        compares = given["baseline"] not in ("none", "greedy") or given.get("credit", "") == "rank"
        got = advantages.evaluate(
            options,
            reward_PGR,
            [1.0],
            length_PG=np.ones((2, 3)),
            greedy_PR=np.zeros((2, 1)),
            action_PGC=np.ones((2, 3, 1), bool),
            logp_PGC=np.zeros((2, 3, 1)),
            ref_logp_PGC=np.zeros((2, 3, 1)),
        )
        assert compares == (got[0, 0] == 0), options
        assert not got[:, 2].any() and got[1].any()
    one = 1 / (np.sqrt(2) + 1e-4)  # of -1 and 1; the lone 0 would make the deviation 1
    whitened = {"scale_by": "none", "whiten": "completions"}
    got = advantages.evaluate(whitened, reward_PGR, [1.0])
    np.testing.assert_allclose(got, [[0, 0, 0], [-one, one, 0]], rtol=1e-12)
    ranked = {"credit": "rank", "baseline": "none", "scale_by": "none"}
    assert advantages.evaluate(ranked, reward_PGR, [1.0]).tolist() == [[0, 0, 0], [1, 2, 0]]


# --- Hybrids --------------------------------------------------------------------------------------


def weights_of(name: str, rollouts: Rollouts, reward_PG, known_PG=None):
    hybrid = Hybrid(METHODS[name], METHODS[name].nll_coef, max_pass_rate=0.5)
    program = _make_advantages(AdvantageOptions(), None, False, Weigh(hybrid, Objective(), 1))
    found = jax.device_get(program(rollouts, reward_PG, None, None, None, known_PG))
    return found.policy_weight_PGC, found.nll_weight_PGC, found.advantage


@pytest.mark.parametrize("name", METHODS)
def test_a_hybrid_learns_from_the_others_alone(name):
    """Demonstrations are the last completion of each group, or begin each; all have a reward."""
    given_PGC = np.zeros((P, G, C), bool)
    rollouts, known_PG, reward_PG = WHOLE, KNOWN_PG, RNG.choice([0.0, 1.0], (P, G))
    if METHODS[name].given == "completion":  # a fourth one, and known
        more = lambda x: np.concatenate([x, x[:, :1]], axis=1)  # noqa: E731
        fields = ("completion_PGC", "logp_PGC", "length_PG", "stopped_PG")
        rollouts = WHOLE.replace(**{n: more(getattr(WHOLE, n)) for n in fields})
        known_PG = np.pad(KNOWN_PG, ((0, 0), (0, 1)), constant_values=True)
        reward_PG, given_PGC = more(reward_PG), np.pad(given_PGC, ((0, 0), (0, 1), (0, 0)))
        given_PGC[:, -1] = True
    if METHODS[name].given == "prefix":
        given_PGC[..., 0] = True
    there_PGC = np.arange(C) < rollouts.length_PG[..., None]
    rollouts = rollouts.replace(given_PGC=given_PGC & there_PGC, chosen_PGC=there_PGC)
    reward_PG = np.where(known_PG, reward_PG, np.nan).astype(np.float32)
    found = weights_of(name, rollouts, reward_PG, known_PG)
    count = known_PG.shape[1] - 1
    cut = lambda x: x[known_PG].reshape(P, count, *x.shape[2:])  # noqa: E731
    of_prompts = ("prompt_PQ", "prompt_length_P")
    fields = {f.name: getattr(rollouts, f.name) for f in dataclasses.fields(rollouts)}
    fewer = Rollouts(
        **{n: x if x is None or n in of_prompts else cut(x) for n, x in fields.items()}
    )
    want = weights_of(name, fewer, cut(reward_PG))
    policy, nll, advantage = (cut(x) for x in found)
    np.testing.assert_allclose(policy, want[0], rtol=1e-6)
    np.testing.assert_allclose(advantage, want[2], rtol=1e-5, atol=1e-6)
    assert not found[0][~known_PG].any() and want[0].any()
    if METHODS[name].given != "prefix":  # whose nll of the hint needs no reward
        np.testing.assert_allclose(nll, want[1], rtol=1e-6)
        assert not found[1][~known_PG].any()
    else:
        np.testing.assert_array_equal(found[1] != 0, rollouts.given_PGC)


def test_a_demonstration_without_a_reward_keeps_its_nll_alone():
    given_PGC = np.zeros((P, G, C), bool)
    given_PGC[:, -1] = True
    there_PGC = np.arange(C) < WHOLE.length_PG[..., None]
    rollouts = WHOLE.replace(given_PGC=given_PGC & there_PGC, chosen_PGC=there_PGC)
    known_PG = np.arange(G)[None] < np.full((P, 1), G - 1)
    reward_PG = np.where(known_PG, RNG.normal(size=(P, G)), np.nan).astype(np.float32)
    policy, nll, _ = weights_of("srft", rollouts, reward_PG, known_PG)
    assert not policy[:, -1].any() and policy[:, :-1].any()
    np.testing.assert_array_equal(nll != 0, rollouts.given_PGC)
    # Where nothing is known of what was drawn, no pass rate says that the policy fails.
    nothing_PG = np.zeros((P, G), bool)
    nothing_PG[1:] = True
    policy, nll, _ = weights_of("hpt", rollouts, np.zeros((P, G), np.float32), nothing_PG)
    assert not policy[0].any() and not nll[0].any() and nll[1:].any()


# --- Updates --------------------------------------------------------------------------------------

SCORER = Scorer(tiny.MODEL, tiny.one_device(), Sampling())
OBJECTIVE = Objective(normalizer="sequence", kl_coef=0.1, kl_estimator="k3")
PREPARE = make_prepare(SCORER, AdvantageOptions(), mask_truncated=False, with_old=False)
UPDATE = update.make_update(SCORER, PolicyLoss(OBJECTIVE), optax.sgd(0.5), num_minibatches=1)


def updated(rollouts: Rollouts, reward_PG, known_PG=None):
    """Parameters and metrics after an update with a KL term, by the programs of a run."""
    log_probs = PREPARE.log_probs(tiny.params(), tiny.params(7), rollouts)
    experience = PREPARE(log_probs, reward_PG, None, known_PG)
    state = train_state.start(tiny.params(), tiny.MODEL, SCORER.mesh, optax.sgd(0.5))
    state, values = UPDATE(state, experience, 0)
    return jax.device_get((state.params, values))


def test_an_update_is_that_of_the_others():
    """Parameters and metrics, as if the unknown completions had not been sampled."""
    reward_PG = REWARD_PGR @ np.float32(WEIGHTS)
    want = updated(without(WHOLE), others(reward_PG))
    found = updated(WHOLE, reward_PG, KNOWN_PG)
    for one, other in zip(jax.tree.leaves(found[0]), jax.tree.leaves(want[0])):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5)
    assert found[1].keys() == want[1].keys() and abs(want[1]["policy/loss"]) > 1e-4
    for name, value in want[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_update_without_a_known_completion_changes_nothing():
    nan_PG = np.full((P, G), np.nan, np.float32)
    params, values = updated(WHOLE, nan_PG, np.zeros((P, G), bool))
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(tiny.params())):
        np.testing.assert_array_equal(one, other)
    assert not values["skipped"] and all(np.isfinite(value) for value in values.values())


def test_a_mesh_leaves_out_the_same_completions():
    """There the prompts are in another order."""
    mesh = sharding.make_mesh(8)
    scorer = dataclasses.replace(SCORER, mesh=mesh)
    prepare = make_prepare(scorer, AdvantageOptions(), mask_truncated=False, with_old=False)
    reward_PG = REWARD_PGR @ np.float32(WEIGHTS)
    rows = transfer.shard_rows(mesh, (WHOLE, reward_PG, KNOWN_PG))
    log_probs = prepare.log_probs(None, None, rows[0])
    experience = prepare(log_probs, rows[1], None, rows[2])
    assert log_probs.order_P.tolist() != list(range(P))
    action_PG = np.asarray(log_probs.in_order(experience.action_PGC)).any(-1)
    np.testing.assert_array_equal(action_PG, KNOWN_PG)
    one = PREPARE(PREPARE.log_probs(None, None, WHOLE), reward_PG, None, KNOWN_PG)
    found_PG = log_probs.in_order(experience.advantage)
    np.testing.assert_allclose(found_PG, one.advantage, rtol=1e-5, atol=1e-6)
