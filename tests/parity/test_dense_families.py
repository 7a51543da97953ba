"""Dense families against transformers, by the checks of `families.py`.

All that differs between families is in these cases; the program checks the others too.
"""

from __future__ import annotations

import families
import pytest

# Of these the frequencies or another case show the same (`test_frequencies.py`).
BY_PROGRAM = {"llama linear", "qwen2 yarn", "qwen3 proportional", "smollm3", "phi3"}
# Caps, four norms and a window; norms after and two rotaries; queries that grow; no positions.
DECODED = ("gemma2", "olmo3", "ministral3", "smollm3 windows")
PACKED = ("gemma2", "ministral3")


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory):
    """The pair of a case, made once for all tests."""
    made = {}

    def pair_of(case: str) -> families.Pair:
        if case not in made:
            made[case] = families.make(case, tmp_path_factory.mktemp("model"))
        return made[case]

    return pair_of


@pytest.mark.parametrize("case", [case for case in families.CASES if case not in BY_PROGRAM])
def test_a_family_equals_transformers(pair_of, case, tmp_path):
    pair = pair_of(case)
    assert families.logits_apart(pair) < 1e-4
    assert families.round_trip(pair, tmp_path / "out") == ""
    assert families.taken(pair.folder) == []


@pytest.mark.parametrize("case", DECODED)
def test_greedy_tokens_through_the_cache_equal_transformers(pair_of, case):
    assert families.greedy_equal(pair_of(case)) == families.GREEDY


@pytest.mark.parametrize("case", PACKED)
def test_packed_completions_are_scored_as_in_rows_of_their_own(pair_of, case):
    assert families.packed_apart(pair_of(case)) < 2e-5
