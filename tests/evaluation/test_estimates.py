"""pass@k, pass^k and maj@k against counting all choices, votes by hand, intervals against scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from grpo_jax.evaluation import estimates

# --- pass@k and maj@k -----------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n):
    for k in range(1, n + 1):
        shares = []
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            shares.append(np.mean([any(c) for c in itertools.combinations(samples, k)]))
        np.testing.assert_allclose(
            estimates.pass_at_k(np.arange(n + 1), n, k), shares, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_all_k_is_the_share_of_choices_that_are_all_right(n):
    for k in range(1, n + 1):
        shares = []
        for right in range(n + 1):
            samples = [True] * right + [False] * (n - right)
            shares.append(np.mean([all(c) for c in itertools.combinations(samples, k)]))
        np.testing.assert_allclose(
            estimates.pass_all_k(np.arange(n + 1), n, k), shares, rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(
    ("votes", "correct", "wins"),
    [
        ([0, 1, 0], [True, False, True], True),
        ([0, 1, 1], [True, False, False], False),
        ([0, 1, 1, 0], [False, True, True, False], False),  # a tie: the one given first
        ([0, 1, 1, 0], [True, False, False, True], True),
        ([-1, 1, 1, 0, 0], [False, True, True, False, False], True),
        ([-1, -1, 2], [False, False, True], True),  # no answer never wins
        ([-1, -1], [False, False], False),
        ([-1, 1, -1], [True, False, True], False),
        ([0, 0, 0], [False, True, True], False),  # as right as the first that gave it
    ],
)
def test_majority(votes, correct, wins):
    assert estimates.majority(np.array(votes), np.array(correct)) is wins


VOTES = [  # of 6 samples; each answer's number is that of its first sample
    ([0, 1, 1, 0, 4, -1], {0}),
    ([0, 1, 1, 0, 4, -1], {4}),
    ([0, 1, 2, 3, 4, 5], {3}),
    ([0, 0, 0, 3, 3, 5], {0}),
    ([0, 0, 0, 3, 3, 5], {3, 5}),
    ([-1, -1, -1, 3, -1, 3], {3}),
    ([-1] * 6, set()),
    ([0] * 6, {0}),
    ([0] * 6, set()),
]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_maj_at_k_is_the_share_of_draws_whose_vote_is_right(k):
    """Every ordered draw of k of the 6, voted on by `majority`: the first given wins a tie."""
    expected = []
    for votes, right in VOTES:
        draws = list(itertools.permutations(votes, k))
        won = [estimates.majority(np.array(d), np.isin(d, list(right))) for d in draws]
        expected.append(np.mean(won))
    vote_PK = np.array([votes for votes, _ in VOTES])
    correct_PK = np.array([np.isin(votes, list(right)) for votes, right in VOTES])
    found = estimates.maj_at_k(vote_PK, correct_PK, k)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert len(set(expected)) > 4


def test_maj_at_all_samples_is_their_vote():
    vote_PK = np.array([[0, 1, 1, 0], [0, 1, 1, 0]])  # ties
    correct_PK = np.array([[True, False, False, True], [False, True, True, False]])
    assert estimates.maj_at_k(vote_PK, correct_PK, 4).tolist() == [1.0, 0.0]


def test_maj_at_k_by_hand():
    # Answers A A B, A right. Pairs AA, AB, AB: the vote of AB is a tie, so 1/3 + 2/3 * 1/2.
    found = estimates.maj_at_k(np.array([[0, 0, 2]]), np.array([[True, True, False]]), 2)
    assert found[0] == pytest.approx(2 / 3)


def test_many_samples():
    """64 samples, 24 of them right, the others all different: the vote of 32 hardly ever fails."""
    vote_PK = np.array([[0] * 24 + list(range(24, 64))])
    found = estimates.maj_at_k(vote_PK, vote_PK == 0, 32)
    assert 0.999 < found[0] <= 1.0
    assert estimates.maj_at_k(vote_PK, vote_PK == 0, 1)[0] == pytest.approx(24 / 64)


# --- Intervals ------------------------------------------------------------------------------------


def _share(right: int, n: int) -> estimates.Estimate:
    return estimates.estimate(estimates.mean(np.arange(n) < right))


@pytest.mark.parametrize(("right", "n"), [(300, 400), (40, 80), (700, 1000)])
def test_the_interval_of_a_share_is_that_of_the_binomial(right, n):
    """The share of n redrawn problems is binomial: its quantiles, to 0.15 of the half-width."""
    found = _share(right, n)
    low, high = stats.binom.ppf([0.025, 0.975], n, right / n) / n
    assert found.value == right / n
    tolerance = 0.15 * (high - low) / 2 + 0.5 / n
    assert found.low == pytest.approx(low, abs=tolerance)
    assert found.high == pytest.approx(high, abs=tolerance)


@pytest.mark.parametrize(("n", "p"), [(200, 0.98), (100, 0.5), (80, 0.1)])
def test_intervals_cover_the_truth_as_often_as_they_say(n, p):
    """By the chance of each number of right ones; 95 % but for discreteness and resampling."""
    right_N = np.arange(n + 1)
    chance_N = stats.binom.pmf(right_N, n, p)
    ends = [(right, _share(right, n)) for right in right_N[chance_N > 1e-4]]
    covered = sum(chance_N[right] for right, e in ends if e.low <= p <= e.high)
    assert chance_N[chance_N > 1e-4].sum() > 0.998
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("n", [1, 2, 50])
def test_all_right_or_all_wrong_is_the_clopper_pearson_interval(n):
    for right in (0, n):
        found = _share(right, n)
        exact = stats.binomtest(right, n).proportion_ci(0.95, method="exact")
        assert found.value == right / n
        np.testing.assert_allclose([found.low, found.high], [exact.low, exact.high], atol=1e-12)


def test_values_that_are_all_equal():
    # 97.5 % sure: at most b of the problems differ, by at most the way to the end of the range.
    b = 1 - 0.025 ** (1 / 10)
    found = estimates.estimate(estimates.mean(np.full(10, 0.5)))
    np.testing.assert_allclose([found.low, found.high], [0.5 - 0.5 * b, 0.5 + 0.5 * b])
    found = estimates.estimate(estimates.mean(np.full(10, 64), 1, 64))
    np.testing.assert_allclose([found.low, found.high], [64 - 63 * b, 64])
    same = estimates.mean(np.arange(10) % 2)
    found = estimates.estimate(estimates.difference(same, same))
    np.testing.assert_allclose([found.value, found.low, found.high], [0, -b, b])


def test_a_ratio_leaves_out_what_counts_nothing():
    """Mean length of the stopped: 30 tokens in 3 completions, none in the last two problems."""
    total_P, count_P = np.array([10, 20, 0, 0]), np.array([2, 1, 0, 0])
    found = estimates.estimate(estimates.ratio(total_P, count_P, 1, 64))
    assert found.value == 10 and 5 <= found.low < 10 < found.high <= 20
    none = estimates.estimate(estimates.ratio(np.zeros(4), np.zeros(4), 1, 64))
    assert all(map(math.isnan, (none.value, none.low, none.high)))
    one = estimates.estimate(estimates.ratio(np.array([7, 0]), np.array([1, 0]), 1, 64))
    b = 0.975  # one problem alone: 1 - 0.025
    np.testing.assert_allclose([one.value, one.low, one.high], [7, 7 - 6 * b, 7 + 57 * b])


def test_paired_problems_tell_more_than_unpaired_ones():
    rng = np.random.default_rng(0)
    first_P = rng.random(400) < 0.5
    second_P = first_P | (rng.random(400) < 0.08)  # right where the first is, and 4 % more often
    first, second = estimates.mean(first_P), estimates.mean(second_P)
    found = estimates.estimate(estimates.difference(second, first))
    assert found.value == pytest.approx(second_P.mean() - first_P.mean())
    assert 0 < found.low < found.value < found.high
    # Of the paired difference: standard error of the mean of the differences.
    gained_P = second_P.astype(float) - first_P
    half = 1.96 * gained_P.std() / math.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    apart = [estimates.estimate(t) for t in (first, second)]
    assert found.high - found.low < 0.6 * min(e.high - e.low for e in apart)


def test_what_stands_several_times_counts_once():
    """Six problems of three prompts: as three of 1, 1/2 and 0 right, of weights 3, 2 and 1."""
    right_P = np.array([1, 1, 1, 1, 0, 0.0])
    group_P = estimates.groups(["a", "a", "b", "a", "b", "c"])
    assert group_P.tolist() == [0, 0, 1, 0, 1, 2]
    grouped = estimates.mean(right_P).grouped(group_P)
    assert grouped.value == estimates.mean(right_P).value == 4 / 6
    byhand = estimates.ratio(np.array([3, 1, 0.0]), np.array([3, 2, 1.0]))
    np.testing.assert_array_equal(grouped.part_PX, byhand.part_PX)
    wide, narrow = estimates.estimate(byhand), estimates.estimate(estimates.mean(right_P))
    assert estimates.estimate(grouped) == wide
    assert wide.high - wide.low > narrow.high - narrow.low


def test_problems_that_all_differ_are_as_they_were():
    right_P = np.array([1, 0, 1, 1.0])
    tally = estimates.mean(right_P)
    np.testing.assert_array_equal(tally.grouped(estimates.groups("dabc")).part_PX, tally.part_PX)


def test_the_same_data_give_the_same_interval():
    assert _share(30, 70) == _share(30, 70)


def test_a_large_set_needs_no_jackknife(monkeypatch):
    methods = []
    bootstrap = estimates._bootstrap
    monkeypatch.setattr(
        estimates, "_bootstrap", lambda *a, **k: (methods.append(a[1]), bootstrap(*a, **k))[1]
    )
    _share(300, 600)
    assert methods == ["percentile", "BCa"]
    methods.clear()
    found = _share(3000, 6000)
    half = 1.96 * 0.5 / math.sqrt(6000)
    np.testing.assert_allclose([found.low, found.high], [0.5 - half, 0.5 + half], atol=0.1 * half)
    assert methods == ["percentile"]
