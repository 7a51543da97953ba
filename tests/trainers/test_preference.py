"""What a step of preferences is made of: partners, fillers, signals, and KTO's reference point."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import tiny

from grpo_jax import config as config_lib
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.preference_losses import PreferenceTerms
from grpo_jax.data.examples import Pair, Unpaired
from grpo_jax.devices import sharding, transfer
from grpo_jax.learner import experience
from grpo_jax.learner.experience import make_prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.structs import Sampling
from grpo_jax.trainers import preference, preference_rows
from grpo_jax.trainers.preference_rows import Row


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


def config(**options):
    found = config_lib.default()
    found.data.max_prompt_tokens, found.preference.max_tokens = 8, 4
    for name, value in options.items():
        found.preference[name] = value
    return found


ROWS = [
    Row(Pair(ids(5, 6), ids(7, 1), ids(8, 9, 1)), ref_logp=(-2.0, -3.0)),
    Row(Pair(ids(5), ids(3, 4, 1), ids(1)), ref_logp=(-4.0, -0.5)),
    Row(Pair(ids(6, 6, 6), ids(1), ids(2, 1)), ref_logp=(-1.0, -1.5)),
]


@pytest.mark.parametrize(
    ("prompts", "want"),
    [("abc", [2, 0, 1]), ("aabb", [3, 3, 1, 1]), ("abba", [2, 0, 0, 2]), ("aab", [2, 2, 1])],
)
def test_a_partner_is_the_nearest_row_before_with_another_prompt(prompts, want):
    rows = [Unpaired(ids(ord(prompt)), ids(1), True) for prompt in prompts]
    assert preference_rows.others(rows).tolist() == want


def test_rows_are_groups_and_fillers_are_not_trained_on():
    given = preference_rows.rollouts(ROWS, 2, config())
    assert given.completion_PGC.shape == (4, 2, 4)
    assert given.prompt_PQ.shape == (4, 4)  # the longest of 3, in quarters of the limit
    assert given.length_PG.tolist() == [[2, 3], [3, 1], [1, 2], [1, 1]]
    assert given.chosen_PGC.sum((1, 2)).tolist() == [5, 4, 3, 0]
    assert given.completion_PGC[0].tolist() == [[7, 1, 0, 0], [8, 9, 1, 0]]
    others = preference_rows.rollouts(ROWS[:1], 1, config(), lambda row: (ids(4, 1),))
    assert others.completion_PGC.tolist() == [[[4, 1, 0, 0]]]


def test_the_nll_beside_a_loss_is_the_mean_over_the_tokens_of_all_chosen():
    """By hand: 6 tokens in 3 pairs, weight 0.4: each token's share is 0.4 * 3 / 6 of a pair's."""
    signal = preference._signal(config(nll_weight=0.4), ROWS, 4)
    np.testing.assert_allclose(signal["nll_weight_PG"], [[0.2, 0]] * 3 + [[0, 0]])
    np.testing.assert_allclose(signal["ref_logp_PG"], [[-2, -3], [-4, -0.5], [-1, -1.5], [0, 0]])
    assert set(preference._signal(config(loss="orpo"), ROWS, 4)) == {"nll_weight_PG"}
    assert set(preference._signal(config(), ROWS, 4)) == {"ref_logp_PG"}


def test_the_metrics_by_hand():
    """Two pairs and a filler: log-ratios 1 and -1, and 0.5 and 2, times a beta of 0.1."""
    loss = preference.component(config())
    logp_PGC = np.float32([[[-1, 0], [-2, -2]], [[-3, -0.5], [-1, 0]], [[0, 0], [0, 0]]])
    action_PGC = np.array([[[1, 0], [1, 1]], [[1, 1], [1, 0]], [[0, 0], [0, 0]]], bool)
    signal = {"ref_logp_PG": np.float32([[-2, -3], [-4, -3], [0, 0]])}
    sums = preference._loss_sums(loss, logp_PGC, action_PGC, signal)
    assert float(sums["divisor"]) == 2
    want = (np.log1p(np.exp(-0.2)) + np.log1p(np.exp(0.15))) / 2
    np.testing.assert_allclose(sums["loss"] / 2, want, rtol=1e-6)
    found = loss.means({n: v for n, v in sums.items() if n not in ("loss", "divisor")})
    for name, value in {
        "reward_chosen": 0.075, "reward_rejected": 0.05, "reward_margin": 0.025,
        "reward_accuracy": 0.5, "logp_chosen": -2.25, "logp_rejected": -2.5, "nll": 1.5,
    }.items():  # fmt: skip
        np.testing.assert_allclose(found[f"preference/{name}"], value, rtol=1e-5, err_msg=name)
    assert len(found) == 7


@pytest.mark.parametrize("name", ["sigmoid", "kto"])
def test_the_entropy_is_a_mean_over_tokens_where_it_is_measured(name):
    """3 tokens of 1, 2 and 3 nats; what stands beside them does not count."""
    assert "preference/entropy" not in preference.component(config(loss=name)).sums
    loss = dataclasses.replace(preference.component(config(loss=name)), of_tokens=True)
    action_PGC = np.array([[[1, 0], [1, 1]]], bool)
    logp_PGC, entropy_PGC = -action_PGC.astype("f"), np.float32([[[1, 9], [2, 3]]])
    label, point = np.array([[True, False]]), np.zeros((1, 2), np.float32)
    terms = PreferenceTerms(action_PGC, np.zeros((1, 2), np.float32), None, label, point)
    sums, _ = loss.diagnostics(logp_PGC, entropy_PGC, terms, action_PGC)
    assert set(sums) == set(loss.sums)
    assert float(loss.means(sums | {"tokens": 3.0})["preference/entropy"]) == 2.0


def test_the_metrics_of_labelled_completions_by_hand():
    """Log-ratios 1 and -1 of desirable ones, -1 and -2 of others; the reference point is 0.5."""
    loss = preference.component(config(loss="kto", undesirable_weight=0.5))
    logp_PGC = np.float32([[[-1.0]], [[-3.0]], [[-2.0]], [[-4.0]]])
    signal = {
        "ref_logp_PG": np.float32([[-2], [-2], [-1], [-2]]),
        "desirable_PG": np.array([[True], [True], [False], [False]]),
        "divergence_PG": np.full((4, 1), 0.5, np.float32),
    }
    sums = preference._loss_sums(loss, logp_PGC, np.ones((4, 1, 1), bool), signal)
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    want = sigmoid(-0.05) + sigmoid(0.15) + 0.5 * (sigmoid(-0.15) + sigmoid(-0.25))
    np.testing.assert_allclose(sums["loss"], want, rtol=1e-6)
    found = loss.means({n: v for n, v in sums.items() if n not in ("loss", "divisor")})
    for name, value in {
        "reward_chosen": 0.0, "reward_rejected": -0.15, "reward_margin": 0.15,
        "reward_accuracy": 0.75, "logp_chosen": -2.0, "logp_rejected": -3.0, "nll": 2.0, "kl": 0.5,
    }.items():  # fmt: skip
        np.testing.assert_allclose(
            found[f"preference/{name}"], value, rtol=1e-5, atol=1e-7, err_msg=name
        )


def test_two_shards_reorder_the_signal_with_its_rows_and_find_the_same_point():
    rollouts = tiny.rollouts(8, 1, 7)
    chosen_PGC = np.arange(7) < rollouts.length_PG[..., None]
    chosen_PGC[3] = False
    rollouts = rollouts.replace(chosen_PGC=chosen_PGC)
    points = []
    scorer = Scorer(tiny.MODEL, tiny.one_device(), Sampling())
    logp_PG = (np.asarray(tiny.logp(scorer, tiny.params(), rollouts)) * chosen_PGC).sum(-1)
    ref_PG = (logp_PG - rollouts.length_PG).astype(np.float32)  # so that the point is above 0
    for mesh in (tiny.one_device(), sharding.make_mesh(2, devices=jax.devices()[:2])):
        prepare = make_prepare(
            Scorer(tiny.MODEL, mesh, Sampling()),
            AdvantageOptions(baseline="none", scale_by="none"),
            mask_truncated=False,
            with_old=True,
        )
        number_PG = rollouts.length_PG.astype(np.float32)
        placed, number = transfer.shard_rows(mesh, (rollouts, number_PG))
        given = prepare.log_probs(tiny.params(), None, placed)
        order_P = np.arange(8) if given.order_P is None else given.order_P
        ref = transfer.shard_rows(mesh, ref_PG[order_P])
        points.append(experience.divergence(mesh)(given.rollouts, given.old_logp_PGC, ref))
        found = prepare(given, number, beside={"ref_logp_PG": number})
        np.testing.assert_array_equal(found.ref_logp_PG, found.rollouts.length_PG)
    assert not np.array_equal(order_P, np.arange(8))
    there = chosen_PGC.any(-1)
    for point_PG in points:
        np.testing.assert_allclose(point_PG, rollouts.length_PG[there].mean(), rtol=1e-5)
