"""Every dense family against transformers, by the checks of `families.py`.

Some are of a few families, which have all that differs between them; the program checks all.
"""

from __future__ import annotations

import families
import pytest

# Caps and four norms; two rotaries and layers of a period of six; norms after and yarn; factors;
# queries that grow; layers without positions.
DECODED = ("gemma2", "gemma3_text", "olmo3", "granite", "ministral3", "smollm3 windows")
PACKED = ("gemma2", "olmo3", "ministral3")


@pytest.fixture(scope="module", params=families.CASES)
def pair(request, tmp_path_factory) -> families.Pair:
    return families.make(request.param, tmp_path_factory.mktemp("model"))


def test_a_family_equals_transformers(pair, tmp_path):
    assert families.logits_apart(pair) < 1e-4
    assert families.round_trip(pair, tmp_path / "out") == ""
    assert families.taken(pair.folder) == []


@pytest.mark.parametrize("pair", DECODED, indirect=True)
def test_greedy_tokens_through_the_cache_equal_transformers(pair):
    assert families.greedy_equal(pair) == families.GREEDY


@pytest.mark.parametrize("pair", PACKED, indirect=True)
def test_packed_completions_are_scored_as_in_rows_of_their_own(pair):
    assert families.packed_apart(pair) < 2e-5
