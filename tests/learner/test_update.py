"""The update: what may not change it, what must, and what it may never do."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import made_once
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import losses
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.devices import transfer
from grpo_jax.learner import optim
from grpo_jax.learner.experience import action_mask
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.train_state import refuse, start
from grpo_jax.learner.update import make_update
from grpo_jax.models import parameters
from grpo_jax.models.lora import Weights
from grpo_jax.structs import Experience, Sampling

P, G, C = 4, 3, 5
RATE = 0.5  # of plain gradient descent: the change of the parameters is the gradient, times this
SGD = optax.sgd(RATE)
FULL = losses.Objective(kl_coef=0.2, entropy_coef=0.05)


def scorer(sampling=Sampling(), **options) -> Scorer:  # noqa: B008
    return Scorer(tiny.MODEL, tiny.one_device(), sampling, **options)


@functools.cache
def _started(optimizer):
    return start(tiny.params(), tiny.MODEL, tiny.one_device(), optimizer)


def fresh(optimizer=SGD):
    """A state of its own: an update takes the state it is given."""
    return jax.tree.map(jnp.array, _started(optimizer))


def program(
    objective=FULL,
    optimizer=SGD,
    *,
    minibatches=1,
    microbatches=1,
    make=made_once.updating,
    **scoring,
):
    scoring = scorer(microbatch=P // minibatches // microbatches, **scoring)
    return make(scoring, PolicyLoss(objective), optimizer, num_minibatches=minibatches)


def preparing(scoring, with_old=True, options=AdvantageOptions(), mask_truncated=False):  # noqa: B008
    return made_once.prepare(scoring, options, mask_truncated=mask_truncated, with_old=with_old)


@pytest.fixture(scope="module")
def experience() -> Experience:
    """Rewarded rollouts with the log-probabilities of an older policy and of a reference."""
    prepare = preparing(scorer(microbatch=2))
    rollouts = tiny.rollouts(P, G, C)
    reward_PG = jnp.float32(np.random.default_rng(1).uniform(size=(P, G)))
    made = jax.device_get(
        prepare(prepare.log_probs(tiny.params(), tiny.params(7), rollouts), reward_PG)
    )
    drift = np.random.default_rng(2).normal(0, 0.3, made.old_logp_PGC.shape).astype(np.float32)
    return made.replace(old_logp_PGC=made.old_logp_PGC + drift)


@pytest.fixture(scope="module")
def plain():
    """The program of one batch that most tests share."""
    return program()


def run(update, experience, index: int = 0, state=None):
    state, metrics = jax.device_get(
        update(fresh() if state is None else state, experience, jnp.int32(index))
    )
    return state, metrics


def gradient(state):
    """The gradient that took the fresh state to this one by gradient descent, as one vector."""
    difference = jax.tree.map(lambda old, new: (old - new) / RATE, fresh().params, state.params)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(difference)])


def assert_same(got, want, tolerance=1e-5):
    (got, got_metrics), (want, want_metrics) = got, want
    largest = np.abs(gradient(want)).max()
    assert largest > 1e-3
    np.testing.assert_allclose(gradient(got), gradient(want), atol=tolerance * largest, rtol=0)
    assert set(got_metrics) == set(want_metrics)
    for name, value in want_metrics.items():
        np.testing.assert_allclose(
            got_metrics[name], value, rtol=tolerance, atol=tolerance, err_msg=name
        )


@pytest.fixture(scope="module")
def reference_run(plain, experience):
    return run(plain, experience)


def test_microbatches_change_nothing(experience, reference_run):
    """Normalizers over rows of one to four groups: test_plain.py."""
    for count in (2, 4):
        assert_same(run(program(microbatches=count), experience), reference_run)


def test_minibatches_are_strided_and_cover_the_batch(plain, experience):
    halves = program(minibatches=2)

    first, second = (run(halves, experience, index) for index in (0, 1))

    even, odd = (jax.tree.map(lambda x, i=i: x[i::2], experience) for i in (0, 1))
    assert_same(first, run(plain, even))
    assert_same(second, run(plain, odd))
    assert np.abs(gradient(first[0]) - gradient(second[0])).max() > 1e-3


def test_tokens_may_have_advantages_of_their_own():
    """The same number for every token of a completion is that completion's; by minibatch, too."""
    rollouts, rng = tiny.rollouts(P, G, C), np.random.default_rng(4)
    action_PGC = np.arange(C) < rollouts.length_PG[..., None]
    advantage_PG = rng.normal(size=(P, G)).astype(np.float32)
    by_token = np.repeat(advantage_PG[..., None], C, axis=-1)
    by_token[~action_PGC] = np.nan  # which nothing reads
    turn_PGC = rng.normal(size=(P, G, C)).astype(np.float32)
    given = {
        name: Experience(rollouts, advantage, action_PGC, None, None)
        for name, advantage in (("once", advantage_PG), ("each", by_token), ("turns", turn_PGC))
    }
    halves = program(losses.Objective(), minibatches=2)
    for index in (0, 1):
        once, each, turns = (run(halves, x, index) for x in given.values())
        assert_same(each, once, tolerance=1e-6)
        # At ratio 1 the loss is minus the mean advantage of the minibatch's tokens.
        own = turn_PGC[index::2][action_PGC[index::2]].astype(np.float64)
        np.testing.assert_allclose(turns[1]["policy/loss"], -own.mean(), rtol=1e-5)
        assert np.abs(gradient(turns[0]) - gradient(once[0])).max() > 1e-3


def adding(update, experience):
    """What the update's program for microbatches is called with."""
    microbatches = scorer(microbatch=P).microbatches(experience.rollouts, np.arange(P))
    number, arrays = microbatches.number, microbatches.arrays
    return Weights(fresh().params), number, update.zero_gradient(), experience, *arrays


def test_no_more_microbatches_are_computed_than_there_are(experience):
    """The program takes more rows than an update has; what lies past their number is not read."""
    update = program(microbatches=2)
    microbatches = scorer(microbatch=P // 2).microbatches(experience.rollouts, np.arange(P))
    assert microbatches.number < len(microbatches.groups_SMJ[0])
    tokens = []
    for number in (1, microbatches.number):
        carry = update.zero_gradient()
        _, sums, _ = update.gradient(
            Weights(fresh().params), number, carry, experience, *microbatches.arrays
        )
        tokens.append(float(sums["tokens"][0]))
    assert 0 < tokens[0] < tokens[1] == experience.action_PGC.sum()


def test_recomputing_changes_nothing(experience, reference_run):
    def primitives(update):
        def walk(jaxpr):
            for eqn in jaxpr.eqns:
                yield eqn.primitive.name
                for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                    yield from walk(inner)

        return list(walk(update.gradient.trace(*adding(update, experience)).jaxpr.jaxpr))

    programs = {remat: program(remat=remat) for remat in ("none", "dots", "full")}
    counts = {
        remat: [primitives(update).count(name) for name in ("dot_general", "logistic")]
        for remat, update in programs.items()
    }
    (dots, sigmoids), recomputed_dots, recomputed_all = counts.values()
    assert dots < recomputed_dots[0] < recomputed_all[0]  # attention's; all
    assert sigmoids < recomputed_dots[1] <= recomputed_all[1]
    for update in programs.values():
        assert_same(run(update, experience), reference_run)


def test_completions_of_one_token():
    """Nothing but what follows the prompts is predicted; lanes there are none to fill."""
    rollouts = tiny.rollouts(P, G, 1)
    prepare = preparing(scorer())
    made = prepare(
        prepare.log_probs(tiny.params(), tiny.params(7), rollouts),
        jnp.arange(P * G).reshape(P, G) % 2.0,
    )
    for got, params in ((made.old_logp_PGC, tiny.params()), (made.ref_logp_PGC, tiny.params(7))):
        np.testing.assert_allclose(got, tiny.logp(scorer(), params, rollouts), atol=2e-5)
    state, metrics = run(program(), made)
    assert np.isfinite(metrics["policy/loss"]) and np.abs(gradient(state)).max() > 1e-4


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_layers_one_by_one_are_those_of_the_loop(remat, experience, reference_run):
    """And what is computed again stays so, with no loop to keep it from being merged."""
    update = program(remat=remat, scan_layers=False)
    assert_same(run(update, experience), reference_run)
    text = str(update.gradient.trace(*adding(update, experience)).jaxpr)
    assert f"unroll={tiny.MODEL.num_layers}" in text
    assert ("prevent_cse=True" in text) == (remat != "none") and "prevent_cse=False" not in text


def test_scoring_keeps_the_loop():
    """It keeps nothing of a layer, so that it would only take longer to compile."""
    scoring = scorer(scan_layers=False, microbatch=P)
    prepare = preparing(scoring, with_old=False)
    rollouts = tiny.rollouts(P, G, C)
    microbatches = scorer(microbatch=P).microbatches(rollouts, np.arange(P))
    args = tiny.params(), microbatches.number, rollouts, *microbatches.arrays
    text = str(prepare.score.trace(*args).jaxpr)
    assert "unroll=1" in text and f"unroll={tiny.MODEL.num_layers}" not in text


def test_bfloat16_stays_near_float32(experience, reference_run):
    state, metrics = run(program(dtype=jnp.bfloat16), experience)

    want, want_metrics = gradient(reference_run[0]), reference_run[1]
    got = gradient(state)
    # Eight bits of mantissa, 0.4 % a rounding, over two layers and a softmax.
    assert 1e-4 < np.linalg.norm(got - want) / np.linalg.norm(want) < 0.1
    assert abs(metrics["policy/loss"] - want_metrics["policy/loss"]) < 0.05
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


def test_weights_cast_once_are_those_cast_in_every_microbatch(experience, monkeypatch):
    once, _ = run(program(dtype=jnp.bfloat16, microbatches=2), experience)
    monkeypatch.setattr(parameters, "cast_layers", lambda params, dtype: params)
    each, _ = run(program(dtype=jnp.bfloat16, microbatches=2, make=make_update), experience)
    difference = np.linalg.norm(gradient(once) - gradient(each)) / np.linalg.norm(gradient(each))
    assert difference < 5e-3  # XLA may round a kernel's gradient to eight bits or not


def test_prepared_log_probabilities_are_those_of_the_network():
    prepare = preparing(scorer(microbatch=2))
    rollouts = tiny.rollouts(P, G, C)
    made = prepare(prepare.log_probs(tiny.params(), tiny.params(7), rollouts), jnp.zeros((P, G)))
    there = np.arange(C) < rollouts.length_PG[..., None]
    for got, params in ((made.old_logp_PGC, tiny.params()), (made.ref_logp_PGC, tiny.params(7))):
        want = tiny.logp(scorer(), params, rollouts)
        np.testing.assert_allclose(got[there], want[there], atol=2e-5)


def test_what_padding_holds_changes_nothing(plain, experience, reference_run):
    rng = np.random.default_rng(3)
    rollouts = experience.rollouts
    past_PQ = np.arange(rollouts.prompt_PQ.shape[1]) >= rollouts.prompt_length_P[:, None]
    past_PGC = ~experience.action_PGC

    def spoil(x, past, garbage):
        assert past.any()
        return np.where(past, garbage, x).astype(x.dtype)

    spoiled = experience.replace(
        rollouts=rollouts.replace(
            prompt_PQ=spoil(rollouts.prompt_PQ, past_PQ, rng.integers(0, 40, past_PQ.shape)),
            completion_PGC=spoil(
                rollouts.completion_PGC, past_PGC, rng.integers(0, 40, past_PGC.shape)
            ),
            logp_PGC=spoil(rollouts.logp_PGC, past_PGC, np.nan),
        ),
        old_logp_PGC=spoil(experience.old_logp_PGC, past_PGC, -np.inf),
        ref_logp_PGC=spoil(experience.ref_logp_PGC, past_PGC, np.nan),
    )

    assert_same(run(plain, spoiled), reference_run)  # in rows of other sizes


def test_the_order_of_a_group_changes_nothing(plain, experience, reference_run):
    order = np.array([2, 0, 1])
    rollouts = experience.rollouts
    rows = {
        name: getattr(rollouts, name)[:, order]
        for name in ("completion_PGC", "logp_PGC", "length_PG", "stopped_PG")
    }
    shuffled = Experience(
        rollouts=rollouts.replace(**rows),
        advantage=experience.advantage[:, order],
        action_PGC=experience.action_PGC[:, order],
        old_logp_PGC=experience.old_logp_PGC[:, order],
        ref_logp_PGC=experience.ref_logp_PGC[:, order],
    )

    assert_same(run(plain, shuffled), reference_run)
    # Advantages left in their old order belong to other completions.
    mixed = shuffled.replace(advantage=experience.advantage)
    assert np.abs(gradient(run(plain, mixed)[0]) - gradient(reference_run[0])).max() > 1e-3


SAMPLINGS = [Sampling(0.7), Sampling(1.0), Sampling(1.3, top_k=4)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_first_ratio_is_one(sampling):
    rollouts, reward_PG = tiny.rollouts(P, G, C), jnp.float32(np.arange(P * G).reshape(P, G) % 2)
    clip = losses.Objective(clip_low=1e-3, clip_high=1e-3)  # a ratio off by more would be clipped
    update = program(clip, sampling=sampling)
    for with_old in (False, True):
        prepare = preparing(scorer(sampling, microbatch=1), with_old)  # not the update's shapes
        experience = prepare(prepare.log_probs(tiny.params(), None, rollouts), reward_PG)
        assert (experience.old_logp_PGC is not None) == with_old

        _, metrics = run(update, experience)

        if with_old:
            assert abs(metrics["policy/ratio_max"] - 1) < 1e-4
        else:
            assert metrics["policy/ratio_max"] == 1.0
        assert metrics["policy/clip_low_share"] == metrics["policy/clip_high_share"] == 0


def test_temperature_changes_the_log_probabilities():
    """Else the ratios above would be 1 with the temperature ignored by both sides."""
    rollouts = tiny.rollouts(P, G, C)
    cold, warm = (tiny.logp(scorer(Sampling(t)), tiny.params(), rollouts) for t in (0.7, 1.3))
    assert np.abs(cold - warm).max() > 0.1


def test_the_kl_term_pulls_on_policy(experience):
    """With zero advantages and old = current, the reference alone moves the policy, towards it."""
    still = experience.replace(
        advantage=np.zeros((P, G), np.float32), old_logp_PGC=None, ref_logp_PGC=None
    )
    kl = program(losses.Objective(kl_coef=0.5))
    assert not gradient(run(program(losses.Objective()), still)[0]).any()

    current_PGC = np.asarray(tiny.logp(scorer(), tiny.params(), still.rollouts))
    same, _ = run(kl, still.replace(ref_logp_PGC=current_PGC))
    assert np.abs(gradient(same)).max() < 1e-6
    pulled, before = run(kl, still.replace(ref_logp_PGC=experience.ref_logp_PGC))
    assert np.abs(gradient(pulled)).max() > 1e-3

    small = jax.tree.map(lambda new, old: old + 0.05 * (new - old), pulled.params, fresh().params)
    _, after = run(
        kl, still.replace(ref_logp_PGC=experience.ref_logp_PGC), state=fresh().replace(params=small)
    )
    assert after["policy/kl"] < before["policy/kl"]


def test_kl_and_entropy_change_the_gradient(experience, reference_run):
    for absent in ({"kl_coef": 0.0}, {"entropy_coef": 0.0}):
        other, _ = run(program(dataclasses.replace(FULL, **absent)), experience)
        assert np.abs(gradient(other) - gradient(reference_run[0])).max() > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_weighs_completions_as_larger_advantages_would(plain, experience, level):
    ratio_PG = np.linspace(0.3, 3, P * G, dtype=np.float32).reshape(P, G)
    rollouts = experience.rollouts
    parts_PG = np.log(ratio_PG) if level == "token" else np.log(ratio_PG) / rollouts.length_PG
    sampler_PGC = np.where(experience.action_PGC, experience.old_logp_PGC - parts_PG[..., None], 9)
    given = experience.replace(rollouts=rollouts.replace(logp_PGC=np.float32(sampler_PGC)))
    objective = dataclasses.replace(FULL, importance_level=level, importance_cap=2.0)

    got, metrics = run(program(objective, microbatches=4), given)

    weight_PG = np.minimum(ratio_PG, 2)
    weighed = experience.replace(advantage=experience.advantage * weight_PG)
    want = gradient(run(plain, weighed)[0])
    np.testing.assert_allclose(gradient(got), want, atol=1e-5 * np.abs(want).max(), rtol=0)
    action = experience.action_PGC.sum()
    mean = (rollouts.length_PG * weight_PG).sum() / action
    np.testing.assert_allclose(metrics["policy/importance_mean"], mean, rtol=1e-5)
    capped = (rollouts.length_PG * (ratio_PG > 2)).sum() / action
    np.testing.assert_allclose(metrics["policy/importance_capped_share"], capped, rtol=1e-5)


def test_the_stop_token_is_trained(experience):
    """A completion of its stop token alone, the only one with an advantage, gets likelier."""
    rollouts = experience.rollouts
    assert rollouts.length_PG[0, 0] == 1
    assert rollouts.completion_PGC[0, 0, 0] == tiny.STOP
    advantage_PG = np.zeros((P, G), np.float32)
    advantage_PG[0, 0] = 1
    update = program(losses.Objective())

    state, metrics = run(
        update,
        experience.replace(advantage=advantage_PG, old_logp_PGC=None, ref_logp_PGC=None),
    )

    assert metrics["policy/grad_norm"] > 1e-3
    logp = functools.partial(tiny.logp, scorer())
    before, after = (logp(p, rollouts)[0, 0, 0] for p in (tiny.params(), state.params))
    assert after > before
    # -A over all action tokens, the ratio being 1.
    np.testing.assert_allclose(metrics["policy/loss"], -1 / experience.action_PGC.sum(), rtol=1e-6)


def test_action_mask_by_hand():
    length_PG, stopped_PG = jnp.array([[1, 3, 4]]), jnp.array([[True, True, False]])
    kept = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]

    np.testing.assert_array_equal(action_mask(length_PG, stopped_PG, 4, False), [kept])
    kept[2] = [0, 0, 0, 0]
    np.testing.assert_array_equal(action_mask(length_PG, stopped_PG, 4, True), [kept])


def test_truncated_completions_can_be_left_out(plain):
    """With the mask, what the truncated completion says does not matter; its reward still does."""
    rollouts = tiny.rollouts(P, G, C)
    assert not rollouts.stopped_PG[-1, -1]
    other = rollouts.completion_PGC.copy()
    other[-1, -1] = (other[-1, -1] + 1) % 40
    reward_PG = jnp.float32(np.random.default_rng(1).uniform(size=(P, G)))

    def gradients(mask_truncated: bool):
        prepare = preparing(scorer(), mask_truncated=mask_truncated)
        for completion_PGC in (rollouts.completion_PGC, other):
            given = rollouts.replace(completion_PGC=completion_PGC)
            experience = prepare(prepare.log_probs(tiny.params(), tiny.params(7), given), reward_PG)
            yield gradient(run(plain, experience)[0])

    kept, changed = gradients(False)
    assert np.abs(kept - changed).max() > 1e-3
    masked, changed = gradients(True)
    np.testing.assert_allclose(changed, masked, atol=1e-6)
    assert np.abs(kept - masked).max() > 1e-3


@pytest.mark.parametrize("where", ["advantage", "parameter"])
def test_an_update_that_is_not_finite_is_refused(experience, where):
    optimizer = optim.adamw(
        optax.constant_schedule(0.01),
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1,
    )
    update = program(optimizer=optimizer)
    state, metrics = update(fresh(optimizer), experience, jnp.int32(0))  # moments that are not 0
    assert not metrics["skipped"]
    assert (state.num_updates, state.num_skipped) == (1, 0)
    bad = experience
    if where == "advantage":
        bad = experience.replace(advantage=experience.advantage.copy())
        bad.advantage[1, 1] = np.inf
    else:
        state.params["norm"]["scale"] = state.params["norm"]["scale"].at[3].set(np.nan)
    before = jax.device_get(state)

    after, metrics = jax.device_get(update(state, bad, jnp.int32(0)))

    assert metrics["skipped"]
    assert (after.num_updates, after.num_skipped) == (2, 1)
    jax.tree.map(np.testing.assert_array_equal, after.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, before.opt_state)


def test_an_update_of_metrics_out_of_bounds_is_refused(experience, plain):
    """Refused on the device, or left out on the host: but for its counters the state stays."""
    plain.sizes.restore(None)  # as it began: what other tests gave it may be packed otherwise
    once, metrics = plain(fresh(), experience, 0)
    kl, once = float(metrics["policy/kl"]), jax.device_get(once)
    moved = float(plain(jax.tree.map(jnp.array, once), experience, 0)[1]["policy/kl"])
    bounds = {"policy/kl": (-np.inf, kl) if moved > kl else (kl, np.inf), "policy/entropy": (0, 99)}
    bounded = make_update(
        scorer(microbatch=P), PolicyLoss(FULL), optax.sgd(RATE), num_minibatches=1, bounds=bounds
    )
    state, metrics = bounded(fresh(), experience, 0)
    assert not metrics["skipped"]  # the bound itself is within
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), once)

    state, metrics = bounded(state, experience, 0)
    assert metrics["skipped"] and metrics["policy/kl"] == moved != kl
    for refused in (state, refuse(jax.tree.map(jnp.array, once), 1)):
        assert (refused.num_updates, refused.num_skipped) == (2, 1)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(refused.params), once.params)


def test_an_optimizer_state_in_host_memory_changes_nothing(experience):
    optimizer = optax.adam(0.01)
    update = program(optimizer=optimizer)
    offloaded = make_update(
        scorer(microbatch=P), PolicyLoss(FULL), optimizer, num_minibatches=1, offload=True
    )
    state, other = fresh(optimizer), fresh(optimizer)
    other = other.replace(opt_state=transfer.to_host_memory(other.opt_state))
    kinds = lambda tree: {x.sharding.memory_kind for x in jax.tree.leaves(tree)}  # noqa: E731

    for _ in range(2):
        state, metrics = update(state, experience, 0)
        other, other_metrics = offloaded(other, experience, 0)
        assert kinds(state.opt_state) == kinds(other.params) == {"device"}
        assert kinds(other.opt_state) == {"pinned_host"}

    assert metrics["policy/grad_norm"] == other_metrics["policy/grad_norm"] > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(other), jax.device_get(state))


def test_host_memory_that_is_not_there_is_refused():
    class Device:
        device_kind = "Toy"

        def addressable_memories(self):
            return [self]

        kind = "hbm"

    class OfToys:
        devices = np.array([Device()])

    with pytest.raises(ValueError, match=r"optim.offload = True .* pinned_host, and Toy has hbm"):
        transfer.check_host_memory(OfToys(), "optim.offload")
    transfer.check_host_memory(tiny.one_device(), "optim.offload")


def test_a_batch_without_an_action_moves_nothing(plain, experience):
    nothing = experience.replace(action_PGC=np.zeros_like(experience.action_PGC))

    state, metrics = run(plain, nothing)

    assert not gradient(state).any()
    assert metrics["policy/loss"] == 0
    assert not metrics["skipped"]


def test_the_state_is_donated(experience):
    optimizer = optax.adam(0.1)
    state = fresh(optimizer)
    update = program(optimizer=optimizer)

    args = adding(update, experience)

    memory = update.gradient.lower(*args).compile().memory_analysis()
    size = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert memory.alias_size_in_bytes >= size  # the gradient is summed in place
    finish = update.optimizer_step.lower(state, args[2], experience.action_PGC, 0)
    memory = finish.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))


def test_tokens_that_were_not_chosen_are_no_actions():
    """What stands in a completion and is given, as a prompt before an answer to imitate."""
    prepare = preparing(scorer(), False, AdvantageOptions(scale_by="none"))
    rollouts = tiny.rollouts(P, G, C)
    chosen_PGC = np.random.default_rng(0).random((P, G, C)) < 0.5
    given = prepare.log_probs(tiny.params(), None, rollouts.replace(chosen_PGC=chosen_PGC))
    experience = prepare(given, jnp.zeros((P, G)))
    there_PGC = np.arange(C) < rollouts.length_PG[..., None]
    np.testing.assert_array_equal(experience.action_PGC, chosen_PGC & there_PGC)
    assert 0 < experience.action_PGC.sum() < there_PGC.sum()
