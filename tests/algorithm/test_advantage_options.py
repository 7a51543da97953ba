"""The choices of the advantage: each from its paper in float64, all together, and TRL's lines."""

from __future__ import annotations

import functools
import inspect
import itertools
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from valid_config import valid

from grpo_jax.algorithm.advantages import (
    CHOICES,
    AdvantageOptions,
    advantages,
    evaluate,
    group_advantages,
)
from grpo_jax.config import advantage_rules
from grpo_jax.config import options as options_lib

nan = float("nan")
P, G, C, R = 6, 4, 5, 2
RNG = np.random.default_rng(0)
WEIGHTS_R = np.array([1.0, -0.3])
REWARD_PGR = RNG.normal(size=(P, G, R)).round(1)  # rounded: some are equal
REWARD_PGR[0] = [[1, 0.5]] * G  # a group of equal rewards
REWARD_PGR[1, 0] = nan  # one without a reward
REWARD_PGR[2, 1, 0] = nan  # one with one of its two
REWARD_PGR[3] = nan
REWARD_PGR[4, :, 1] = [0, 1, 1, 0]
LENGTH_PG = RNG.integers(1, C + 1, (P, G))
ACTION_PGC = np.arange(C) < LENGTH_PG[..., None]
ACTION_PGC[5, 2] = False  # left out of the loss, as a completion that was cut
GREEDY_PR = RNG.normal(size=(P, R))
LOGP_PGC, REF_PGC = RNG.normal(-2, 1, (2, P, G, C))
GIVEN = dict(
    length_PG=LENGTH_PG,
    greedy_PR=GREEDY_PR,
    action_PGC=ACTION_PGC,
    logp_PGC=LOGP_PGC,
    ref_logp_PGC=REF_PGC,
)
COMBINATIONS = [dict(zip(CHOICES, values)) for values in itertools.product(*CHOICES.values())]


@functools.cache
def accepted_combinations() -> list[dict]:
    """Those that no rule refuses, with a coefficient of the KL."""
    config, accepted = valid(), []
    for combination in COMBINATIONS:
        config.algorithm.update({**combination, "kl_coef": 0.1})
        try:
            advantage_rules.check(config)
        except ValueError:
            continue
        accepted.append({**combination, "kl_coef": 0.1})
    return accepted


# --- Written from the papers, group by group ------------------------------------------------------


def plain_group(o: dict, r: np.ndarray, n: np.ndarray, greedy: float, batch_std: float):
    """The advantages of the known rewards r of one group."""
    scale_of = r
    if o["credit"] == "rank":
        scale_of = r = np.array([(r < x).sum() + ((r == x).sum() + 1) / 2 for x in r])
    if o["credit"] == "best":
        order = np.argsort(-r, kind="stable")
        a = np.zeros(len(r))
        a[order[0]] = r[order[0]] - r[order[1]] if len(r) > 1 else 0
    elif o["baseline"] == "leave_one_out":
        others = [np.delete(r, i) for i in range(len(r))]
        a = np.array([x - rest.mean() if len(rest) else 0 for x, rest in zip(r, others)])
    elif o["baseline"] == "length_weighted":
        a = r - (n * r).sum() / n.sum()
    else:
        a = r - {"mean": r.mean(), "greedy": greedy, "none": 0.0}[o["baseline"]]
    if o["scale_by"] == "std":
        return a / scale_of.std() if scale_of.std() > 1e-4 else 0 * a
    if o["scale_by"] == "sample_std":
        return a / (scale_of.std(ddof=1) + 1e-4) if len(r) > 1 else 0 * a
    if o["scale_by"] == "batch_std":
        return a / (batch_std + 1e-4)
    if o["scale_by"] == "mean":
        return a / r.mean() if r.mean() > 1e-9 else 0 * a
    return a


def plain_one(o: dict, reward_PG: np.ndarray, greedy_P: np.ndarray) -> np.ndarray:
    """The advantages of one reward; 0 where it is unknown."""
    counted = reward_PG.copy()
    if o["credit"] == "rank":
        for row in counted:
            k = ~np.isnan(row)
            row[k] = [(row[k] < x).sum() + ((row[k] == x).sum() + 1) / 2 for x in row[k]]
    batch_std = counted[~np.isnan(counted)].std(ddof=1)
    result = np.zeros(reward_PG.shape)
    for p, row in enumerate(reward_PG):
        k = ~np.isnan(row)
        if k.any():
            result[p, k] = plain_group(o, row[k], LENGTH_PG[p, k], greedy_P[p], batch_std)
    return result


def total(reward_R: np.ndarray, weights_R: np.ndarray = WEIGHTS_R) -> np.ndarray:
    weighted = np.nan_to_num(reward_R) @ weights_R
    return np.where(np.isnan(reward_R).all(-1), nan, weighted)


def plain(o: dict, reward_PGR: np.ndarray) -> np.ndarray:
    o = {f: CHOICES[f][0] for f in CHOICES} | {"scale_by": "std"} | o
    known = ~np.isnan(reward_PGR).all(-1)
    whiten = o["whiten"]
    if o["aggregate"] == "each":
        each = [plain_one(o, reward_PGR[..., r], GREEDY_PR[:, r]) for r in range(R)]
        a = sum(w * x for w, x in zip(WEIGHTS_R, each))
        whiten = "completions" if whiten == "none" else whiten
    else:
        reward = total(reward_PGR)
        if o["kl_in"] == "reward":
            reward = reward - o["kl_coef"] * (ACTION_PGC * (LOGP_PGC - REF_PGC)).sum(-1)
        a = plain_one(o, reward, total(GREEDY_PR))
    if whiten == "completions":
        a = np.where(known, (a - a[known].mean()) / (a[known].std(ddof=1) + 1e-4), 0)
    if whiten == "tokens":
        by_token = np.repeat(a[known], ACTION_PGC[known].sum(-1))
        a = np.where(known, (a - by_token.mean()) / np.sqrt(by_token.var() + 1e-8), 0)
    return a


# --- All of them ----------------------------------------------------------------------------------


def test_every_combination_is_the_papers_and_finite():
    """With every reward known in part, equal ones among them, and groups without a reward."""
    combinations = accepted_combinations()
    assert 150 < len(combinations) < len(COMBINATIONS)
    for options in combinations:
        got = evaluate(options, REWARD_PGR, WEIGHTS_R, **GIVEN)
        assert got.dtype == np.float64 and np.isfinite(got).all(), options
        want = plain(options, REWARD_PGR)
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9, err_msg=str(options))
        unknown = np.isnan(REWARD_PGR).all(-1)
        assert unknown.sum() == G + 1 and not got[unknown].any(), options


def test_equal_rewards_give_exact_zeros_in_float32():
    """Where rewards are compared with each other, whatever they are and however normalized."""
    equal = np.broadcast_to(np.float32([1 / 3, 0.7]), (P, G, R))
    for options in accepted_combinations():
        if options["baseline"] in ("greedy", "none") or options["kl_in"] == "reward":
            continue
        got = evaluate(options, equal, WEIGHTS_R.astype(np.float32), **GIVEN)
        assert got.dtype == np.float32 and not got.any(), options


def test_with_its_kl_a_group_may_be_equal():
    """Half a nat for every token, and rewards that make up for it."""
    kl_PG = np.float32(0.5) * (ACTION_PGC * np.float32(1))
    shaped = evaluate(
        {"kl_in": "reward", "kl_coef": 0.5},
        (1 + kl_PG.sum(-1, keepdims=True)).astype(np.float32),
        np.ones(1),
        **GIVEN | {"logp_PGC": np.ones((P, G, C)), "ref_logp_PGC": np.zeros((P, G, C))},
    )
    np.testing.assert_array_equal(shaped, np.zeros((P, G)))


def test_the_config_has_the_same_choices():
    for name, values in CHOICES.items():
        assert set(options_lib.BY_NAME[f"algorithm.{name}"].choices) == set(values), name
        default = options_lib.BY_NAME[f"algorithm.{name}"].default
        assert getattr(AdvantageOptions(), name) == default, name


# --- By hand --------------------------------------------------------------------------------------

ONE_GROUP = [[1.0, 0.0, 0.0, 3.0]]  # mean 1, deviation sqrt(6 / 4), of a sample sqrt(6 / 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The others' mean: 1, 4/3, 4/3, 1/3.
        ({"baseline": "leave_one_out"}, [0, -4 / 3, -4 / 3, 8 / 3]),
        # (1 * 1 + 4 * 0 + 4 * 0 + 1 * 3) / 10 = 0.4.
        ({"baseline": "length_weighted"}, [0.6, -0.4, -0.4, 2.6]),
        ({"baseline": "greedy"}, [0.5, -0.5, -0.5, 2.5]),
        ({"baseline": "none"}, [1, 0, 0, 3]),
        ({"credit": "best"}, [0, 0, 0, 2]),
        ({"credit": "best", "scale_by": "sample_std"}, [0, 0, 0, 2 / (np.sqrt(2) + 1e-4)]),
        # Ranks 3, 1.5, 1.5, 4, their mean 2.5.
        ({"credit": "rank"}, [0.5, -1, -1, 1.5]),
        ({"scale_by": "mean"}, [0, -1, -1, 2]),
        ({"scale_by": "batch_std"}, np.array([0, -1, -1, 2]) / (np.sqrt(2) + 1e-4)),
        # Tokens 1, 4, 4, 1 of advantages 0, -1, -1, 2: mean -0.6, variance 1.2 - 0.36.
        ({"whiten": "tokens"}, (np.array([0, -1, -1, 2]) + 0.6) / np.sqrt(0.84 + 1e-8)),
        # k1 of 1 a token, half of it: rewards 0.5, -2, -2, 2.5, their mean -0.25.
        ({"kl_in": "reward", "kl_coef": 0.5}, [0.75, -1.75, -1.75, 2.75]),
    ],
    ids=str,
)
def test_one_group(options, expected):
    length = np.array([[1, 4, 4, 1]])
    action = np.arange(4) < length[..., None]
    got = evaluate(
        {"scale_by": "none", **options},
        np.array(ONE_GROUP)[..., None],
        [1.0],
        length_PG=length,
        greedy_PR=np.array([[0.5]]),
        action_PGC=action,
        logp_PGC=np.where(action, 2.0, nan),  # padding is not read
        ref_logp_PGC=np.ones(action.shape),
    )
    np.testing.assert_allclose(got, [expected], rtol=1e-12, atol=1e-12)


def test_max_rl_takes_a_mean_of_rounding_for_zero():
    """That of these is 3e-8 in float32, by which nothing should be divided."""
    reward = jnp.float32([[0.3, -0.1, -0.2], [-1, 0, 0], [0, 0, 0], [0, 0, 3]])
    got = group_advantages(reward, scale_by="mean")
    np.testing.assert_array_equal(got, [[0, 0, 0], [0, 0, 0], [0, 0, 0], [-1, -1, 2]])


def test_an_unknown_greedy_reward_gives_zeros():
    reward, greedy = [[[1.0], [2.0]], [[1.0], [2.0]]], [[nan], [0.5]]
    got = evaluate(
        {"baseline": "greedy", "scale_by": "none"}, reward, [1.0], greedy_PR=np.array(greedy)
    )
    np.testing.assert_array_equal(got, [[0, 0], [0.5, 1.5]])


def test_a_completion_without_others_does_not_count_in_whitening():
    """As in TRL: leave-one-out gives it no advantage. The others: -1 and 1, deviation sqrt(2)."""
    reward = [[[5.0], [nan]], [[1.0], [2.0]]]
    options = {"baseline": "leave_one_out", "scale_by": "none", "whiten": "completions"}
    got = evaluate(options, reward, [1.0])
    one = 1 / (np.sqrt(2) + 1e-4)
    np.testing.assert_allclose(got, [[0, 0], [-one, one]], rtol=1e-12)


def test_each_reward_has_the_same_say_whatever_its_size():
    """GDPO's reason: of the sum the larger reward decides alone."""
    reward = np.array([[[1.0, 0.0], [0.0, 100.0], [1.0, 100.0], [0.0, 0.0]]])
    options = {"aggregate": "each"}
    small, large = evaluate(options, reward, [1.0, 1.0])[0, :2]
    assert small == pytest.approx(large)
    assert evaluate({}, reward, [1.0, 1.0])[0, 0] < -0.9  # right in the first, and far below


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip": 0.2}, "'clip' is no option of an objective: .*scale_by, baseline, aggregate"),
        ({"weights": (1.0,)}, "'weights' is no option"),
        ({"scale_by": "variance"}, "scale_by = 'variance' must be one of none, std, sample_std"),
        ({"baseline": "greedy"}, 'baseline = "greedy" needs greedy_PR'),
        ({"baseline": "length_weighted"}, "needs length_PG"),
        ({"whiten": "tokens"}, 'whiten = "tokens" needs action_PGC'),
        ({"kl_in": "reward", "kl_coef": 1.0}, 'kl_in = "reward" needs action_PGC'),
    ],
)
def test_what_evaluate_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        evaluate(options, REWARD_PGR, WEIGHTS_R)


def test_evaluate_needs_the_log_probabilities_of_the_kl():
    with pytest.raises(ValueError, match="needs logp_PGC and ref_logp_PGC"):
        evaluate({"kl_in": "reward", "kl_coef": 1.0}, REWARD_PGR, WEIGHTS_R, action_PGC=ACTION_PGC)


def test_evaluate_leaves_the_precision_of_others_alone():
    evaluate({}, REWARD_PGR, WEIGHTS_R)
    assert jnp.float32(1).dtype == np.float32 and not jax.config.jax_enable_x64


def test_compiled_they_are_the_same():
    """In float32, as in training, from arrays that are traced."""
    kwargs = dict(
        length_PG=jnp.asarray(LENGTH_PG, jnp.int32),
        action_PGC=jnp.asarray(ACTION_PGC),
    )
    for options in (
        AdvantageOptions(aggregate="each", whiten="tokens", weights=(1.0, -0.3)),
        AdvantageOptions(baseline="length_weighted", credit="rank", weights=(1.0, -0.3)),
    ):
        reward = jnp.float32(REWARD_PGR if options.reads_each_reward else total(REWARD_PGR))
        got = jax.jit(lambda r, o=options: advantages(o, r, **kwargs))(reward)
        fields = {f: getattr(options, f) for f in CHOICES}
        want = evaluate(fields, REWARD_PGR, WEIGHTS_R, **GIVEN)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# --- TRL 1.16 -------------------------------------------------------------------------------------


def by_trl(trainer: type, name: str, reward_PGR: np.ndarray, **settings) -> np.ndarray:
    """The advantages that TRL's own lines compute, [P, G]; the settings are the trainer's."""
    torch = pytest.importorskip("torch")
    from trl.trainer.utils import nanstd

    lines = inspect.getsource(getattr(trainer, name)).splitlines()
    first = next(i for i, line in enumerate(lines) if "unscorable_mask = torch.isnan(" in line)
    last = next(i for i, line in enumerate(lines) if "advantages = torch.nan_to_num(" in line)
    tensor = lambda x: torch.tensor(np.asarray(x, np.float64))  # noqa: E731
    found = {
        "torch": torch, "nanstd": nanstd, "gather": lambda x: x, "device": "cpu",
        "rewards_per_func": tensor(reward_PGR.reshape(-1, reward_PGR.shape[-1])),
        "num_generations": reward_PGR.shape[1],
        "completion_mask": tensor(ACTION_PGC.reshape(-1, C)),
        "old_per_token_logps": tensor(LOGP_PGC.reshape(-1, C)),
        "ref_per_token_logps": tensor(REF_PGC.reshape(-1, C)),
        "self": SimpleNamespace(
            reward_weights=tensor(WEIGHTS_R), reward_funcs=[None] * R, reward_clip_range=None,
            **settings,
        ),
    }  # fmt: skip
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), found)
    return found["advantages"].numpy().reshape(reward_PGR.shape[:2])


@pytest.mark.parametrize(
    ("scale", "aggregation", "options"),
    [
        ("group", "sum_then_normalize", {"scale_by": "sample_std"}),
        ("batch", "sum_then_normalize", {"scale_by": "batch_std"}),
        ("none", "sum_then_normalize", {"scale_by": "none"}),
        ("none", "normalize_then_sum", {"scale_by": "sample_std", "aggregate": "each"}),
    ],
)
def test_grpo_of_trl(scale, aggregation, options):
    trl = pytest.importorskip("trl")
    want = by_trl(
        trl.GRPOTrainer, "_generate_and_score_completions", REWARD_PGR,
        scale_rewards=scale, multi_objective_aggregation=aggregation,
    )  # fmt: skip
    got = evaluate(options, REWARD_PGR, WEIGHTS_R)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("normalized", [False, True])
def test_rloo_of_trl(beta, normalized):
    trl = pytest.importorskip("trl")
    reward_PGR = REWARD_PGR.copy()
    reward_PGR[2, 1:] = nan  # one without others has no advantage, and counts nowhere
    want = by_trl(
        trl.RLOOTrainer, "_generate_and_score_completions", reward_PGR,
        beta=beta, normalize_advantages=normalized,
    )  # fmt: skip
    options = {
        "baseline": "leave_one_out", "scale_by": "none", "kl_in": "reward", "kl_coef": beta,
        "whiten": "completions" if normalized else "none",
    }  # fmt: skip
    got = evaluate(options, reward_PGR, WEIGHTS_R, **GIVEN)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
