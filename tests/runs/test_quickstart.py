"""The quickstart raises its accuracy on sums it never saw; it does not merely finish."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# Of its config, but for half of the steps, half of the held-out sums, asked once before and once
# after, and no samples beside the greedy answers.
SHORTER = ["sft.num_steps=800", "loop.num_steps=24", "evaluation.num_samples=0"]
SHORTER += ["evaluation.num_problems=256", "evaluation.every_steps=24"]
CONFIG = Path(__file__).resolve().parents[2] / "configs" / "quickstart.py"


@pytest.mark.slow
def test_the_quickstart_raises_held_out_accuracy(tmp_path, alone_optimized):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "grpo_jax.train", "--config", str(CONFIG)]
    command += ["--workdir", str(folder), *(f"--config.{option}" for option in SHORTER)]
    done = subprocess.run(command, env=alone_optimized, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy_before"] <= 0.5, summary
    assert summary["accuracy_after"] >= 0.9, summary
    assert summary["skipped_updates"] == 0, summary
