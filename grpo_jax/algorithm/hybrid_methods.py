"""Hybrids by the names that people use: each is a row, and nothing else.

`hybrids.py` computes with them; docs/hybrids.md has formulas, and differences from the papers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class Method:
    """What a hybrid consists of."""

    # "completion": a demonstration is one more completion of its group. "prefix": a part of it
    # begins every completion of the group. "": there are none.
    given: str
    nll: str  # tokens of the nll: "given" ones, or of drawn completions that "passed"; "": no nll
    nll_coef: float = 1.0  # the usual one
    # Given tokens also carry the policy loss -f(p) A, unclipped, and their reward counts in their
    # group. p is the token's probability, and A the advantage of the demonstration.
    is_reinforced: bool = False
    shapes: bool = False  # f(p) = p / (p + `Hybrid.shaping`); else p, the ratio to a sampler of 1
    weight: str = ""  # of a token's nll, fixed: "uncertainty", p (1 - p); "certainty", exp(-H)
    positive_coef: float = 0.0  # of the surrogate of drawn tokens with A > 0, times exp(H); 0: none
    mixes: bool = False  # (1 - mix) times the policy loss plus mix times the nll, by a schedule
    switches: bool = False  # a group has the nll alone if it passes too rarely, else none of it


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        # LUFFY: Yan et al. 2025, arXiv:2504.14945: mixed-policy GRPO with policy shaping
        "luffy": Method("completion", "", is_reinforced=True, shapes=True),
        # CHORD-mu and CHORD-phi: Zhang et al. 2025, arXiv:2508.11408
        "chord": Method("completion", "given", mixes=True),
        "chord_phi": Method("completion", "given", mixes=True, weight="uncertainty"),
        # SRFT: Fu et al. 2025, arXiv:2506.19767
        "srft": Method(
            "completion",
            "given",
            nll_coef=0.5,
            is_reinforced=True,
            weight="certainty",
            positive_coef=0.1,
        ),
        # HPT: Lv et al. 2025, arXiv:2509.04419
        "hpt": Method("completion", "given", switches=True),
        # UFT: Liu et al. 2025, arXiv:2505.16984
        "uft": Method("prefix", "given", nll_coef=0.001),
        # VAPO's positive-example loss: Yue et al. 2025, arXiv:2504.05118
        "positive_nll": Method("", "passed", nll_coef=0.1),
    }
)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A number that rises in a line, falls along half a cosine, and stays; by the step, from 0."""

    peak: float
    valley: float
    warmup_steps: int = 0
    decay_steps: int = 0
    at_end: float | None = None  # after the decay; None: the valley
    offset: int = 0  # steps by which the decay is ahead

    def at(self, step: int) -> float:
        """The value of the updates of a step.

        That of CHORD's mu is as its authors' code has it, and that of UFT's hints as its paper.
        """
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        done = step - self.warmup_steps
        if done >= self.decay_steps:
            return self.valley if self.at_end is None else self.at_end
        cosine = (1 + math.cos(math.pi * (done + self.offset) / self.decay_steps)) / 2
        return self.valley + (self.peak - self.valley) * cosine
