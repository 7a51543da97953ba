"""Distillation: the divergence of the sweep, and the reward of a teacher, by other programs."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import made_once
import numpy as np
import optax
import pytest
import tiny
import torch

from grpo_jax.algorithm import distillation
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.components import PolicyLoss
from grpo_jax.algorithm.distillation import DivergenceLoss, RewardedByTeacher
from grpo_jax.algorithm.objective import Objective
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import logprobs, train_state, update
from grpo_jax.learner.logprobs import Teacher
from grpo_jax.learner.scoring import Scorer
from grpo_jax.models.parameters import head_kernel
from grpo_jax.structs import Layer, Sampling

B, T, D, E, V = 2, 7, 8, 5, 19
BETAS = (0.0, 0.3, 1.0)
TEMPERATURE = 0.8


def jsd(student, teacher, beta):
    """GKD's equation 1 with the names of TRL: [..., T] of logits [..., T, V], float64."""
    p, q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)  # noqa: E731
    if beta in (0, 1):
        return kl(p, q) if beta else kl(q, p)
    m = torch.log(beta * q.exp() + (1 - beta) * p.exp())
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weight = rng.uniform(0.2, 1, (B, T)).astype(np.float32)
    weight[0, 3] = 0
    return {
        "student": (normal(B, T, D), normal(D, V)),
        "teacher": (normal(B, T, E), normal(E, V)),
        "target": rng.integers(0, V, (B, T)),
        "weight": weight,
    }


def ours(inputs, beta, caps=(None, None)):
    """Value, gradients in hidden states and head, divergence and KL of each token."""
    of_teacher = Teacher(*inputs["teacher"], beta, caps[1])

    def loss(hidden, head):
        token_loss = lambda logp, entropy, terms, divergence: divergence  # noqa: E731
        how = token_loss, Sampling(temperature=TEMPERATURE), logprobs.UNSPLIT, caps[0]
        rows = inputs["target"], inputs["weight"], ()
        total, *found = logprobs.loss(*how, hidden, head, *rows, of_teacher)
        return total, found

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*inputs["student"])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("caps", [(None, None), (3.0, 2.0)])
def test_the_divergence_is_that_of_the_paper(inputs, beta, caps, monkeypatch):
    monkeypatch.setattr(logprobs, "_MAX_TOKENS", 4)  # chunks of two tokens
    (total, found), slopes = ours(inputs, beta, caps)

    def logits(hidden, head, cap):
        x = hidden @ head
        return (cap * torch.tanh(x / cap) if cap else x) / TEMPERATURE

    student = [torch.tensor(np.float64(x), requires_grad=True) for x in inputs["student"]]
    teacher = [torch.tensor(np.float64(x)) for x in inputs["teacher"]]
    own, other = logits(*student, caps[0]), logits(*teacher, caps[1])
    each = jsd(own, other, beta)
    want = (torch.tensor(inputs["weight"]) * each).sum()
    want.backward()
    np.testing.assert_allclose(total, want.item(), rtol=1e-5)
    np.testing.assert_allclose(found[2], each.detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[3], jsd(own, other, 1).detach(), rtol=1e-5, atol=1e-6)
    for slope, x in zip(slopes, student):
        np.testing.assert_allclose(
            slope, x.grad.numpy(), atol=1e-5 * np.abs(x.grad.numpy()).max(), rtol=0
        )


@pytest.mark.parametrize("beta", BETAS)
def test_the_divergence_is_that_of_trl(inputs, beta):
    """Value and gradient of its DistillationTrainer and of its GKDTrainer."""
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer
    from trl.trainer import distillation_trainer as theirs

    even = inputs | {"weight": (inputs["weight"] > 0).astype(np.float32)}
    (total, _), slopes = ours(even, beta)
    count = even["weight"].sum()
    for of_gkd in (True, False):
        student = [torch.tensor(x, requires_grad=True) for x in inputs["student"]]
        teacher = [torch.tensor(x) for x in inputs["teacher"]]
        mask = torch.tensor(even["weight"])
        if of_gkd:
            labels = torch.where(mask > 0, 0, -100)
            logits = student[0] @ student[1], teacher[0] @ teacher[1]
            loss = GKDTrainer.generalized_jsd_loss(
                *logits, labels=labels, beta=beta, temperature=TEMPERATURE
            )
        else:
            loss, _, number = theirs._chunked_divergence_loss(
                student[0], teacher[0], student[1].T, teacher[1].T, mask, beta,
                temperature=TEMPERATURE,
            )  # fmt: skip
            assert int(number) == count
        loss.backward()
        np.testing.assert_allclose(total / count, loss.item(), rtol=1e-5)
        for slope, x in zip(slopes, student):
            largest = np.abs(x.grad.numpy()).max()
            np.testing.assert_allclose(slope / count, x.grad.numpy(), atol=1e-5 * largest, rtol=0)


# --- Through the learner --------------------------------------------------------------------------

P, G, C = 8, 3, 5
TEACHER = dataclasses.replace(
    tiny.MODEL, width=16, mlp_width=24, layers=(Layer(),), num_heads=2, num_kv_heads=2
)
SAMPLING = Sampling(temperature=0.9)


def scorer(model=tiny.MODEL, mesh=None, **options) -> Scorer:
    return Scorer(model, mesh or tiny.one_device(), SAMPLING, **options)


def prepared(mesh, coef=None, mask_truncated=False):
    """The experience, and its order; with `coef` rewarded by the teacher."""
    by_reward = {} if coef is None else {"of_teacher": scorer(TEACHER, mesh), "teacher_coef": coef}
    prepare = made_once.prepare(
        scorer(mesh=mesh),
        AdvantageOptions(),
        mask_truncated=mask_truncated,
        with_old=True,
        num_minibatches=2,
        **by_reward,
    )
    prepare = dataclasses.replace(prepare, teacher=tiny.params(5, TEACHER))
    reward = np.random.default_rng(1).uniform(size=(P, G)).astype(np.float32)
    reward[1] = np.nan  # unknown rewards: the teacher's alone counts
    rows = transfer.shard_rows(mesh, (tiny.rollouts(P, G, C), reward))
    log_probs = prepare.log_probs(tiny.params(), None, rows[0])
    return log_probs, prepare(log_probs, rows[1])


def test_the_reward_of_a_teacher_is_added_to_each_token():
    experience = prepared(tiny.one_device(), coef=0.7)[1]
    plain = prepared(tiny.one_device())[1]
    rollouts = tiny.rollouts(P, G, C)
    own = tiny.logp(scorer(), tiny.params(), rollouts)
    theirs = tiny.logp(scorer(TEACHER), tiny.params(5, TEACHER), rollouts)
    want = np.asarray(plain.advantage)[..., None] + 0.7 * (theirs - own)
    action = np.asarray(experience.action_PGC)
    np.testing.assert_allclose(experience.advantage[action], want[action], atol=5e-5)
    assert np.abs(theirs - own)[action].max() > 0.5
    by_token = np.asarray(plain.advantage)[..., None] * np.ones_like(own)  # as of turns or steps
    both = [distillation.with_reward(a, 0.7, theirs, own) for a in (plain.advantage, by_token)]
    np.testing.assert_array_equal(*both)
    log_probs, eight = prepared(sharding.make_mesh(2, 2, 2), coef=0.7)
    found = log_probs.in_order(eight.advantage)
    np.testing.assert_allclose(found[action], want[action], atol=5e-5)


@functools.cache
def updated(mesh_sizes: tuple[int, ...] | None, microbatch: int, by_reward: bool):
    """Parameters and metrics after the second of two updates with a teacher of another shape."""
    mesh = tiny.one_device() if mesh_sizes is None else sharding.make_mesh(*mesh_sizes)
    _, experience = prepared(mesh, coef=0.7 if by_reward else None)
    policy = PolicyLoss(Objective())
    made = update.make_update(
        scorer(mesh=mesh, microbatch=microbatch),
        RewardedByTeacher(Objective()) if by_reward else DivergenceLoss(policy, 0.6, 0.3),
        optax.sgd(0.5),
        num_minibatches=2,
        of_teacher=None if by_reward else scorer(TEACHER, mesh),
    )
    if not by_reward:
        made = dataclasses.replace(made, teacher=tiny.params(5, TEACHER))
    state = train_state.start(tiny.params(), tiny.MODEL, mesh, optax.sgd(0.5))
    state, values = made(state, experience, 1)
    return jax.device_get((state.params, values))


def test_the_divergence_of_packed_rows_is_that_of_a_row_each():
    """The gradient of the head too, by a transcription in float64."""
    params, values = updated(None, 1, by_reward=False)
    _, experience = prepared(tiny.one_device())
    half = jax.tree.map(lambda x: x[1::2], jax.device_get(experience))
    action = torch.tensor(half.action_PGC.reshape(-1, C))
    hidden, head = {}, {}
    for name, seed, model in (("own", 0, tiny.MODEL), ("teacher", 5, TEACHER)):
        weights = tiny.params(seed, model)
        states = scorer(model).hidden(weights, half.rollouts)
        hidden[name] = torch.tensor(np.asarray(states, np.float64))
        head[name] = torch.tensor(np.asarray(scorer(model).head(weights), np.float64))
    head["own"].requires_grad_()
    logits = {name: hidden[name] @ head[name] / SAMPLING.temperature for name in hidden}
    divergence = jsd(logits["own"], logits["teacher"], 0.3)[action].mean()
    target = torch.tensor(np.int64(half.rollouts.completion_PGC.reshape(-1, C)))
    logp = torch.log_softmax(logits["own"], -1).gather(-1, target[..., None])[..., 0]
    advantage = torch.tensor(np.float64(half.advantage).reshape(-1, 1)).expand(-1, C)
    old = torch.tensor(np.float64(half.old_logp_PGC).reshape(-1, C))
    policy = -(torch.exp(logp - old) * advantage)[action].mean()  # nothing is clipped
    (policy + 0.6 * divergence).backward()
    np.testing.assert_allclose(values["distill/loss"], divergence.item(), rtol=1e-5)
    np.testing.assert_allclose(values["policy/loss"], policy.item(), atol=1e-5)
    total = policy.item() + 0.6 * divergence.item()
    np.testing.assert_allclose(values["distill/total"], total, rtol=1e-5, atol=1e-6)
    slope = (np.asarray(head_kernel(tiny.params())) - head_kernel(params)) / 0.5
    want = head["own"].grad.numpy()
    np.testing.assert_allclose(slope, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("by_reward", [False, True])
def test_a_mesh_and_microbatches_change_nothing(by_reward):
    one = updated(None, 1, by_reward)
    other = updated((2, 2, 2), 0, by_reward)
    for a, b in zip(jax.tree.leaves(one[0]), jax.tree.leaves(other[0])):
        np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), rtol=0)
    assert one[1].keys() == other[1].keys()
    assert abs(one[1]["distill/kl"]) > 0.1
    for name, value in one[1].items():
        np.testing.assert_allclose(other[1][name], value, rtol=1e-5, atol=2e-5, err_msg=name)


def test_no_teacher_leaves_the_program_as_it_is():
    """The sweep without a teacher is traced to the same operations, whoever calls it."""
    rng = np.random.default_rng(0)
    shapes = (B, T, D), (D, V), (B, T)
    hidden, head, weight = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    target = np.zeros((B, T), np.int32)

    def grad(*more):
        token_loss = lambda logp, entropy, terms: -logp  # noqa: E731
        how = token_loss, Sampling(), logprobs.UNSPLIT, None
        f = lambda h, k: logprobs.loss(*how, h, k, target, weight, (), *more)[0]  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(f, argnums=(0, 1)))(jnp.asarray(hidden), head))

    assert grad() == grad(None)
    assert "logaddexp" not in grad()
