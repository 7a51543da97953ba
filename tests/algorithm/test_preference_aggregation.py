"""The limits of docs/preference_aggregation.md, through our own advantages and losses.

Expected gradients are sums over all groups of answers in float64; nothing is sampled.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import preference_aggregation as bandit
from preference_aggregation import Setting

INF = math.inf
STD, SAMPLE, NONE = {}, {"scale_by": "sample_std"}, {"scale_by": "none"}
LEFT_OUT = {"scale_by": "none", "baseline": "leave_one_out"}
# The limit for a reference of 0.3 and rewards of 1 and 0, with beta 0.5, 1 and 2.
GOLDEN = [
    ("k3", 2, STD, (0.710977, 0.547723, 0.421954)),
    ("k3", 8, STD, (0.853564, 0.707770, 0.531362)),
    ("k3", 8, SAMPLE, (0.842871, 0.690377, 0.516816)),
    ("k3", INF, STD, (0.900000, 0.739116, 0.548806)),
    ("k3", 4, NONE, (0.643927, 0.487381, 0.389141)),
    ("k2", 2, STD, (0.760004, 0.538102, 0.414038)),
    ("k2", 8, STD, (0.987266, 0.770144, 0.520254)),
    ("k3_ratio", 8, STD, (0.987266, 0.770144, 0.520254)),
    ("k3_ratio", 8, SAMPLE, (0.981608, 0.737160, 0.505159)),
    ("k3_ratio", 4, NONE, (0.657619, 0.475695, 0.384073)),
    ("k2", 4, LEFT_OUT, (0.760004, 0.538102, 0.414038)),
    ("reward", 2, NONE, (0.760004, 0.538102, 0.414038)),
    ("reward", 8, NONE, (0.760004, 0.538102, 0.414038)),
    ("reward", 4, LEFT_OUT, (0.760004, 0.538102, 0.414038)),
    ("reward", 8, SAMPLE, (0.760004, 0.538102, 0.414038)),
]
THREE = [  # rewards 1, 0.9 and 0, a reference of 0.2, 0.3 and 0.5, beta 1
    ("k3", 2, STD, (0.44721, 0.25989, 0.29289)),
    ("k2", 2, STD, (0.41487, 0.30343, 0.28170)),
    ("k3", 4, NONE, (0.27945, 0.37941, 0.34114)),
    ("reward", 2, NONE, (0.30516, 0.41418, 0.28066)),
]


def three(kl: str, group: int, options: dict) -> Setting:
    return Setting(kl, **bandit.THREE, group=group, **options)


def odds(p: float) -> np.ndarray:
    """The logits of two answers, the first of probability p."""
    return np.array([math.log(p / (1 - p)), 0.0])


@pytest.mark.parametrize(("kl", "group", "options", "golden"), GOLDEN)
def test_limit_of_two_answers(kl, group, options, golden):
    """Ours pushes up right below the golden value and down right above it; so does the formula."""
    for beta, p in zip(bandit.BETAS, golden):
        setting = Setting(kl, beta, group, **options)
        assert abs(bandit.by_formula(setting)[0] - p) < 1e-6
        if group == INF:
            continue
        if kl != "reward":  # where shaped rewards tie, the 1e-4 beside the deviation is nothing
            setting = bandit.enumerable(setting)
        below = bandit.gradient_by_enumeration(setting, odds(p - 1e-6))
        above = bandit.gradient_by_enumeration(setting, odds(p + 1e-6))
        assert below[0] > 0 > above[0]


@pytest.mark.parametrize(("kl", "group", "options", "golden"), THREE)
def test_limit_of_three_answers(kl, group, options, golden):
    setting = three(kl, group, options)
    formula = bandit.by_formula(setting)
    np.testing.assert_allclose(formula, golden, atol=6e-6)
    np.testing.assert_allclose(bandit.by_enumeration(setting), formula, atol=1e-9)


@pytest.mark.parametrize("kl", ["k3", "k2", "k3_ratio"])
@pytest.mark.parametrize("options", [STD, NONE, LEFT_OUT])
def test_gradient_is_the_formulas_away_from_the_limit_too(kl, options):
    for setting in (Setting(kl, 0.7, 4, **options), three(kl, 2, options)):
        logits = np.array([0.4, -0.3, 0.1])[: len(setting.reward_K)]
        ours = bandit.gradient_by_enumeration(setting, logits)
        np.testing.assert_allclose(ours, bandit.gradient_by_formula(setting, logits), atol=1e-12)


def test_closed_forms():
    q, beta = 0.3, 0.8
    limit = lambda *args, **options: bandit.by_formula(Setting(*args, **options))[0]  # noqa: E731
    kappa = beta
    pairs = (1 - kappa + math.sqrt((1 - kappa) ** 2 + 4 * kappa * q)) / 2
    assert limit("k3", beta, 2) == pytest.approx(pairs, abs=1e-9)
    kappa = beta / 0.75
    unscaled = (1 - kappa + math.sqrt((1 - kappa) ** 2 + 4 * kappa * q)) / 2
    assert limit("k3", beta, 4, "none") == pytest.approx(unscaled, abs=1e-9)
    p = limit("k3", beta, INF)
    assert p - q == pytest.approx(math.sqrt(p * (1 - p)) / beta, abs=1e-9)
    softmax = q / (q + (1 - q) * math.exp(-1 / beta))
    for args in (("k2", beta, 2), ("reward", beta, 8), ("k3_ratio", beta, 8, *LEFT_OUT.values())):
        assert limit(*args) == pytest.approx(softmax, abs=1e-9)
    tempered = q / (q + (1 - q) * math.exp(-0.75 / beta))
    assert limit("k2", beta, 4, "none") == pytest.approx(tempered, abs=1e-9)


def test_large_groups_have_no_limit_below_a_beta_of_1_08():
    """With k2 and all answers of the policy as the group, p runs to 1 from a reference of 0.3."""
    assert bandit.by_formula(Setting("k2", 1.07, INF))[0] == 1
    assert 0.8 < bandit.by_formula(Setting("k2", 1.09, INF))[0] < 0.87
    assert 1 - bandit.by_formula(Setting("k2", 0.5, 64))[0] < 1e-6


def test_a_kl_in_the_reward_has_its_limit_where_shaped_rewards_tie():
    """With a deviation of at most 1e-4 an advantage is 0: a small zone around the limit."""
    setting = Setting("reward", 1.0, 8, "std")
    p = bandit.by_formula(setting)[0]
    assert not bandit.gradient_by_enumeration(setting, odds(p)).any()
    assert bandit.gradient_by_enumeration(setting, odds(p - 1e-3))[0] > 1e-3
    assert bandit.gradient_by_enumeration(setting, odds(p + 1e-3))[0] < -1e-3


def test_pairs_see_the_order_of_rewards_alone():
    logits = np.array([0.3, -0.2, 0.1])
    first, second = (
        bandit.gradient_by_enumeration(
            three("k3", 2, options)._replace(reward_K=(1.0, middle, 0.0)), logits
        )
        for options, middle in ((STD, 0.9), (STD, 0.2))
    )
    np.testing.assert_allclose(first, second, atol=1e-12)
    unscaled = bandit.gradient_by_enumeration(three("k3", 2, NONE), logits)
    assert np.abs(first - unscaled).max() > 0.01


def test_k3_keeps_a_share_of_what_the_reference_says():
    """At least q / (1 + sqrt(G - 1) / beta), since no advantage is below -sqrt(G - 1)."""
    for beta in (0.001, 0.1, 1.0):
        kept = 0.7 / (1 + math.sqrt(7) / beta)
        wrong = bandit.by_formula(Setting("k3", beta))[1]
        assert kept < wrong
        if beta == 0.001:
            assert wrong < 1.01 * kept  # a wrong answer beside seven right ones
    assert bandit.by_formula(Setting("k2", 0.1))[1] < 1e-9


def test_the_pages_tables_are_those_of_the_code():
    text = (bandit.DOCS / "preference_aggregation.md").read_text()
    assert bandit.page(text) == text
