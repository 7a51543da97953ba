"""What `Prepare` makes of rewards: the config's advantage, on one device and on several."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tiny

from grpo_jax.algorithm import advantages
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.config import options as options_lib
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.setup import learner
from grpo_jax.structs import Sampling

P, G, C = 8, 3, 5
WEIGHTS = (1.0, -0.5)
RNG = np.random.default_rng(0)
REWARD_PGR = RNG.normal(size=(P, G, 2)).astype(np.float32)
REWARD_PGR[1, 2] = np.nan
GREEDY_PR = RNG.normal(size=(P, 2)).astype(np.float32)
CASES = {
    "batch": {"scale_by": "batch_std", "baseline": "leave_one_out"},
    "lengths": {"scale_by": "mean", "baseline": "length_weighted", "whiten": "completions"},
    "greedy": {"scale_by": "none", "baseline": "greedy", "whiten": "tokens"},
    "each": {"aggregate": "each", "credit": "rank", "whiten": "tokens"},
    "kl": {"kl_in": "reward", "kl_coef": 0.3, "scale_by": "sample_std"},
}


def prepared(mesh, options: dict, rollouts):
    """The advantages, in the order of the prompts, and the experience."""
    chosen = AdvantageOptions(**options, weights=WEIGHTS)
    with_kl = chosen.reads_log_probs
    scorer = Scorer(tiny.MODEL, mesh, Sampling())
    prepare = make_prepare(scorer, chosen, mask_truncated=True, with_old=with_kl)
    weighted = REWARD_PGR @ np.float32(WEIGHTS), GREEDY_PR @ np.float32(WEIGHTS)
    reward, greedy = (REWARD_PGR, GREEDY_PR) if chosen.reads_each_reward else weighted
    given = transfer.shard_rows(mesh, (rollouts, reward, greedy))
    log_probs = prepare.log_probs(tiny.params(), tiny.params(7) if with_kl else None, given[0])
    experience = prepare(log_probs, *given[1:])
    return log_probs.in_order(experience.advantage), experience


@pytest.mark.parametrize("case", CASES)
def test_several_devices_give_the_advantages_of_one(case):
    """The mean over a batch is that of all its shards; the prompts are in another order there."""
    rollouts = tiny.rollouts(P, G, C)
    one, experience = prepared(tiny.one_device(), CASES[case], rollouts)
    eight, shuffled = prepared(sharding.make_mesh(8), CASES[case], rollouts)

    np.testing.assert_allclose(eight, one, rtol=1e-5, atol=1e-5)
    assert np.abs(one).max() > 0.1
    if case != "kl":  # few prompts may be balanced as they are
        assert len(shuffled.advantage.sharding.device_set) == 8
    action_PGC = np.asarray(experience.action_PGC)
    assert not action_PGC[-1, -1].any()  # cut, and so left out
    kl = {}
    if case == "kl":
        kl = {"logp_PGC": experience.old_logp_PGC, "ref_logp_PGC": experience.ref_logp_PGC}
        scorer = Scorer(tiny.MODEL, tiny.one_device(), Sampling())
        logp_PGC, ref_PGC = (tiny.logp(scorer, tiny.params(n), rollouts) for n in (0, 7))
        k1_PGC = kl["logp_PGC"] - kl["ref_logp_PGC"]
        np.testing.assert_allclose(
            k1_PGC[action_PGC], (logp_PGC - ref_PGC)[action_PGC], atol=5e-5, rtol=0
        )
    want = advantages.evaluate(
        CASES[case],
        REWARD_PGR.astype(np.float64),
        WEIGHTS,
        length_PG=rollouts.length_PG,
        greedy_PR=GREEDY_PR,
        action_PGC=action_PGC,
        **kl,
    )
    np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-5)


def test_the_programs_are_known_before_the_rewards():
    """For a plan: those of `calls` take what a step gives them."""
    mesh = sharding.make_mesh(8)
    for case, options in CASES.items():
        chosen = AdvantageOptions(**options, weights=WEIGHTS)
        scorer = Scorer(tiny.MODEL, mesh, Sampling())
        prepare = make_prepare(scorer, chosen, mask_truncated=True, with_old=case == "kl")
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            transfer.shard_rows(mesh, tiny.rollouts(P, G, C)),
        )
        length_PG = tiny.rollouts(P, G, C).length_PG
        calls = prepare.calls(tiny.params(), None, like, length_PG)
        assert calls[-1].program is prepare.advantages
        assert calls[-1].result().advantage.shape == (P, G)
        shapes = [x.shape for x in jax.tree.leaves(calls[-1].args[1:])]
        functions = (2,) * (case == "each")
        want = [(P, G, *functions)] + [(P, *functions)] * (case == "greedy")
        assert shapes == want + [(P, G, C)] * 2 * (case == "kl")


def test_the_config_chooses_the_advantage():
    config = options_lib.default()
    values = {
        "baseline": "leave_one_out", "scale_by": "batch_std", "aggregate": "each",
        "credit": "rank", "whiten": "tokens", "kl_in": "reward", "kl_coef": 0.25,
    }  # fmt: skip
    config.algorithm.update(values)
    config.rewards.weights = (2.0, 0.5)
    assert learner.advantage_options(config) == AdvantageOptions(**values, weights=(2.0, 0.5))


def test_a_kl_in_the_reward_is_not_in_the_loss():
    """And the policy is scored before its first update, with a reference."""
    config = options_lib.default()
    config.algorithm.update({"kl_coef": 0.25, "kl_in": "reward"})
    for kl_in, in_loss in (("loss", 0.25), ("reward", 0.0)):
        config.algorithm.kl_in = kl_in
        made = learner.make_learner(config, tiny.MODEL, tiny.one_device())
        assert made.update.component.objective.kl_coef == in_loss
        assert made.prepare.with_old == (kl_in == "reward")
        assert made.prepare.options.reads_log_probs == (kl_in == "reward")
