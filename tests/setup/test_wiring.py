"""Where each option goes: what is put together from a config, against formulas beside it.

The plain side is a row for each completion, float64 NumPy around one differentiated function of the
log-probabilities, AdamW written out, and rates by hand. Every case sets the options it names to
values that differ from the defaults and from each other, so that none can stand in for another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import keys
from grpo_jax.algorithm.adaptive import AdaptiveEntropy, AdaptiveKL
from grpo_jax.config import derived
from grpo_jax.config import options as options_lib
from grpo_jax.config.dotted import override
from grpo_jax.data.examples import Example
from grpo_jax.data.problems import Problem
from grpo_jax.data.prompts import prompt_indices
from grpo_jax.environments.demonstrations import NOTHING
from grpo_jax.environments.drawing import ONE_TURN
from grpo_jax.environments.questions import Questions
from grpo_jax.environments.single_turn import Rollout
from grpo_jax.evaluation import held_out
from grpo_jax.kernels import attention
from grpo_jax.kernels.row_blocks import RowBlocks
from grpo_jax.learner import train_state
from grpo_jax.learner import update as update_lib
from grpo_jax.learner.update import make_update
from grpo_jax.rewards.scores import Scores
from grpo_jax.setup import run_folder
from grpo_jax.setup.data import load_problems
from grpo_jax.setup.engine import make_engine
from grpo_jax.setup.learner import MemoryPlan, make_learner, make_supervised_learner
from grpo_jax.structs import Rollouts, Sampling
from grpo_jax.trainers import given as given_lib
from grpo_jax.trainers import grpo, results, rollout, sft
from grpo_jax.trainers.run_state import RunState
from grpo_jax.trainers.runs import Course

P, G, C, Q = 4, 3, 5, 6
MODEL = tiny.MODEL
REWARD_PG = np.random.default_rng(3).normal(size=(P, G))
REWARD_PG[1, 2] = np.nan

# The second is the usual one, of one update a step and no old policy; the rates are those of the
# first three updates.
CASES = {
    "token": {
        "algorithm.scale_by": "std",
        "algorithm.clip_low": 0.1,
        "algorithm.clip_high": 0.35,
        "algorithm.kl_coef": 0.25,
        "algorithm.entropy_coef": 0.07,
        "algorithm.normalizer": "token",
        "algorithm.mask_truncated": True,
        "rollout_correction.level": "token",
        "rollout_correction.cap": 1.3,
        "batch.minibatches": 2,
        "rollout.temperature": 0.8,
        "optim.learning_rate": 0.02,
        "optim.beta1": 0.6,
        "optim.beta2": 0.8,
        "optim.eps": 1e-3,
        "optim.weight_decay": 0.4,
        "optim.max_grad_norm": 0.5,
        "optim.schedule": "linear",
        "optim.end_fraction": 0.25,
        "loop.num_steps": 2,
        # From 0.02 by three quarters of it over 2 steps of 2 updates.
        "rates": [0.02, 0.01625, 0.0125],
    },
    "constant": {
        "algorithm.scale_by": "sample_std",
        "algorithm.kl_coef": 0.3,
        "algorithm.kl_estimator": "k3_ratio",
        "algorithm.normalizer": "constant",
        "rollout.max_tokens": 7,
        "rollout.top_k": 9,
        "rollout.top_p": 0.7,
        "optim.learning_rate": 0.03,
        "optim.warmup_steps": 4,
        "optim.eps": 2e-3,
        "optim.max_grad_norm": 0.0,
        "rates": [0.0075, 0.015, 0.0225],
    },
    "sequence": {
        "algorithm.scale_by": "none",
        "algorithm.clip_low": 0.3,
        "algorithm.clip_high": 0.15,
        "algorithm.kl_coef": 0.2,
        "algorithm.kl_estimator": "k3_ratio",
        "algorithm.normalizer": "sequence",
        "algorithm.num_iterations": 3,
        "rollout_correction.level": "sequence",
        "rollout_correction.bound": "mask",
        "rollout_correction.cap": 3.0,
        "optim.learning_rate": 0.01,
        "optim.warmup_steps": 1,
        "optim.schedule": "cosine",
        "optim.end_fraction": 0.5,
        "optim.beta1": 0.7,
        "optim.beta2": 0.9,
        "optim.eps": 4e-3,
        "optim.weight_decay": 0.2,
        "optim.max_grad_norm": 0.2,
        "loop.num_steps": 1,
        # After one update of warm-up, half of it and half of (1 + cos(pi i / 2)) / 2 of it.
        "rates": [0.01, 0.01, 0.0075],
    },
}


def config_of(options: dict):
    config = options_lib.default()
    for name, value in options.items():
        if name != "rates":
            override(config, name, str(value))
    return config


# --- The plain side -------------------------------------------------------------------------------


def _rows(rollouts: Rollouts):
    """Every completion after a prompt of its own, and where its tokens are predicted."""
    ids_PGT = np.zeros((P, G, Q + C), np.int32)
    at_P1C = rollouts.prompt_length_P[:, None, None] + np.arange(C)[None, None]
    for p, g in np.ndindex(P, G):
        ids_PGT[p, g, : at_P1C[p, 0, 0]] = rollouts.prompt_PQ[p, : at_P1C[p, 0, 0]]
        ids_PGT[p, g, at_P1C[p, 0]] = rollouts.completion_PGC[p, g]
    return ids_PGT, np.broadcast_to(at_P1C - 1, (P, G, C))


def _log_probs(params, ids_PGT, at_PGC):
    each = jax.vmap(jax.vmap(lambda row: tiny.plain_log_probs(params, row)))
    return jnp.take_along_axis(each(ids_PGT), at_PGC[..., None], axis=2)


plain_log_probs_of = jax.jit(_log_probs)


def cut(log_prob_PGCV, sampling: Sampling, target_PGC) -> np.ndarray:
    """Tokens of the distribution that is drawn from, bool [P, G, C, V], and the target."""
    score = np.asarray(log_prob_PGCV, np.float64) / sampling.temperature
    order = np.argsort(-score, axis=-1)
    prob = np.exp(np.take_along_axis(score, order, -1))
    prob[..., sampling.top_k or prob.shape[-1] :] = 0
    prob /= prob.sum(-1, keepdims=True)
    inside = (np.cumsum(prob, -1) - prob < sampling.top_p) & (prob > 0)
    allowed = np.zeros(score.shape, bool)
    np.put_along_axis(allowed, order, inside, -1)
    return allowed | (np.arange(score.shape[-1]) == target_PGC[..., None])


def _plain_loss(params, given):
    """The objective from the papers' formulas, and the log-probabilities; all of it traced."""
    score = _log_probs(params, given["ids"], given["at"]) / given["temperature"]
    log_prob = jax.nn.log_softmax(jnp.where(given["allowed"], score, -jnp.inf))
    log_prob = jnp.where(given["allowed"], log_prob, 0.0)
    logp = jnp.take_along_axis(log_prob, given["target"][..., None], axis=-1)[..., 0]
    entropy = -(jnp.where(given["allowed"], jnp.exp(log_prob), 0.0) * log_prob).sum(-1)
    old = jnp.where(given["on_policy"], jax.lax.stop_gradient(logp), given["old"])
    ratio, a = jnp.exp(logp - old), given["advantage"][..., None]
    clipped = jnp.clip(ratio, 1 - given["clip_low"], 1 + given["clip_high"])
    loss = -jnp.minimum(ratio * a, clipped * a) * given["importance"]
    kl = jnp.exp(given["ref"] - logp) - (given["ref"] - logp) - 1
    loss += given["kl_coef"] * kl * jnp.where(given["kl_by_ratio"], ratio, 1.0)
    loss -= given["entropy_coef"] * entropy
    weight = given["weight"]
    return (weight * jnp.where(weight > 0, loss, 0.0)).sum(), (logp, entropy, kl)


plain_loss = jax.jit(jax.value_and_grad(_plain_loss, has_aux=True))


def plain_logp(params, rollouts: Rollouts, sampling: Sampling) -> np.ndarray:
    """Log-probabilities of the completions' tokens under what the sampler draws from, float64."""
    target_PGC = rollouts.completion_PGC
    log_prob = np.asarray(plain_log_probs_of(params, *_rows(rollouts)), np.float64)
    score = np.where(cut(log_prob, sampling, target_PGC), log_prob / sampling.temperature, -np.inf)
    log_prob = score - np.log(np.exp(score).sum(-1, keepdims=True))
    return np.take_along_axis(log_prob, target_PGC[..., None], -1)[..., 0]


def plain_advantages(reward_PG, scale_by: str) -> np.ndarray:
    adv_PG = reward_PG - np.nanmean(reward_PG, axis=1, keepdims=True)
    if scale_by != "none":
        std_P1 = np.nanstd(reward_PG, axis=1, ddof=scale_by == "sample_std", keepdims=True)
        adv_PG /= std_P1 + 1e-4 * (scale_by == "sample_std")
    return np.nan_to_num(adv_PG)


def plain_weights(action_PGC, config) -> np.ndarray:
    """Of each token of a minibatch in the loss, which is their weighted sum."""
    length_PG1 = action_PGC.sum(-1, keepdims=True)
    if config.algorithm.normalizer == "token":
        return action_PGC / action_PGC.sum()
    if config.algorithm.normalizer == "sequence":
        return action_PGC / np.maximum(length_PG1, 1) / (length_PG1 > 0).sum()
    return action_PGC / (action_PGC.shape[0] * G * config.rollout.max_tokens)


def plain_importance(old, sampler, action_PGC, config) -> np.ndarray:
    correction, cap = config.rollout_correction, config.rollout_correction.cap
    if correction.level == "none":
        return np.ones((P, G, C))
    log_ratio = np.where(action_PGC, old - sampler, 0)
    if correction.level == "sequence":
        log_ratio = np.broadcast_to(log_ratio.sum(-1, keepdims=True), (P, G, C))
    beyond = 0 if correction.bound == "mask" else cap
    return np.where(np.exp(log_ratio) > cap, beyond, np.exp(log_ratio))


class AdamW:
    """Loshchilov & Hutter 2019, algorithm 2, in float64; matrices decay."""

    def __init__(self, options, params):
        self.options, self.count = options, 0
        self.m = jax.tree.map(lambda p: np.zeros(p.shape), params)
        self.v = self.m

    def step(self, params, grads, rate: float):
        o, self.count = self.options, self.count + 1
        grads = jax.tree.map(lambda g: np.asarray(g, np.float64), grads)
        norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
        if o.max_grad_norm:
            assert norm > 1.5 * o.max_grad_norm  # else the case would not see it
            grads = jax.tree.map(lambda g: g * o.max_grad_norm / norm, grads)
        self.m = jax.tree.map(lambda m, g: o.beta1 * m + (1 - o.beta1) * g, self.m, grads)
        self.v = jax.tree.map(lambda v, g: o.beta2 * v + (1 - o.beta2) * g**2, self.v, grads)

        def one(path, p, m, v):
            m, v = m / (1 - o.beta1**self.count), v / (1 - o.beta2**self.count)
            decay = o.weight_decay * (path[-1].key in ("kernel", "embedding"))
            return np.asarray(p, np.float64) - rate * (m / (np.sqrt(v) + o.eps) + decay * p)

        return jax.tree_util.tree_map_with_path(one, params, self.m, self.v), norm


# --- make_learner ---------------------------------------------------------------------------------


@functools.cache
def learner_of(case: str):
    return make_learner(config_of(CASES[case]), MODEL, tiny.one_device())


@functools.cache
def rollouts_of(case: str) -> Rollouts:
    """The tiny rollouts, their sampler near the policy, so that a cap holds for some alone."""
    rollouts, rng = tiny.rollouts(P, G, C), np.random.default_rng(5)
    logp_PGC = plain_logp(tiny.params(), rollouts, learner_of(case).scorer.sampling)
    drift = rng.normal(0, 0.6, (P, G, C))
    return rollouts.replace(logp_PGC=(logp_PGC + drift).astype(np.float32))


def _prepared(case: str):
    """(experience, old policy's and reference's log-probabilities as they must be)."""
    learner, rollouts = learner_of(case), rollouts_of(case)
    prepare = learner.prepare
    experience = jax.device_get(
        prepare(prepare.log_probs(tiny.params(), tiny.params(7), rollouts), jnp.float32(REWARD_PG))
    )
    old, ref = (
        plain_logp(p, rollouts, learner.scorer.sampling) for p in (tiny.params(), tiny.params(7))
    )
    return experience, old, ref


@pytest.mark.parametrize("case", CASES)
def test_what_an_update_begins_from(case):
    config, rollouts = config_of(CASES[case]), rollouts_of(case)
    experience, old, ref = _prepared(case)

    known_PGC = np.arange(C) < rollouts.length_PG[..., None]
    action_PGC = known_PGC & (
        rollouts.stopped_PG[..., None] | (not config.algorithm.mask_truncated)
    )
    np.testing.assert_array_equal(experience.action_PGC, action_PGC)
    want = plain_advantages(REWARD_PG, config.algorithm.scale_by)
    np.testing.assert_allclose(experience.advantage, want, rtol=1e-5, atol=1e-6)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5)
    close(experience.ref_logp_PGC[known_PGC], ref[known_PGC])
    if case == "constant":
        assert experience.old_logp_PGC is None and not derived.needs_old_pass(config)
    else:
        close(experience.old_logp_PGC[known_PGC], old[known_PGC])


@pytest.mark.parametrize("case", CASES)
def test_three_updates_are_the_plain_ones(case):
    config, learner, rollouts = config_of(CASES[case]), learner_of(case), rollouts_of(case)
    algorithm, minibatches = config.algorithm, config.batch.minibatches
    experience, old, ref = _prepared(case)
    if experience.old_logp_PGC is not None:  # else the ratio would be 1 in the first update
        drift = np.random.default_rng(6).normal(0, 0.3, (P, G, C)).astype(np.float32)
        experience = experience.replace(old_logp_PGC=experience.old_logp_PGC + drift)
        old = old + drift
    params, mesh = tiny.params(), tiny.one_device()
    state = train_state.start(tiny.params(), MODEL, mesh, learner.optimizer)
    plain = AdamW(config.optim, params)
    ids, at = _rows(rollouts)
    given = {
        "ids": ids, "at": at, "target": rollouts.completion_PGC,
        "temperature": np.float32(config.rollout.temperature),
        "on_policy": experience.old_logp_PGC is None, "old": np.float32(old),
        "ref": np.float32(ref),
        "advantage": np.float32(plain_advantages(REWARD_PG, algorithm.scale_by)),
        "clip_low": np.float32(algorithm.clip_low), "clip_high": np.float32(algorithm.clip_high),
        "kl_coef": np.float32(algorithm.kl_coef),
        "kl_by_ratio": algorithm.kl_estimator == "k3_ratio",
        "entropy_coef": np.float32(algorithm.entropy_coef),
    }  # fmt: skip

    for number, rate in enumerate(CASES[case]["rates"]):
        index, action_PGC = number % minibatches, np.array(experience.action_PGC)
        action_PGC[np.arange(P) % minibatches != index] = False
        of_batch = experience.action_PGC[index::minibatches]
        weight_PGC = np.zeros((P, G, C), np.float32)
        weight_PGC[index::minibatches] = plain_weights(of_batch, config)
        log_prob = plain_log_probs_of(params, ids, at)
        importance = plain_importance(old, rollouts.logp_PGC, experience.action_PGC, config)
        now = given | {
            "allowed": cut(log_prob, learner.scorer.sampling, rollouts.completion_PGC),
            "weight": weight_PGC,
            "importance": np.float32(importance),
        }
        (loss, (logp, entropy, kl)), grads = plain_loss(params, now)
        params, norm = plain.step(params, grads, rate)
        params = jax.tree.map(np.float32, params)
        state, metrics = learner.update(state, experience, index)

        mean = lambda x, at=action_PGC: np.asarray(x)[at].mean()  # noqa: E731
        assert not metrics["skipped"]
        for name, want in {
            "policy/loss": loss,
            "policy/grad_norm": norm,
            "policy/entropy": mean(entropy),
            "policy/kl": mean(kl),
            "policy/importance_mean": mean(importance),
        }.items():
            np.testing.assert_allclose(metrics[name], want, rtol=2e-4, err_msg=name)
        jax.tree.map(
            lambda got, want, rate=rate: np.testing.assert_allclose(
                got, want, rtol=0, atol=5e-3 * rate
            ),
            jax.device_get(state.params),
            params,
        )
        np.testing.assert_allclose(learner.learning_rate(number), rate, rtol=1e-6)
    if case == "token":  # what the case is about was there to see
        ratio = np.exp(np.asarray(logp) - old)[action_PGC]
        assert (ratio < 0.9).any() and (ratio > 1.35).any()
        assert 0 < metrics["policy/importance_capped_share"] < 1


def test_what_else_the_parts_of_an_update_are_given(monkeypatch):
    """Options that change no number on one CPU device, and the guards' bounds."""
    given, make_update = {}, update_lib.make_update

    def noted(*args, **options):
        given.update(options)
        return make_update(*args, **options)

    monkeypatch.setattr(update_lib, "make_update", noted)
    fit = MemoryPlan(remat="full", tokens=77)

    def learner(**options):
        config = config_of({name.replace("__", "."): value for name, value in options.items()})
        return make_learner(config, MODEL, tiny.one_device(), fit)

    usual = learner().scorer
    assert (usual.dtype, usual.remat, usual.scan_layers) == (jnp.float32, "dots", True)
    assert (usual.microbatch, usual.tokens, usual.kernels) == (0, 0, RowBlocks())
    assert learner(model__attention="xla").scorer.kernels == attention
    assert not given["offload"] and not given["bounds"] and given["num_minibatches"] == 1
    other = learner(
        model__dtype="bfloat16", model__remat="auto", model__scan_layers="off",
        batch__microbatch=-1, batch__minibatches=2, optim__offload=True,
        guards__kl="skip", guards__kl_max=0.5,
        guards__entropy="skip", guards__entropy_min=0.25, guards__entropy_max=3.0,
    ).scorer  # fmt: skip
    assert (other.dtype, other.remat, other.scan_layers) == (jnp.bfloat16, "full", False)
    assert (other.microbatch, other.tokens) == (0, 77)
    assert given["offload"] and given["num_minibatches"] == 2
    assert given["bounds"] == {"policy/kl": (-np.inf, 0.5), "policy/entropy": (0.25, 3.0)}
    assert learner(batch__microbatch=4).scorer.microbatch == 4
    assert learner(batch__microbatch=4).scorer.tokens == 0
    assert learner(model__remat="none").scorer.remat == "none"


def test_what_changes_in_the_objective_is_given_its_options():
    changing = {
        "batch.prompts": 3, "batch.group": 5, "algorithm.kl_coef": 0.3, "algorithm.kl_target": 0.2,
        "algorithm.kl_horizon": 77, "algorithm.entropy_coef": 0.04, "algorithm.entropy_target": 0.6,
        "algorithm.entropy_coef_delta": 0.01, "algorithm.entropy_coef_min": 0.02,
        "algorithm.entropy_coef_max": 0.08, "algorithm.reference_refresh_steps": 2,
        "algorithm.reference_mix": 0.7,
    }  # fmt: skip
    learner = make_learner(config_of(changing), MODEL, tiny.one_device())
    assert learner.controllers == (
        AdaptiveKL(start=0.3, target=0.2, horizon=77, completions=15),
        AdaptiveEntropy(start=0.04, target=0.6, delta=0.01, lowest=0.02, highest=0.08),
    )
    ones = jax.tree.map(jnp.ones_like, tiny.params())
    moved = learner.refresh_reference(ones, jax.tree.map(jnp.zeros_like, ones))
    assert all((x == np.float32(0.7)).all() for x in jax.tree.leaves(moved))
    fixed = make_learner(config_of({}), MODEL, tiny.one_device())
    assert fixed.controllers == () and fixed.refresh_reference is None


def test_how_the_optimizer_keeps_its_numbers():
    def kept(**options):
        config = config_of({name.replace("__", "."): value for name, value in options.items()})
        optimizer = make_learner(config, MODEL, tiny.one_device()).optimizer
        params = {"layer": {"kernel": jnp.zeros((256, 4), config.model.param_dtype)}}
        return sorted(str(x.dtype) for x in jax.tree.leaves(optimizer.init(params)) if x.ndim)

    assert kept() == ["float32"] * 2
    assert kept(optim__moments_dtype="bfloat16") == ["bfloat16"] * 2
    assert kept(optim__moments_dtype="int8").count("int8") == 1  # of the second moment uint8
    assert kept(model__param_dtype="bfloat16") == ["float32"] * 2
    with_copy = kept(model__param_dtype="bfloat16", optim__master_weights=True)
    assert with_copy == ["float32"] * 3


# --- Credit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [3, C])
def test_the_reward_of_a_row_meets_its_tokens(longest):
    """Rewards that are a function of the completion, given as the judge gives them: prompt by
    prompt. Each completion's advantage is that of its own tokens.
    """
    rollouts, rng = tiny.rollouts(P, G, C), np.random.default_rng(4)
    length_PG = np.minimum(rng.integers(2, C + 1, (P, G), dtype=np.int32), longest)
    length_PG[0, 0] = longest
    shown_PGC = rng.integers(2, MODEL.vocab_size, (P, G, C), dtype=np.int32)
    shown_PGC = np.where(np.arange(C) < length_PG[..., None], shown_PGC, 0)
    limit = 16  # of tokens, of which they need a quarter or two

    def wider(x):
        return np.pad(x, ((0, 0), (0, 0), (0, limit - C)))

    rollouts = rollouts.replace(
        completion_PGC=wider(shown_PGC), logp_PGC=wider(rollouts.logp_PGC), length_PG=length_PG
    )
    reward_B = np.float32([_worth(ids) for ids in shown_PGC.reshape(-1, C)])
    scores, events = Scores(reward_B, {}, {}, {}), []

    class Noted:
        def __init__(self, prepare):
            self.prepare = prepare

        def log_probs(self, *given):
            events.append("log-probabilities")
            return self.prepare.log_probs(*given)

        def __call__(self, *given, **more):
            return self.prepare(*given, **more)

    run = SimpleNamespace(
        config=config_of({}), mesh=tiny.one_device(),
        prepare=Noted(learner_of("constant").prepare),
        course=Course(9, P), weights=lambda train: train.params, controllers=(),
        critic_weights=lambda train: None,
    )  # fmt: skip
    state = RunState(
        train=SimpleNamespace(params=tiny.params()),
        next_rollout=Rollout(None, None, rollouts, 0.0),
    )
    monitor = SimpleNamespace(
        phase=lambda name, state: contextlib.nullcontext(),
        sampled=lambda *given: None,
        rewards=lambda *given: events.append("rewards") or scores,
        scored=lambda *given: None,
        guards=SimpleNamespace(skips_rollout=False),
    )

    grpo.sample_and_reward(run, state, monitor)

    assert events == ["log-probabilities", "rewards"]  # these take long: the device has work
    assert state.next_rollout is None
    experience = state.experience
    assert experience.rollouts.completion_PGC.shape[-1] == (4 if longest == 3 else 8)
    own_PG = np.array([[_worth(ids) for ids in ids_GC] for ids_GC in
                       np.asarray(experience.rollouts.completion_PGC)])  # fmt: skip
    assert len(np.unique(own_PG)) == P * G
    want = plain_advantages(own_PG, "sample_std")
    np.testing.assert_allclose(experience.advantage, want, rtol=1e-4, atol=1e-5)


def _worth(ids) -> float:
    """Another number for every completion, whatever its padding."""
    return float(np.sin((np.asarray(ids) * 1.7 ** np.arange(len(ids))).sum()))


# --- make_engine ----------------------------------------------------------------------------------

SAMPLING = {
    "rollout.temperature": 0.7,
    "rollout.top_k": 6,
    "rollout.top_p": 0.8,
    "rollout.max_tokens": C,
    "batch.prompts": P,
    "batch.group": G,
    "seed": 11,
}
STOPS = (1, 5, 17)


@functools.cache
def engine():
    return make_engine(config_of(SAMPLING), MODEL, STOPS, tiny.one_device())


class Pool:
    """Takes what the judge submits."""

    rewards = ()

    def __init__(self):
        self.seen = []

    def submit(self, prompts, completions, columns, *, completion_ids, **more):
        self.seen.append((columns["number"][0], completion_ids, more["trainer_state"]))


def drawn_at(step: int, passed_over: int, prompts: list[list[int]], ahead: int = 0):
    """What `rollout.sample` draws there, from a file of these prompts, and what is judged."""
    problems = [Problem("", {"number": n}, f"line {n}") for n in range(len(prompts))]
    pool, policy = Pool(), SimpleNamespace(text=lambda ids: "")
    run = SimpleNamespace(
        config=config_of(SAMPLING),
        course=Course(100, P),
        train=Questions(problems, prompts, [""] * len(prompts)),
        engine=engine(),
        policy=policy,
        rewards=pool,
        weights=lambda train: train.params,
        demonstrations=NOTHING,
        drawing=ONE_TURN,
    )
    lines = SimpleNamespace(close=lambda: None, closed_at=0.0)
    state = RunState(step=step, passed_over=passed_over)
    state.train = SimpleNamespace(params=tiny.params())
    return rollout.sample(run, state, lines, lambda: None, ahead=ahead), pool


def test_the_sampler_draws_as_its_options_say():
    rollouts, sampling = tiny.rollouts(P, G, C), Sampling(0.7, 6, 0.8)
    prompts = [ids[:n].tolist() for ids, n in zip(rollouts.prompt_PQ, rollouts.prompt_length_P)]
    drawn = drawn_at(0, 0, prompts)[0].completions
    order = prompt_indices(11, 0, P, P)

    assert drawn.completion_PGC.shape == (P, G, C)
    np.testing.assert_array_equal(drawn.prompt_length_P, rollouts.prompt_length_P[order])
    action_PGC = np.arange(C) < drawn.length_PG[..., None]
    is_stop = np.isin(drawn.completion_PGC, STOPS) & action_PGC
    last = np.arange(C) == drawn.length_PG[..., None] - 1
    np.testing.assert_array_equal(is_stop, last & drawn.stopped_PG[..., None])
    assert (drawn.length_PG[~drawn.stopped_PG] == C).all()
    assert {0, 1} == set(drawn.stopped_PG.ravel().astype(int))
    at = dataclasses.replace(drawn, prompt_PQ=drawn.prompt_PQ[:, :Q])
    want = plain_logp(tiny.params(), at, sampling)
    np.testing.assert_allclose(drawn.logp_PGC[action_PGC], want[action_PGC], rtol=0, atol=2e-5)
    # The target is let in by `plain_logp`: none of those drawn needed it.
    log_prob = np.asarray(plain_log_probs_of(tiny.params(), *_rows(at)))
    nobody = np.full((P, G, C), -1)
    drawable = np.take_along_axis(
        cut(log_prob, sampling, nobody), drawn.completion_PGC[..., None], -1
    )
    assert drawable[action_PGC].all()


def test_two_steps_draw_differently_from_equal_prompts():
    (first, _), (again, _), (second, _), (ahead, _) = (
        drawn_at(step, 0, [[7, 8, 9]] * P, ahead)
        for step, ahead in ((0, 0), (0, 0), (1, 0), (0, 1))
    )
    ids = [x.completions.completion_PGC for x in (first, again, second, ahead)]
    np.testing.assert_array_equal(ids[0], ids[1])
    np.testing.assert_array_equal(ids[2], ids[3])
    assert (ids[0] != ids[2]).any(axis=-1).mean() > 0.5
    rows = ids[0].reshape(P * G, C)  # and so do the rows of a step
    assert len(np.unique(rows, axis=0)) > P * G // 2


def test_what_is_drawn_after_a_roll_back_does_not_come_again():
    """Step 3 once two draws were undone has the prompts and the keys of draw 5."""
    prompts = [[2 + n, 3 + n] for n in range(10)]
    back, pool = drawn_at(3, 2, prompts)
    never, _ = drawn_at(5, 0, prompts)
    undone, _ = drawn_at(3, 0, prompts)
    index = prompt_indices(11, 5, 10, P)
    want = [[2 + n, 3 + n] for n in index]
    assert back.completions.prompt_PQ[:, :2].tolist() == want
    assert undone.completions.prompt_PQ[:, :2].tolist() != want
    np.testing.assert_array_equal(back.completions.completion_PGC, never.completions.completion_PGC)
    # Each group is judged beside its own problem, as of step 3.
    for number, completion_ids, seen in pool.seen:
        g = index.tolist().index(number)
        rollouts = back.completions
        want = [
            ids[:n].tolist() for ids, n in zip(rollouts.completion_PGC[g], rollouts.length_PG[g])
        ]
        assert completion_ids == want
        assert seen["global_step"] == 3 and seen["epoch"] == 5 * P / 10
    assert len(pool.seen) == P


def test_how_the_sampler_keeps_its_numbers_and_the_evaluator_not():
    """The policy is judged as it is, however rollouts are drawn."""
    config = config_of({"rollout.weights_dtype": "int8", "rollout.kv_cache_dtype": "int8",
                        "rollout.num_slots": 5, "rollout.compact": False})  # fmt: skip

    def kept(config, exact):
        made = make_engine(config, MODEL, STOPS, tiny.one_device(), exact=exact)
        cache = jax.eval_shape(lambda: made.empty(1, 1, 16)).cache
        weights = made.publish.like(tiny.params())["layers"]
        return made, *({str(x.dtype) for x in jax.tree.leaves(tree)} for tree in (weights, cache))

    made, weights, cache = kept(config, False)
    assert "int8" in weights and "int8" in cache
    assert (made.num_slots, made.compact, made.decoder.stop_ids) == (5, False, STOPS)
    made, weights, cache = kept(config, True)
    assert weights == cache == {"float32"}
    weights_alone = config_of({"rollout.weights_dtype": "int8"})
    assert kept(weights_alone, False)[2] == {"float32"}
    assert kept(config_of({"rollout.kv_cache_dtype": "int8"}), False)[1] == {"float32"}
    bfloat16 = config_of({"model.dtype": "bfloat16", "batch.prompts": 6, "batch.group": 7})
    made, weights, cache = kept(bfloat16, True)
    assert weights == cache == {"bfloat16"}
    assert (made.num_slots, made.compact, made.decoder.max_tokens) == (42, True, 256)
    assert made.decoder.sampling == Sampling()


# --- Supervised training --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nll", "dft"])
def test_the_supervised_gradient_is_the_plain_one(kind):
    """Of the mean cross-entropy of the completions' tokens, their stop tokens among them.

    With "dft" of some of their tokens, each weighted by its probability as a constant.
    """
    rollouts, scorer = tiny.rollouts(P, G, C), learner_of("constant").scorer
    scorer = dataclasses.replace(scorer, sampling=Sampling())
    chosen_PGC = np.random.default_rng(1).random((P, G, C)) < 0.6
    rows = [
        Example(rollouts.prompt_PQ[p, : rollouts.prompt_length_P[p]],
                rollouts.completion_PGC[p, g, : rollouts.length_PG[p, g]],
                chosen_PGC[p, g, : rollouts.length_PG[p, g]] if kind == "dft" else None)
        for p, g in np.ndindex(P, G)
    ]  # fmt: skip
    config = config_of(
        {
            "data.max_prompt_tokens": Q,
            "sft.max_tokens": C,
            "sft.warmup_steps": 0,
            "sft.loss": kind,
        }
    )
    config.mesh.update(data=1, fsdp=1)
    learner = make_supervised_learner(config, MODEL, scorer.mesh, 1)
    sgd = optax.sgd(1.0)
    update = make_update(learner.scorer, learner.update.component, sgd, num_minibatches=1)
    state = train_state.start(tiny.params(), MODEL, scorer.mesh, sgd)
    given = sft.rollouts(rows, 5, config)  # groups; what fills them up is not learned from
    assert given.length_PG.size > len(rows)
    prepared = learner.prepare.log_probs(state.params, None, given)
    experience = learner.prepare(prepared, jnp.zeros(given.length_PG.shape))

    state, metrics = update(state, experience, 0)

    ids, at = _rows(rollouts)
    action_PGC = np.arange(C) < rollouts.length_PG[..., None]
    action_PGC &= chosen_PGC | (kind == "nll")
    params, zero = tiny.params(), np.zeros((P, G, C), np.float32)
    given = {
        "ids": ids, "at": at, "target": rollouts.completion_PGC, "temperature": np.float32(1),
        "on_policy": True, "old": zero, "ref": zero, "advantage": np.ones((P, G), np.float32),
        "clip_low": np.float32(1), "clip_high": np.float32(9), "kl_coef": np.float32(0),
        "kl_by_ratio": False, "entropy_coef": np.float32(0),
        "allowed": np.ones((P, G, C, MODEL.vocab_size), bool),
        "weight": np.float32(action_PGC / action_PGC.sum()), "importance": np.ones_like(zero),
    }  # fmt: skip
    (_, (logp, _, _)), grads = plain_loss(params, given)
    nll = -logp[action_PGC]
    if kind == "dft":
        (_, grads) = plain_loss(params, given | {"weight": np.exp(logp) * given["weight"]})
        np.testing.assert_allclose(metrics["sft/nll"], nll.mean(), rtol=1e-5)
        nll *= np.exp(-nll)
    np.testing.assert_allclose(metrics["sft/loss"], nll.mean(), rtol=1e-5)
    assert experience.action_PGC.sum() == action_PGC.sum()
    largest = max(np.abs(g).max() for g in jax.tree.leaves(grads))
    jax.tree.map(
        lambda p, new, g: np.testing.assert_allclose(p - new, g, rtol=0, atol=1e-5 * largest),
        params,
        jax.device_get(state.params),
        grads,
    )


def test_a_worked_solution_ends_with_the_stop_token(tmp_path):
    config = config_of(
        {"data.task": "arithmetic", "data.num_train": 20, "data.num_eval": 2, "sft.batch": 6,
         "data.max_prompt_tokens": 16, "sft.max_tokens": 56, "model.width": 32}
    )  # fmt: skip
    run_folder.open_for(config, tmp_path)
    run, data = given_lib.build(sft.SFT, config, tmp_path, config.model.path, evaluates=False)
    policy = run.policy
    problems = load_problems(config)[0]
    for step in (0, 3):
        index = prompt_indices(0, step, 20, 6)
        for i, (prompt_ids, ids, _) in zip(index, data.draw(step, {})[0], strict=True):
            assert policy.tokenizer.decode(prompt_ids) == problems[i].prompt
            assert ids[-1] == policy.tokenizer.eos_token_id and ids[-1] not in ids[:-1]
            assert policy.tokenizer.decode(ids[:-1]).partition("#### ")[1]


def test_supervised_training_is_judged_by_the_held_out_problems(tmp_path):
    options = {"data.task": "arithmetic", "data.num_train": 20, "data.num_eval": 6,
               "data.max_prompt_tokens": 16, "model.width": 32, "evaluation.num_problems": 4,
               "rewards.names": ("exact_answer",), "rewards.weights": (1.0,)}  # fmt: skip
    config = config_of(options)
    run_folder.open_for(config, tmp_path)
    run, _ = given_lib.build(sft.SFT, config, tmp_path, config.model.path, evaluates=True)
    run.rewards.close()
    assert run.held_out.problems == load_problems(config)[1][:4]


def test_supervised_training_holds_no_conversations(capsys):
    """Nor does it ask for samples of which nothing tells the right ones."""
    tool = "grpo_jax.environments.tasks.calculator:multiply"
    for more in ({"environment.tools": (tool,)}, {"environment.classes": ("no.such:Class",)}):
        options = {"data.task": "arithmetic", "rewards.names": (), "rewards.weights": ()} | more
        assert sft.held_out_problems(config_of(options), None, None) == (None, [])
        assert "grpo_jax.evaluate holds them" in capsys.readouterr().out
    options = {"evaluation.num_samples": 4, "rewards.names": (), "rewards.weights": ()}
    with pytest.raises(ValueError, match="none of the rewards is known to give 1"):
        sft.held_out_problems(config_of(options), None, None)


def test_what_supervised_training_is_given():
    """Its own rate, warm-up, decay and batch; the run's AdamW else; no cut probabilities."""
    options = {
        "sft.learning_rate": 0.01, "sft.warmup_steps": 2, "sft.batch": 12,
        "sft.weight_decay": 0.3, "sft.microbatch": 4, "optim.beta1": 0.6, "optim.beta2": 0.8,
        "optim.eps": 1e-3, "rollout.temperature": 0.5, "rollout.top_k": 3,
    }  # fmt: skip
    learner = make_supervised_learner(config_of(options), MODEL, tiny.one_device(), 6)
    assert learner.scorer.sampling == Sampling()
    config = config_of(options)  # four of the longest demonstrations at once
    assert learner.scorer.tokens == 4 * (config.data.max_prompt_tokens + config.sft.max_tokens)

    params = {"layer": {"kernel": np.full((2, 2), 3.0), "bias": np.full(2, 3.0)}}
    config = config_of({"optim.beta1": 0.6, "optim.beta2": 0.8, "optim.eps": 1e-3,
                        "optim.weight_decay": 0.3, "optim.max_grad_norm": 1.0})  # fmt: skip
    plain, optimizer = AdamW(config.optim, params), learner.optimizer
    got = jax.tree.map(jnp.float32, params)
    state = optimizer.init(got)
    # Half of the peak, the peak, and from there half a cosine over the four updates that are left.
    for rate in [0.005, 0.01, *(0.005 * (1 + np.cos(np.pi * i / 4)) for i in range(4))]:
        grads = jax.tree.map(lambda p: 0.9 * p - 0.7, params)
        params, _ = plain.step(params, grads, rate)
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, got)
        got = optax.apply_updates(got, updates)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, params)


def test_what_an_evaluation_is_given(monkeypatch, tmp_path):
    """The evaluator, with the weights that it publishes; greedy always, samples at the end."""
    calls = []

    def noted(*args, **options):
        calls.append((args, options))
        return {"eval/accuracy": 0.25, "eval/reward": 0.5}

    monkeypatch.setattr(held_out, "run", noted)
    problems = SimpleNamespace(problems=["held out"])
    config = config_of({"evaluation.num_samples": 3, "evaluation.temperature": 0.6, "seed": 11})
    evaluator = SimpleNamespace(publish=lambda params: ("published", params))
    run = SimpleNamespace(
        config=config, engine=None, evaluator=evaluator, policy="policy", held_out=problems,
        train=None, rewards="rewards", folder=tmp_path, course=Course(9, P),
        weights=lambda train: train.params, measure=None, drawing="drawing",
    )  # fmt: skip
    state = RunState(step=2, train=SimpleNamespace(params="params"))
    told = []
    monitor = SimpleNamespace(
        alive="alive", evaluated=lambda when, scores: told.append((when, scores))
    )
    values = results.evaluate(run, state, monitor, final=True)
    assert len(calls) == 2 and state.accuracy == values["eval/accuracy"] == 0.25
    for (args, options), num_samples in zip(calls, (0, 3)):
        assert args == (evaluator, ("published", "params"), "policy", problems, "rewards")
        assert options["num_samples"] == num_samples and options["temperature"] == 0.6
        assert options["key"] == keys.key_for(11, "evaluate", 2)
        assert options["drawing"] == "drawing"
        assert options["on_harvest"] == "alive"  # where a stop gives the evaluation up
        kind = f"sampled_{num_samples}" if num_samples else "greedy"
        assert options["file"] == tmp_path / "evaluations" / f"step_000002_{kind}.jsonl"
        options["on_scores"](kind)
        assert told[-1] == ("The evaluation after step 2", kind)
    results.evaluate(run, state, monitor, final=False)
    assert len(calls) == 3 and calls[-1][1]["num_samples"] == 0
