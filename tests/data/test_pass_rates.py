"""Measured pass rates, and the prompts that are drawn by them."""

import json

import numpy as np
import pytest

from grpo_jax.data.pass_rates import PassRates, Preference

NAN = float("nan")


def test_a_rate_begins_with_its_first_group_and_follows_the_newest():
    rates = PassRates.unseen(4).after([2, 0, 2], [0.5, 1.0, 1.0], newest=0.25)
    # Problem 2: 0.5, then 0.5 + 0.25 * (1 - 0.5); problem 1 and 3 were not asked.
    assert rates.times_N.tolist() == [1, 0, 2, 0]
    assert rates.rate_N[[0, 2]].tolist() == [1.0, 0.625]
    later = rates.after([0, 3, 1], [0.0, NAN, 0.0], newest=0.25)
    assert later.times_N.tolist() == [2, 1, 2, 0]  # unknown is not measured
    assert later.rate_N[:3].tolist() == [0.75, 0.0, 0.625]
    assert rates.times_N.tolist() == [1, 0, 2, 0]  # a stop may still save these
    assert later.is_seen_N.tolist() == [True, True, True, False]
    assert later.easy_N(0.7).tolist() == [True, False, False, False]
    assert later.hard_N(0.5).tolist() == [False, True, False, False]
    assert not later.easy_N(0.75).any() and not later.hard_N(0.0).any()  # the ends are inside


def test_rates_are_kept_without_loss():
    rng = np.random.default_rng(0)
    rates = PassRates.unseen(9)
    for _ in range(5):
        rates = rates.after(rng.integers(7, size=3), rng.random(3), newest=0.3)
    again = PassRates.from_json(json.loads(json.dumps(rates.as_json())))
    seen = rates.is_seen_N
    assert 2 < seen.sum() < 8
    np.testing.assert_array_equal(again.times_N, rates.times_N)
    np.testing.assert_array_equal(again.rate_N[seen], rates.rate_N[seen])


# Of 12 problems 0 to 3 are easy, 4 to 7 lie in the band, 8 and 9 are hard, 10 and 11 unseen.
RATES = PassRates.unseen(12).after(
    range(10), [1, 1, 1, 0.9, 0.2, 0.5, 0.6, 0.8, 0.1, 0.0], newest=1.0
)


def _counts(preference: Preference, count: int, draws: int = 3000) -> np.ndarray:
    drawn = [preference.draw(RATES, 0, number, count) for number in range(draws)]
    return np.bincount(np.concatenate(drawn), minlength=12) / draws


def test_problems_are_drawn_by_their_weight():
    """One of each draw: the band and the unseen have weight 1 of 6 + 6 * 0.1, the others 0.1."""
    share_N = _counts(Preference(0.2, 0.8, 0.1), 1)
    want = np.where(np.isin(np.arange(12), [4, 5, 6, 7, 10, 11]), 1.0, 0.1) / 6.6
    np.testing.assert_allclose(share_N, want, atol=4 * np.sqrt(want[4] / 3000))
    assert (share_N > 0).all()  # nothing is excluded


def test_a_share_of_each_draw_is_replayed():
    preference = Preference(0.2, 0.8, 1.0, replay_share=0.25)
    for number in range(50):
        drawn = preference.draw(RATES, 3, number, 8)
        assert len(set(drawn)) == 8 and (drawn < 4).sum() == 2
    share_N = _counts(preference, 8, draws=400)
    np.testing.assert_allclose(share_N[:4], 0.5, atol=0.1)  # 2 of the 4 easy ones
    np.testing.assert_allclose(share_N[4:], 0.75, atol=0.1)  # 6 of the 8 others
    # They lie anywhere in the draw, which minibatches divide.
    first = [preference.draw(RATES, 3, number, 8)[:4] for number in range(200)]
    assert abs(np.mean([(part < 4).sum() for part in first]) - 1) < 0.25


def test_too_few_problems_of_one_kind_are_made_up_for():
    preference = Preference(0.2, 0.8, 1.0, replay_share=0.5)
    new = PassRates.unseen(12)
    assert len(set(preference.draw(new, 0, 0, 8))) == 8  # nothing is solved yet
    drawn = preference.draw(RATES, 0, 0, 12)  # 6 are wanted, 4 are solved
    assert sorted(drawn) == list(range(12))
    most = PassRates.unseen(4).after(range(4), [1, 1, 1, 0], newest=1.0)
    assert sorted(preference.draw(most, 0, 0, 4)) == [0, 1, 2, 3]  # only one is not solved
    assert np.bincount(preference.draw(most, 0, 0, 9)).min() >= 2  # all come again


def test_a_draw_follows_from_seed_number_and_rates():
    preference = Preference(0.2, 0.8, 0.1, 0.25)
    first = preference.draw(RATES, 0, 5, 6)
    np.testing.assert_array_equal(first, preference.draw(RATES, 0, 5, 6))
    for other in ((RATES, 1, 5), (RATES, 0, 6), (PassRates.unseen(12), 0, 5)):
        assert not np.array_equal(first, preference.draw(*other, 6))


@pytest.mark.parametrize("count", [1, 5, 12, 30])
def test_a_draw_has_as_many_as_are_asked(count):
    drawn = Preference(0.2, 0.8, 0.1, 0.25).draw(RATES, 0, 0, count)
    assert drawn.shape == (count,) and drawn.dtype == np.int64
    assert np.bincount(drawn, minlength=12).max() <= -(-count // 12)
