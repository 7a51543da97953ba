"""Microbatches without padding: completions of several groups follow each other in one row.

A row holds its prompts, each once for its group, and then the completions' tokens without gaps. All
token-wise layers work on rows. Only attention needs to know which tokens belong together: for
attention, each prompt has several lanes of equal width, and each lane holds one or more
completions. Two integer arrays, made on the host from the completions' lengths, map tokens to
places. Entry c reads completion token c - 1 and predicts token c. The prompt predicts a
completion's first token, so a completion of n tokens takes n - 1 entries. If a row has as many
entries as its lanes have places, as with completions of similar length, entries and places are the
same and nothing moves. The shapes alone decide this. Where attention reads rows as they are
(`AttentionKernels.needs_lanes`), they have no lanes, W = 0.

`row_sizes.py` chooses the size of rows and assigns completions to them. Axes beside those of
`structs.py`:

    S data shards       B rows of a microbatch, one on each device of the shard
    X entries of a row  J prompts of a microbatch; of a row, those counted on its device
"""

from __future__ import annotations

import dataclasses

import numpy as np

from grpo_jax.learner.row_sizes import CompiledSizes, PackingProblem


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """Microbatches of each data shard.

    All have the same number of prompts on each device. A group with more tokens than a microbatch
    may hold is divided over several, each with the prompt and some of the completions, unless it
    must stay whole.
    """

    number: np.int32  # the first of M are filled; the others are empty
    groups_SMJ: np.ndarray  # int32: number of a prompt in the shard; -1: padding
    own_SMJG: np.ndarray  # bool: completions of that group that this microbatch has
    token_SMBX: np.ndarray  # int32: (j * G + g) * C + c, j counted on the device; -1: no token
    lane_SMJWT: np.ndarray  # int32: the entry of the row at this place; -1: none

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.groups_SMJ, self.own_SMJG, self.token_SMBX, self.lane_SMJWT


def pack(
    length_SPG: np.ndarray,
    groups_P: np.ndarray,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    at_once: int,
    devices: int = 1,
    multiple: int = 1,
    share_lanes: bool = True,
    whole: bool = False,
    in_lanes: bool = True,
    sizes: CompiledSizes | None = None,
) -> Microbatches:
    """Groups `groups_P` of each shard, packed in microbatches of at most `at_once` tokens.

    `at_once` limits a row, with its prompts padded to `prompt_tokens`; a single completion always
    fits. The row's size is then rounded up to a `multiple`. Without `share_lanes` each completion
    has its own lane. With `whole`, no group is divided: a row has room for the longest there may
    be. Without `in_lanes` rows have no lanes. `sizes` are the sizes that the run uses so far; None:
    a new run.
    """
    num_shards, _, group = length_SPG.shape
    work = PackingProblem(
        length_SPG - 1,
        groups_P,
        prompt_tokens,
        completion_tokens,
        at_once,
        devices,
        multiple,
        share_lanes,
        whole,
        in_lanes,
    )
    size, units_S, rows_S = (sizes or CompiledSizes()).fill(work)
    num_prompts, entries, num_lanes, width = size.prompts, size.entries, size.lanes, work.width
    is_plain = entries == num_prompts * num_lanes * width  # entries are places
    groups = np.full((num_shards, size.rows, devices, num_prompts), -1, np.int32)
    own = np.zeros((*groups.shape, group), bool)
    token = np.full((num_shards, size.rows, devices, entries), -1, np.int32)
    lane = np.full((*groups.shape, num_lanes, width), -1, np.int32)
    for s, shard_rows in enumerate(rows_S):
        for r, row in enumerate(shard_rows):
            n, d = divmod(r, devices)
            at = 0
            for j, i in enumerate(row):
                unit = units_S[s][i]
                entries_G = work.entries_SPG[s, unit.prompt]
                groups[s, n, d, j] = unit.prompt
                own[s, n, d, j, unit.completions] = True
                for k, completions in enumerate(work.lanes_of(entries_G, unit.completions)):
                    begin = at = (j * num_lanes + k) * width if is_plain else at
                    for g in completions:
                        more = int(entries_G[g])
                        first = (j * group + g) * completion_tokens + 1
                        token[s, n, d, at : at + more] = np.arange(first, first + more)
                        at += more
                    if in_lanes:
                        lane[s, n, d, j, k, : at - begin] = np.arange(begin, at)
    return Microbatches(
        np.int32(len(rows_S[0]) // devices),
        groups.reshape(num_shards, size.rows, -1),
        own.reshape(num_shards, size.rows, -1, group),
        token,
        lane.reshape(num_shards, size.rows, devices * num_prompts, num_lanes, width),
    )
