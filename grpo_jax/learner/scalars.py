"""Values of a model with a scalar head at the tokens of completions: of rewards, and of critics.

The value at a token is that of the state which predicts it: the state before the token is read. So
a critic's value of the state in which a token is chosen stands at that token. A reward model reads
the last token, too: its completions have one more token, a filler, at which their reward stands.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.devices import by_shard, compiling
from grpo_jax.devices.compiling import Call
from grpo_jax.learner import accumulate, scoring
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.scoring import Packed, Scorer
from grpo_jax.models import parameters
from grpo_jax.structs import Array, Params, Rollouts, pad_rows


@jax.named_scope("scalar_head")
def of_states(scorer: Scorer, params: Params, hidden_BED: Array) -> Array:
    """The scalar head's value of each state, float32 [B, E].

    The product is in float32 whatever the dtype of states and kernel: values of bfloat16 have three
    digits, and good answers that are close would tie.
    """
    kernel_D1 = by_shard.gathered(
        scorer.mesh, params["score"]["kernel"], ("embed", None), ()
    ).astype(jnp.float32)
    return jnp.einsum(
        "bed,d->be",
        hidden_BED.astype(jnp.float32),
        kernel_D1[:, 0],
        precision=jax.lax.Precision.HIGHEST,
    )


_LEAST = 8  # of a width of rows, in tokens


def as_rollouts(
    texts_PG: Sequence[Sequence[Sequence[int]]],
    pad_id: int | None,
    shards: int = 1,
    limits: tuple[int, int] | None = None,
) -> Rollouts:
    """Whole texts as groups of completions, each with a filler at which its reward stands.

    A group's texts must begin with the same token: what they begin with in common is computed once,
    as the group's prompt. The reward of a text is read at its last token that is not the pad token,
    as in transformers; the filler follows that. `chosen_PGC` marks the fillers. Groups of fillers
    that are not marked make the number of groups a multiple of `shards`.

    `limits`: the most tokens of a prompt and of a completion with its filler, which then say how
    wide the arrays are; None: as wide as the texts ask for. Either way there are few widths, since
    programs are compiled for each.
    """
    groups = [[without_end(text, pad_id) for text in texts] for texts in texts_PG]
    common_P = [_common(texts, limits) for texts in groups]
    group, more = len(groups[0]), -len(groups) % shards
    prompts = [texts[0][:n] for texts, n in zip(groups, common_P)] + [[0]] * more
    rows = [[*text[n:], 0] for texts, n in zip(groups, common_P) for text in texts]
    rows += [[0]] * (group * more)
    longest, most = max(map(len, prompts)), max(map(len, rows))
    width = scoring.cut_to(limits[0], longest) if limits else _width(longest)
    prompt_PQ, prompt_length_P = pad_rows(prompts, width)
    completion_BC, length_B = pad_rows(rows, limits[1] if limits else _width(most))
    is_filler_BC = np.arange(completion_BC.shape[1]) == length_B[:, None] - 1
    is_filler_BC[len(rows) - group * more :] = False
    by_group = lambda x: x.reshape(-1, group, *x.shape[1:])  # noqa: E731
    return Rollouts(
        prompt_PQ=prompt_PQ,
        prompt_length_P=prompt_length_P,
        completion_PGC=by_group(completion_BC),
        logp_PGC=by_group(np.zeros(completion_BC.shape, np.float32)),
        length_PG=by_group(length_B),
        stopped_PG=by_group(np.ones(length_B.shape, bool)),
        chosen_PGC=by_group(is_filler_BC),
    )


def without_end(text: Sequence[int], pad_id: int | None) -> list[int]:
    """A text up to its last token that is not the pad token; of pad tokens alone, the first."""
    last = next((i for i in reversed(range(len(text))) if text[i] != pad_id), 0)
    return list(text[: last + 1])


def _common(texts: Sequence[Sequence[int]], limits: tuple[int, int] | None) -> int:
    """The number of tokens that texts begin with in common, at least 1, at most the limit."""
    number = next((i for i, ids in enumerate(zip(*texts)) if len(set(ids)) > 1), None)
    number = min(map(len, texts)) if number is None else number
    if not number:
        raise ValueError(
            "Texts of one group begin with different tokens, so they have no prompt in common. "
            "Give them a prompt, or a tokenizer that begins texts with a token."
        )
    return min(number, limits[0]) if limits else number


def _width(longest: int) -> int:
    """The next of 8, 10, 12, 14, 16, 20, ... that is at least `longest`."""
    step = max(_LEAST, 1 << longest.bit_length() - 1) // 4
    return max(-(-longest // step) * step, _LEAST)


@dataclasses.dataclass(frozen=True)
class Values:
    """Computes the values at the tokens of completions, in packed rows."""

    scorer: Scorer
    score: Callable  # program: the values of microbatches, filled in
    sizes: CompiledSizes  # packed row sizes of `score`; grows during a run

    def call(self, params: Params, rollouts: Rollouts, length_PG: np.ndarray, part: str) -> Call:
        """The program's call: float32 [P, G, C], 0 past a completion's length.

        `length_PG`: the lengths on the host.
        """
        everything = np.arange(self.scorer.groups_in_shard(rollouts))
        packed = self.scorer.microbatches(
            rollouts.replace(length_PG=length_PG), everything, self.sizes
        )
        return Call(self.score, (params, packed.number, rollouts, *packed.arrays), part)


def make_values(scorer: Scorer) -> Values:
    """`Values` of a model with a scalar head; nothing is compiled or allocated yet."""
    assert scorer.model.head == "scalar"
    scorer = dataclasses.replace(scorer, scan_layers=True, whole=False)

    def one(params: Params, rollouts: Rollouts, filled_PGC: Array, groups_J: Array, *where: Array):
        part = scoring.rows(scorer, rollouts, groups_J)
        packed = Packed.of(rollouts.logp_PGC.shape[-1], groups_J, *where)
        hidden_BED = scorer.hidden(params, part, packed.layout)
        return packed.put(filled_PGC, of_states(scorer, params, hidden_BED))

    @jax.named_scope("scoring")
    def score_values(params: Params, number: Array, rollouts: Rollouts, *microbatches_1: Array):
        params = parameters.cast_layers(params, scorer.dtype)
        step = lambda filled, *where: one(params, rollouts, filled, *where)  # noqa: E731
        return accumulate.through(number, step, jnp.zeros_like(rollouts.logp_PGC), microbatches_1)

    program = jax.jit(
        by_shard.by_data_shard(scorer.mesh, compiling.exact(scorer.dtype, score_values), 2),
        compiler_options=compiling.options(scorer.mesh),
    )
    return Values(scorer, program, CompiledSizes())
