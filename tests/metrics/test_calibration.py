"""How well probabilities hold: by hand, and the picture of it."""

from __future__ import annotations

import numpy as np
import pytest

from grpo_jax.metrics import calibration


def test_bins_by_hand():
    """Two pairs at a difference of log 3 (said 0.75), one of them right; one at -0 (said 0.5).

    Both orders: 0.75 holds in one of two, 0.25 in the other of two; 0.5 twice, in one of two.
    """
    found = calibration.bins(np.array([np.log(3), -np.log(3), 0.0]), number=4)
    assert found.count_K.tolist() == [0, 2, 2, 2]
    np.testing.assert_allclose(found.said_K[1:], [0.25, 0.5, 0.75])
    assert found.held_K[1:].tolist() == [0.5, 0.5, 0.5] and np.isnan(found.said_K[0])
    assert found.error == pytest.approx((2 * 0.25 + 0 + 2 * 0.25) / 6)


def test_preferences_by_the_model_are_calibrated():
    rng = np.random.default_rng(0)
    difference = rng.normal(0, 2, 40_000)
    right = rng.random(len(difference)) < 1 / (1 + np.exp(-difference))
    told = np.where(right, difference, -difference)
    assert calibration.bins(told).error < 0.01
    assert calibration.bins(3 * told).error > 0.05  # too sure


def test_the_picture_is_written(tmp_path):
    file = calibration.draw(np.array([0.3, 2.0, -1.0, 50.0]), tmp_path / "calibration.png")
    assert file.read_bytes()[:4] == b"\x89PNG"
