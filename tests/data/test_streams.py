"""Streams of random numbers: no two uses share one, and the order of prompts is what it was."""

from __future__ import annotations

import itertools

import numpy as np

from grpo_jax.data import prompts, streams


def test_no_two_uses_share_a_stream():
    """NumPy fills up with zeros: [3, 1] is [3, 1, 0], and [3, 0] is [3]."""
    uses = list(itertools.product((0, 3), streams.PURPOSES, range(4)))
    first = {tuple(streams.stream(*use).integers(2**63, size=2)) for use in uses}
    assert len(first) == len(uses)


def test_the_order_of_an_epoch_is_what_it_was():
    """Runs that go on after an upgrade depend on it."""
    for epoch in range(3):
        index = prompts.prompt_indices(seed=3, step=epoch, num_problems=50, per_step=50)
        was = np.random.default_rng([3, epoch]).permutation(50)
        np.testing.assert_array_equal(index, was)
