"""Over-sampling: of the groups that a draw has begun, those that finish first.

A few long completions hold a draw while most lanes idle. So more groups are begun than are needed,
and the draw ends once enough of them are finished. What finishes first is counted in decode steps,
which follow from the completions alone, and never by the clock: a draw that is repeated keeps the
same groups, and all processes agree. If the slots hold all completions at once, these are the
groups whose longest completion is the shortest, whatever the number of devices.

The groups that are kept have shorter completions than those of the policy are on average.
"""

from __future__ import annotations

import numpy as np

from grpo_jax.sampling.board import Drawn
from grpo_jax.sampling.decode import Decoder

_LEAST_STEPS = 4  # between two looks at what is finished; each costs a round trip to the host
_LOOKS = 64  # at completions of the full length


def steps_between(decoder: Decoder) -> int:
    """Decode steps between two looks: a multiple of those that the device takes at once."""
    least = max(_LEAST_STEPS, -(-decoder.max_tokens // _LOOKS))
    return -(-least // decoder.steps) * decoder.steps


class FirstGroups:
    """The first `wanted` of `num_prompts` groups to finish; the engine tells what has finished.

    Groups that finish between the same two looks count in the order of their longest completions,
    and if these are equal, of their numbers.
    """

    def __init__(self, wanted: int, num_prompts: int, group: int):
        self.wanted = wanted
        self.length_PG = np.zeros((num_prompts, group), np.int32)  # tokens drawn
        self._kept: list[int] = []
        self._missing_P = np.full(num_prompts, group)

    @property
    def is_met(self) -> bool:
        return len(self._kept) == self.wanted

    @property
    def kept(self) -> list[int]:
        """The numbers of the groups that are kept so far, in the order of the draw."""
        return sorted(self._kept)

    def keeps(self, p: int) -> bool:
        return p in self._kept

    def take(self, drawn: Drawn) -> None:
        """Notes finished completions; all that finished between two looks at once."""
        group = self.length_PG.shape[1]
        self.length_PG.flat[drawn.row_B] = drawn.length_B
        groups = np.unique(drawn.row_B // group)
        np.subtract.at(self._missing_P, drawn.row_B // group, 1)
        whole = [int(p) for p in groups if not self._missing_P[p]]
        whole.sort(key=lambda p: (self.length_PG[p].max(), p))
        self._kept += whole[: self.wanted - len(self._kept)]

    def cut(self, row_B: np.ndarray, length_B: np.ndarray) -> None:
        """Notes the tokens of completions that are given up."""
        self.length_PG.flat[row_B] = length_B
