"""Every dense family against transformers, by the checks of `families.py`."""

from __future__ import annotations

import families
import pytest


@pytest.fixture(scope="module", params=families.CASES)
def pair(request, tmp_path_factory) -> families.Pair:
    return families.make(request.param, tmp_path_factory.mktemp("model"))


def test_logits_of_shared_prompts_equal_transformers(pair):
    assert families.logits_apart(pair) < 1e-4


def test_greedy_tokens_through_the_cache_equal_transformers(pair):
    assert families.greedy_equal(pair) == families.GREEDY


def test_an_export_is_what_was_read(pair, tmp_path):
    assert families.round_trip(pair, tmp_path) == ""


def test_no_key_may_have_any_value(pair):
    assert families.taken(pair.folder) == []
