"""Layers as runs of a pattern, by hand, and a decoder whose layers alternate."""

from __future__ import annotations

import pytest

from grpo_jax.models import layer_runs
from grpo_jax.models.layer_runs import Place
from grpo_jax.structs import Layer

KINDS = {"f": Layer(), "s": Layer(window=4), "d": Layer(ffn="moe")}


def layers(text: str) -> tuple[Layer, ...]:
    return tuple(KINDS[letter] for letter in text)


@pytest.mark.parametrize(
    ("text", "runs"),
    [
        ("f", [("f", 1)]),
        ("ffff", [("f", 4)]),
        ("ffss", [("f", 2), ("s", 2)]),  # Qwen2: the later layers have a window
        ("sfsfsf", [("sf", 3)]),  # gpt-oss
        ("sssssf" * 4 + "ss", [("sssssf", 4), ("s", 2)]),  # Gemma 3 1B
        ("f" + "d" * 26, [("f", 1), ("d", 26)]),  # DeepSeek: dense first
        ("dddf" * 8, [("dddf", 8)]),  # Qwen3.5
        ("fs", [("fs", 1)]),
        ("fffsfs", [("f", 2), ("fs", 2)]),  # not three, though three are alike
    ],
)
def test_runs(text, runs):
    found = layer_runs.runs(layers(text))

    assert found == tuple((layers(pattern), count) for pattern, count in runs)
    assert sum((run.pattern * run.count for run in found), ()) == layers(text)


def test_where_each_layer_stands():
    """Two turns of two slots, then a run of one slot."""
    kinds = layers("sfsfdd")

    assert layer_runs.places(kinds) == (
        Place(0, 0, 0), Place(0, 1, 0), Place(0, 0, 1), Place(0, 1, 1), Place(1, 0, 0),
        Place(1, 0, 1),
    )  # fmt: skip
    tree = layer_runs.by_slot(kinds, lambda run, slot, members: members)
    assert tree == {"0": {"0": (0, 2), "1": (1, 3)}, "1": {"0": (4, 5)}}
    assert layer_runs.slot_of(tree, kinds, 0, 1) == (1, 3)


def test_layers_of_one_kind_are_one_stack():
    kinds = layers("fff")
    tree = layer_runs.by_slot(kinds, lambda run, slot, members: members)

    assert tree == (0, 1, 2)
    assert layer_runs.slot_of(tree, kinds, 0, 0) is tree
