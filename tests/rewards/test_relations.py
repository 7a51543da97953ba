"""Correlations, shares at bounds, and agreement with people, by hand."""

import numpy as np
import pytest

from grpo_jax.rewards import relations
from grpo_jax.rewards.scores import Scores

NAN = float("nan")


def test_correlation():
    assert relations.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert relations.correlation([1, 2, 3, NAN], [3, 2, 1, 9]) == pytest.approx(-1.0)
    one, other = np.array([0.1, 0.7, 0.3, 0.9]), np.array([0.2, 0.1, 0.9, 0.4])
    assert relations.correlation(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])
    for lacking in ([1, 2], [1, 2]), ([5, 5, 5], [1, 2, 3]), ([0.1] * 7, np.arange(7)):
        assert np.isnan(relations.correlation(*lacking))
    table = relations.correlations({"a": one, "b": other, "c": np.ones(4)})
    assert table[0, 0] == pytest.approx(1.0) and np.isnan(table[2]).all()
    np.testing.assert_allclose(table, table.T)


def test_shares_at_bounds():
    assert relations.shares_at_bounds(np.array([0, 0, 0.5, 1, NAN])) == (0.5, 0.25)
    assert relations.shares_at_bounds(np.array([2.0, 2.0])) == (1.0, 1.0)
    assert np.isnan(relations.shares_at_bounds(np.array([NAN]))).all()


def test_metrics_of_members():
    value = {"a": np.array([0, 1, 1, 1.0]), "b": np.array([3, 3, 3, NAN]), "c": np.zeros(4)}
    none = {n: np.zeros(4) for n in value}
    scores = Scores(np.zeros(4), value, {n: v > 0 for n, v in none.items()}, none)
    got = relations.metrics(scores, ["a", "b"], np.array([10, 20, 20, 20]))
    assert got == pytest.approx({
        "ensemble/low_share/a": 0.25, "ensemble/high_share/a": 0.75,
        "ensemble/length_correlation/a": 1.0,
        "ensemble/low_share/b": 1.0, "ensemble/high_share/b": 1.0,
    })  # fmt: skip
    scores.by_name["b"] = np.array([4, 3, 2, 3.0])
    got = relations.metrics(scores, ["a", "b"], np.array([10, 20, 20, 20]))
    assert got["ensemble/correlation/a/b"] == pytest.approx(
        np.corrcoef([0, 1, 1, 1], [4, 3, 2, 3])[0, 1]
    )


def test_kappa_by_hand():
    """Cohen's own form: 20 yes both, 15 no both, 5 and 10 apart: (.7 - .5) / (1 - .5)."""
    one = ["y"] * 25 + ["n"] * 25
    other = ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert relations.kappa(one, other) == pytest.approx(0.4)
    assert relations.kappa([1, 0, 1], [1, 0, 1]) == 1.0
    assert relations.kappa([1, 0], [0, 1]) == -1.0
    assert np.isnan(relations.kappa([1, 1], [1, 1]))
    with pytest.raises(ValueError, match="as many labels"):
        relations.kappa([1], [])


def test_agreement_with_people():
    label = [True, True, False, False, True]
    assert relations.agreement(np.array([1, 1, 0, 0, NAN]), label) == (1.0, 1.0, 1.0)
    kappa, share, threshold = relations.agreement(np.array([0.9, 0.6, 0.5, 0.1, 0.7]), label)
    assert (kappa, share, threshold) == (1.0, 1.0, pytest.approx(0.6))
    # 1 yes of which both, 1 no of which both, 2 apart: (.6 - .52) / .48, if from 1 on is good
    kappa, share, _ = relations.agreement(np.array([1, 0, 1, 0, 1.0]), label)
    assert share == pytest.approx(0.6) and kappa == pytest.approx((0.6 - 0.52) / 0.48)
    assert np.isnan(relations.agreement(np.array([NAN] * 5), label)).all()
