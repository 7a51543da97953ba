"""One reward from several: each form against arithmetic by hand, unknown members, refusals."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from grpo_jax.rewards import ensembles, registry
from grpo_jax.rewards.scores import Failure, Scores

NAN = float("nan")
A, B, C = [0.2, 0.8, 1.0, 0.0], [0.6, 0.4, 1.0, 0.0], [1.0, 0.0, 0.5, 0.5]


def scores(failed=(), **values) -> Scores:
    """Scores of members by name; `failed`: pairs of a member and a row."""
    rows = len(next(iter(values.values())))
    by_name = {n: np.array(v, np.float32) for n, v in values.items()}
    failed_B = {n: np.zeros(rows, bool) for n in values}
    for name, row in failed:
        failed_B[name][row], by_name[name][row] = True, NAN
    return Scores(
        reward_B=np.zeros(rows, np.float32),
        by_name=by_name,
        failed=failed_B,
        seconds={n: np.ones(rows) for n in values},
        failures=tuple(Failure(name, row, "timeout", "slow") for name, row in failed),
    )


def rewards(*entries, members=("a", "b", "c"), on_failure="unknown"):
    names = [f"odd_rewards:half as {m}" for m in members] + list(entries)
    weights = [0.0] * len(members) + [1.0] * len(entries)
    found = registry.load(names, weights, on_failure=on_failure)
    ensembles.refuse(found)
    return found


def value(entry, **given) -> np.ndarray:
    given = given or {"a": A, "b": B, "c": C}
    found = rewards(entry, members=tuple(given))
    return ensembles.add(scores(**given), found).reward_B


# --- By hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        ("ensemble:sum(of=['a', 'b', 'c'])", [1.8, 1.2, 2.5, 0.5]),
        ("ensemble:sum(of=['a', 'b'], weights=[2, -1])", [-0.2, 1.2, 1.0, 0.0]),
        ("ensemble:product(of=['a', 'b', 'c'])", [0.12, 0.0, 0.5, 0.0]),
        ("ensemble:minimum(of=['a', 'b', 'c'])", [0.2, 0.0, 0.5, 0.0]),
        # means .4 .6 1 0; deviations .2 .2 0 0
        ("ensemble:lower(of=['a', 'b'], k=2)", [0.0, 0.2, 1.0, 0.0]),
        ("ensemble:lower(of=['a', 'b'], k=0)", [0.4, 0.6, 1.0, 0.0]),
        ("ensemble:gate(of='a', where='c', at_least=0.5)", [0.2, 0.0, 1.0, 0.0]),
        ("ensemble:gate(of='a', where=['b', 'c'], at_least=0.5, otherwise=-1)", [0.2, -1, 1.0, -1]),
        ("ensemble:penalty(of='a', by='b', times=2, above=0.5)", [0.0, 0.8, 0.0, 0.0]),
    ],
)
def test_forms(entry, want):
    np.testing.assert_allclose(value(entry), want, atol=1e-6)


def test_members_are_scaled_by_the_spread_of_the_step():
    """Of a: mean .5, deviation sqrt(.17); of d, a hundred times as large, the same."""
    d = [100 * x + 7 for x in A]
    got = value("ensemble:sum(of=['a', 'd'], scale='step')", a=A, d=d)
    np.testing.assert_allclose(got, 2 * (np.array(A) - 0.5) / np.sqrt(0.17), rtol=1e-5)
    plain = value("ensemble:sum(of=['a', 'd'])", a=A, d=d)
    assert np.ptp(plain) > 90 > np.ptp(got)
    constant = value("ensemble:minimum(of=['a', 'e'], scale='step')", a=A, e=[3.0] * 4)
    np.testing.assert_allclose(constant, np.minimum((np.array(A) - 0.5) / np.sqrt(0.17), 0.0), 1e-5)


def test_members_are_scaled_by_a_spread_that_is_given():
    entry = "ensemble:minimum(of=['a', 'b'], scale={'a': (0.5, 0.5), 'b': (0.0, 0.1)})"
    np.testing.assert_allclose(value(entry), [-0.6, 0.6, 1.0, -1.0], atol=1e-6)


def test_an_ensemble_may_be_a_member():
    found = rewards(
        "ensemble:minimum(of=['a', 'b']) as low",
        "ensemble:gate(of='low', where='c', at_least=0.5) as safe",
    )
    got = ensembles.add(scores(a=A, b=B, c=C), found)
    assert list(got.by_name) == ["a", "b", "c", "low", "safe"]
    np.testing.assert_allclose(got.by_name["safe"], [0.2, 0.0, 1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(got.reward_B, got.by_name["low"] + got.by_name["safe"], atol=1e-6)
    assert ensembles.members(found) == ["a", "b", "c"]


def test_weights_count_members_beside_an_ensemble():
    found = rewards("ensemble:minimum(of=['a', 'b']) as low")
    found = [dataclasses.replace(r, weight=2.0) if r.name == "c" else r for r in found]
    got = ensembles.add(scores(a=A, b=B, c=C), found)
    np.testing.assert_allclose(got.reward_B, [2.2, 0.4, 2.0, 1.0], atol=1e-6)


def test_without_ensembles_nothing_changes():
    given = scores(a=A)
    assert ensembles.add(given, rewards(members=("a",))) is given


# --- None and unknown -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "want"),
    [
        # a: 0.2, None, None, 0.5; b: 0.6, 0.4, None, None
        ("ensemble:sum(of=['a', 'b'])", [0.8, 0.4, NAN, 0.5]),
        ("ensemble:product(of=['a', 'b'])", [0.12, 0.4, NAN, 0.5]),
        ("ensemble:minimum(of=['a', 'b'])", [0.2, 0.4, NAN, 0.5]),
        ("ensemble:lower(of=['a', 'b'])", [0.2, 0.4, NAN, 0.5]),
        ("ensemble:gate(of='a', where='b', at_least=0.7)", [0.0, NAN, NAN, 0.5]),
        ("ensemble:penalty(of='a', by='b')", [-0.4, NAN, NAN, 0.5]),
    ],
)
def test_a_member_that_does_not_apply_is_left_out(entry, want):
    found = rewards(entry, members=("a", "b"))
    got = ensembles.add(scores(a=[0.2, NAN, NAN, 0.5], b=[0.6, 0.4, NAN, NAN]), found)
    name = found[-1].name
    np.testing.assert_allclose(got.by_name[name], want, atol=1e-6)
    assert not got.failed[name].any() and not got.failures


def test_a_member_that_failed_makes_the_ensemble_unknown():
    found = rewards("ensemble:sum(of=['a', 'b'], scale='step') as all")
    got = ensembles.add(scores(failed=[("a", 1)], a=A, b=B, c=C), found)
    assert got.failed["all"].tolist() == [False, True, False, False]
    assert np.isnan(got.by_name["all"][1]) and got.unknown_B.tolist() == [False, True, False, False]
    (of_member, of_ensemble) = got.failures
    assert (of_member.reward, of_ensemble.reward, of_ensemble.row) == ("a", "all", 1)
    assert of_ensemble.kind == "member" and "its member 'a' failed" in of_ensemble.message
    # The others are scaled as if that row were not there: a is 0.2, 1, 0.
    a = np.array([0.2, 1.0, 0.0])
    b = (np.array(B) - np.mean(B)) / np.std(B)
    want = (a - a.mean()) / a.std() + b[[0, 2, 3]]
    np.testing.assert_allclose(got.reward_B[[0, 2, 3]], want, rtol=1e-5)
    assert "1 of 4 completions have no reward 'all'" in got.broken(0.2)["all"]


def test_with_least_a_failed_member_counts_as_its_worst():
    """For what a penalty reads, the worst is the most."""
    entries = ("ensemble:sum(of=['a', 'b']) as sum", "ensemble:penalty(of='a', by='b') as fine")
    found = rewards(*entries, on_failure="least")
    got = ensembles.add(scores(failed=[("b", 0)], a=[0.5, 1.0], b=[0.9, 0.25], c=[0, 0]), found)
    np.testing.assert_allclose(got.by_name["sum"], [0.5 + 0.0, 1.25])
    np.testing.assert_allclose(got.by_name["fine"], [0.5 - 0.25, 0.75])
    assert not got.failed["sum"].any() and not np.isnan(got.reward_B).any()


# --- What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("ensemble:mean(of=['a'])", "'mean' is no form of an ensemble, which are sum, product"),
        ("ensemble:sum", "missing 1 required positional argument: 'of'"),
        ("ensemble:sum(of=['a', 'a'])", "each once"),
        ("ensemble:sum(of=['a'], weights=[1, 2])", "1 numbers, one for each"),
        ("ensemble:product(of=['a'], scale='step')", "unexpected keyword argument 'scale'"),
        ("ensemble:lower(of=['a'], k=-1)", "k = -1"),
        ("ensemble:minimum(of=['a'], scale={'b': (1, 2)})", "scale = {'b': (1, 2)}"),
        ("ensemble:gate(of='a', where='b')", "'at_least'"),
        ("ensemble:gate(of=['a'], where='b', at_least=1)", "of = [['a']] must name rewards"),
        ("ensemble:penalty(of='a', by='b', times=True)", "times = True must be a number"),
        ("ensemble:sum(of=['z'])", "names the member 'z', which is none of the rewards before it"),
    ],
)
def test_what_is_refused(entry, words):
    with pytest.raises(ValueError, match=r"rewards\.names") as error:
        rewards(entry)
    assert words in str(error.value)


def test_members_stand_before():
    names = ("ensemble:sum(of=['half'])", "odd_rewards:half")
    with pytest.raises(ValueError, match=r"member 'half'.*there are none"):
        ensembles.refuse(registry.load(names, (1.0, 1.0)))
