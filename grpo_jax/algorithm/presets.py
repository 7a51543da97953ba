"""Objectives by the names that people use: each is a row of options, and nothing else.

A row holds the options that make the algorithm what its paper says; coefficients of KL and entropy,
and what a run trains on, stay the user's. docs/objectives.md has formulas, users and differences
from other libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

_GSPO = {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4}
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Shao et al. 2024, arXiv:2402.03300, equation 3
        "grpo": {"normalizer": "sequence", "scale_by": "std"},
        # Liu et al. 2025, arXiv:2503.20783
        "dr_grpo": {"normalizer": "constant", "scale_by": "none"},
        # Yu et al. 2025, arXiv:2503.14476, section 3; see prompts.drop_equal_groups too
        "dapo": {"normalizer": "token", "clip_high": 0.28, "scale_by": "std"},
        # The mean over the tokens of each update's own batch; TRL's name for it
        "bnpo": {"normalizer": "token", "scale_by": "std"},
        # Zheng et al. 2025, arXiv:2507.18071, equation 5; clips of section 5.1
        "gspo": {**_GSPO, "normalizer": "sequence", "scale_by": "std"},
        # MiniMax-M1, arXiv:2506.13585, equation 4; cap of ScaleRL, arXiv:2510.13786
        "cispo": {"surrogate": "cispo", "ratio_cap": 5.0, "normalizer": "token", "scale_by": "std"},
        # Gao et al. 2025, arXiv:2511.20347
        "sapo": {"surrogate": "sapo", "normalizer": "sequence", "scale_by": "std"},
        # arXiv:2602.05261
        "luspo": {**_GSPO, "normalizer": "sequence_sum", "scale_by": "std"},
        # arXiv:2602.10693
        "vespo": {"surrogate": "vespo", "normalizer": "token", "scale_by": "std"},
        # Zhao et al. 2025, arXiv:2507.20673, equation 4
        "gmpo": {
            "ratio": "geometric",
            "clip_low": 0.4,
            "clip_high": 0.4,
            "normalizer": "sequence",
            "scale_by": "std",
        },
        # Ahmadian et al. 2024, arXiv:2402.14740, equation 8
        "rloo": {
            "surrogate": "reinforce",
            "normalizer": "sequence_sum",
            "baseline": "leave_one_out",
            "scale_by": "none",
            "kl_in": "reward",
        },
        # Williams 1992, "Simple statistical gradient-following algorithms", equation 11
        "reinforce": {
            "surrogate": "reinforce",
            "normalizer": "sequence_sum",
            "baseline": "none",
            "scale_by": "none",
        },
        # Hu et al. 2025, arXiv:2501.03262, section 3
        "reinforce_pp": {
            "normalizer": "token",
            "baseline": "none",
            "scale_by": "none",
            "whiten": "tokens",
            "kl_in": "reward",
        },
        # Schulman et al. 2017, arXiv:1707.06347; KL at each token as Ziegler et al. 2019,
        # arXiv:1909.08593
        "ppo": {
            "normalizer": "token",
            "critic": True,
            "baseline": "none",
            "scale_by": "none",
            "whiten": "tokens",
            "kl_in": "reward",
        },
        # arXiv:2602.04879
        "dppo": {"surrogate": "tv_mask", "normalizer": "token", "scale_by": "std"},
        # arXiv:2602.02710
        "maxrl": {"surrogate": "reinforce", "normalizer": "sequence_sum", "scale_by": "mean"},
    }
)

# Losses of preferences (`preferences.py`): of pairs, of labelled completions, and those of pairs
# that label smoothing changes.
PAIRS = ("sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down", "orpo")
UNPAIRED = ("kto", "apo_zero_unpaired")
SMOOTHED = ("sigmoid", "robust")

# Options of `algorithm` that belong to the advantage.
ADVANTAGE_OPTIONS = ("scale_by", "baseline", "aggregate", "credit", "whiten", "kl_in", "critic")
