"""Updates of models with a scalar head: packed rows change nothing; a critic beside a policy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import made_once
import numpy as np
import optax
import pytest
import tiny
from states import same_bits

from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.algorithm.gae import GAE
from grpo_jax.algorithm.objective import Objective
from grpo_jax.algorithm.scalar_losses import BradleyTerryLoss, ValueLoss, bradley_terry, value_loss
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import actor_critic, scalars
from grpo_jax.learner.actor_critic import ActorCriticUpdate
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.train_state import param_shardings, start
from grpo_jax.models import lora
from grpo_jax.models.hf import targets
from grpo_jax.structs import Experience, Sampling

P, C, RATE = 8, 6, 0.5
SGD = optax.sgd(RATE)
MODEL = dataclasses.replace(tiny.MODEL, head="scalar")
MARGIN = np.linspace(-0.2, 0.5, P, dtype=np.float32)


def texts(seed=0):
    """Pairs of texts with common beginnings of several lengths."""
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(2, 40, n).tolist()  # noqa: E731
    found = []
    for p in range(P):
        common = draw(1 + p % 4)
        found.append([common + draw(rng.integers(1, C)), common + draw(rng.integers(1, C))])
    found[3][1] = found[3][0] + [5]  # one is the other's beginning
    return found


def pairs(shards=1) -> Experience:
    rollouts = scalars.as_rollouts(texts(), None, shards)
    signal = np.zeros(rollouts.length_PG.shape, np.float32)
    signal[:P, 0] = MARGIN
    return Experience(rollouts, signal, rollouts.chosen_PGC, None, None)


def updated(component, experience, mesh=None, **how):
    """The metrics of an update by gradient descent, and its gradient as one vector."""
    mesh = mesh or tiny.one_device()
    scorer = Scorer(MODEL, mesh, Sampling(), whole=True, **how)
    update = made_once.updating(scorer, component, SGD, num_minibatches=1)
    before = tiny.params(0, MODEL)
    placed = jax.device_put(before, param_shardings(MODEL, mesh))
    state = start(jax.tree.map(jnp.array, placed), MODEL, mesh, optax.sgd(RATE))
    state, metrics = update(state, transfer.shard_rows(mesh, experience), 0)
    slope = jax.tree.map(lambda a, b: (a - b) / RATE, before, transfer.to_host(state.params))
    flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(slope)])
    return {name: float(value) for name, value in metrics.items()}, flat


def plain(loss):
    """Loss and gradient of `loss(value_PGC)`, a row for each completion."""
    scorer = Scorer(MODEL, tiny.one_device(), Sampling())

    def of(params, rollouts):
        value = scorer.hidden(params, rollouts) @ params["score"]["kernel"]
        return loss(value.reshape(rollouts.completion_PGC.shape))

    def run(rollouts):
        value, slope = jax.jit(jax.value_and_grad(of))(tiny.params(0, MODEL), rollouts)
        return float(value), np.concatenate([np.ravel(x) for x in jax.tree.leaves(slope)])

    return run


@pytest.fixture(scope="module")
def of_pairs():
    def loss(value_PGC):
        reward_PG = jnp.where(pairs().action_PGC, value_PGC, 0).sum(-1)
        return bradley_terry(*reward_PG.T, MARGIN, 0.1).mean()

    return plain(loss)(pairs().rollouts)


def assert_same(got, want, tolerance=1e-5):
    (metrics, slope), (loss, wanted) = got, want
    assert metrics[next(n for n in metrics if n.endswith("/loss"))] == pytest.approx(loss, rel=1e-5)
    largest = np.abs(wanted).max()
    assert largest > 1e-3
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("at_once", [1000, 24])
def test_packing_changes_no_reward_model(of_pairs, at_once):
    """Everything in a row, and a pair or two in a row; all is computed from shared prompts."""
    assert_same(updated(BradleyTerryLoss(0.1), pairs(), tokens=at_once), of_pairs)


def test_a_mesh_changes_no_reward_model(of_pairs):
    for axes in ({"data": 4, "fsdp": 2}, {"data": 2, "sequence": 2, "tensor": 2}):
        mesh = sharding.make_mesh(**axes)
        experience = pairs(2 * sharding.num_row_shards(mesh))  # with groups of fillers alone
        assert_same(updated(BradleyTerryLoss(0.1), experience, mesh), of_pairs)


# --- Critics --------------------------------------------------------------------------------------


def sampled() -> Experience:
    """Rollouts with advantages and returns from a critic."""
    rollouts, rng = tiny.rollouts(4, 3, 5), np.random.default_rng(1)
    scorer = Scorer(tiny.MODEL, tiny.one_device(), Sampling())
    values = scalars.make_values(dataclasses.replace(scorer, model=MODEL))
    prepare = make_prepare(
        scorer,
        AdvantageOptions("none", "none", whiten="tokens", kl_in="reward", kl_coef=0.1),
        mask_truncated=False,
        with_old=True,
        values=values,
        gae=GAE(0.9, 0.8, 0.7),
    )
    critic = tiny.params(0, MODEL)
    given = prepare.log_probs(tiny.params(), tiny.params(7), rollouts, critic)
    return jax.device_get(prepare(given, jnp.float32(rng.uniform(size=(4, 3)))))


@pytest.fixture(scope="module")
def experience() -> Experience:
    return sampled()


def test_the_critics_values_are_those_of_plain_rows(experience):
    scorer = Scorer(MODEL, tiny.one_device(), Sampling())
    params, rollouts = tiny.params(0, MODEL), experience.rollouts
    value = scorer.hidden(params, rollouts) @ params["score"]["kernel"]
    value = np.asarray(value).reshape(rollouts.completion_PGC.shape)
    there = experience.action_PGC
    np.testing.assert_allclose(experience.value_PGC[there], value[there], rtol=1e-5, atol=1e-5)
    assert np.all(experience.value_PGC[~there] == 0)


def test_the_experience_has_what_gae_gives(experience):
    """From the very arrays of the experience, in float64."""
    from grpo_jax.algorithm import gae

    reward = np.random.default_rng(1).uniform(size=(4, 3)).astype(np.float32).astype(np.float64)
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    adv, ret = gae.evaluate(
        GAE(0.9, 0.8, 0.7),
        reward,
        wide(experience.value_PGC),
        experience.action_PGC,
        kl_coef=0.1,
        logp_PGC=wide(experience.old_logp_PGC),
        ref_logp_PGC=wide(experience.ref_logp_PGC),
        whitens=True,
    )
    np.testing.assert_allclose(experience.advantage, adv, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(experience.return_PGC, ret, rtol=1e-5, atol=1e-5)
    assert np.abs(adv).max() > 1


@pytest.mark.parametrize("at_once", [1000, 12])
def test_packing_changes_no_critic(experience, at_once):
    given = experience.replace(value_PGC=experience.value_PGC + 0.3)  # so that some are clipped

    def loss(value_PGC):
        there = jnp.asarray(given.action_PGC)
        each = value_loss(value_PGC, given.value_PGC, given.return_PGC, 0.2)
        return 0.5 * jnp.where(there, each, 0).sum() / there.sum()

    got = updated(ValueLoss(), given, tokens=at_once)
    assert_same(got, plain(loss)(given.rollouts))
    assert 0 < got[0]["value/clip_share"] < 1


def both(mesh, minibatches=1, model=MODEL, rate=RATE):
    scorer = Scorer(tiny.MODEL, mesh, Sampling())
    how = {"num_minibatches": minibatches}
    of_policy = made_once.updating(scorer, PolicyLoss(Objective()), SGD, **how)
    own = SGD if rate == RATE else optax.sgd(rate)
    of_critic = made_once.updating(
        dataclasses.replace(scorer, model=model), ValueLoss(), own, **how
    )
    return ActorCriticUpdate(of_policy, of_critic)


def fresh(mesh):
    own = start(tiny.params(), tiny.MODEL, mesh, optax.sgd(RATE))
    return actor_critic.together(own, start(tiny.params(0, MODEL), MODEL, mesh, optax.sgd(RATE)))


def test_both_learn_as_each_would_alone(experience):
    mesh = tiny.one_device()
    update, seen = both(mesh), []
    state, metrics = update(fresh(mesh), experience, 0, seen.append)
    for sizes in (update.policy.sizes, update.critic.sizes):
        sizes.restore(None)  # rows as in the first update of a run
    alone, of_policy = update.policy(actor_critic.policy_of(fresh(mesh)), experience, 0)
    critic, of_values = update.critic(fresh(mesh).critic, experience, 0)
    same_bits(state, actor_critic.together(alone, critic))
    assert float(metrics["policy/grad_norm"]) == float(of_policy["policy/grad_norm"]) > 0
    assert float(metrics["value/grad_norm"]) == float(of_values["policy/grad_norm"]) > 0
    assert len(seen) == 1 and not metrics["skipped"] and "value/explained_variance" in metrics


def test_a_critic_warms_up_alone(experience):
    mesh = tiny.one_device()
    update, before = both(mesh), fresh(mesh)
    same = jax.device_get(before.params)
    state, metrics = update.warming(before, experience, 0)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), same)
    update.critic.sizes.restore(None)
    critic, _ = update.critic(fresh(mesh).critic, experience, 0)
    same_bits(state.critic, critic)
    assert (int(state.num_updates), int(state.num_made), int(state.critic.num_made)) == (1, 0, 1)
    assert float(metrics["policy/loss"]) == 0 and float(metrics["value/loss"]) > 0


SPEC = targets.Spec(3, 6.0, ranks={"layers.1.mlp.down_proj": 2})
ADAPTED = dataclasses.replace(MODEL, lora=targets.lora_of(MODEL, SPEC))


def learned(model, frozen, trained, experience, mesh):
    """Metrics and gradients of the critic's update, made beside that of a policy."""
    put = lambda axes, x: jax.device_put(x, sharding.tree_shardings(mesh, axes, x))  # noqa: E731
    rate = 50.0  # weights that change much round little of their change away
    frozen = frozen and put(lora.frozen_axes(model), frozen)
    update = dataclasses.replace(both(mesh, model=model, rate=rate), critic_frozen=frozen)
    own = start(put(lora.trained_axes(model), trained), model, mesh, optax.sgd(rate))
    policy = jax.device_put(tiny.params(), param_shardings(tiny.MODEL, mesh))
    state = actor_critic.together(start(policy, tiny.MODEL, mesh, optax.sgd(RATE)), own)
    state, metrics = update(state, transfer.shard_rows(mesh, experience), 0)
    slope = lambda a, b: (np.asarray(a) - b) / rate  # noqa: E731
    return metrics, jax.tree.map(slope, trained, jax.device_get(state.critic.params))


def test_a_critics_adapters_follow_the_gradients_of_all_weights(experience):
    """G of a kernel W + s A B gives s G Bᵀ and s Aᵀ G; the head's is its own; and on a mesh."""
    draws, mesh = np.random.default_rng(2), tiny.one_device()
    params = tiny.params(0, MODEL)
    frozen = jax.device_get({n: x for n, x in params.items() if n != "score"})
    shapes = lora.trained_shapes(ADAPTED)
    trained = jax.tree.map(lambda x: draws.normal(0, 0.2, x.shape).astype(np.float32), shapes)
    trained["score"] = jax.device_get(params["score"])
    merged = jax.device_get(lora.merged(lora.attached(frozen, trained, ADAPTED), jnp.float32))
    want, whole = learned(MODEL, None, merged, experience, mesh)
    for where in (mesh, sharding.make_mesh(2, 2, 2)):
        metrics, got = learned(ADAPTED, frozen, trained, experience, where)
        for name in ("value/loss", "value/clip_share", "value/mean"):
            near = pytest.approx(float(want[name]), rel=1e-5, abs=1e-6)  # a mean about zero
            assert float(metrics[name]) == near, name
        largest = np.abs(whole["score"]["kernel"]).max()
        np.testing.assert_allclose(
            got["score"]["kernel"], whole["score"]["kernel"], rtol=0, atol=1e-5 * largest
        )
        for adapter in ADAPTED.lora.adapters:
            low, own = (lora.leaf(tree["layers"], adapter.path) for tree in (trained, got))
            g = np.float64(lora.leaf(whole["layers"], adapter.path)["kernel"])
            a, b = np.float64(low["lora_a"]), np.float64(low["lora_b"])
            s = np.zeros((2, 1, a.shape[-1]))
            for layer, rank in enumerate(adapter.ranks):
                s[layer, :, :rank] = adapter.scalings[layer]
            of_a, of_b = s * (g @ b.swapaxes(1, 2)), s.swapaxes(1, 2) * (a.swapaxes(1, 2) @ g)
            for found, wanted in ((own["lora_a"], of_a), (own["lora_b"], of_b)):
                largest = np.abs(wanted).max()
                assert largest > 1e-4
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * largest)


def test_a_critic_that_is_not_finite_is_refused_alone(experience):
    mesh = tiny.one_device()
    broken = experience.replace(return_PGC=experience.return_PGC * np.float32(np.inf))
    state, metrics = both(mesh)(fresh(mesh), broken, 0)
    assert metrics["skipped"] and int(state.critic.num_made) == 0 and int(state.num_made) == 1
