"""What stays fixed for a rollout: `Prepare`.

Advantages, and the log-probabilities of the reference and of the policy before its first update,
each computed only where the loss reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithm import advantages
from grpo_jax.devices import by_shard, compiling, transfer
from grpo_jax.learner import accumulate, logprobs, row_sizes, scoring
from grpo_jax.learner.row_sizes import Sizes
from grpo_jax.learner.scoring import Packed, Scorer
from grpo_jax.models import parameters
from grpo_jax.structs import Array, Experience, Params, Rollouts


def action_mask(length_PG: Array, stopped_PG: Array, tokens: int, mask_truncated: bool) -> Array:
    """True for tokens the policy chose and is trained on, its stop token included, [P, G, C]."""
    action_PGC = jnp.arange(tokens)[None, None] < length_PG[..., None]
    return action_PGC & stopped_PG[..., None] if mask_truncated else action_PGC


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Completions on the device, with log-probabilities [P, G, C] where the loss reads them."""

    rollouts: Rollouts
    order_P: np.ndarray | None  # in which the prompts stand; None: as they were given
    old_logp_PGC: Array | None
    ref_logp_PGC: Array | None


@dataclasses.dataclass(frozen=True)
class Prepare:
    """What stays fixed for a rollout: its advantages and log-probabilities, in two steps.

    Where there are several data shards the experience has the prompts in another order: within its
    minibatch a prompt goes where shards then have like much to compute.
    """

    scorer: Scorer
    with_old: bool  # the policy's log-probabilities before the first update
    num_minibatches: int
    fill: Callable  # program: log-probabilities of microbatches, filled in
    base: Callable  # program: the experience without them
    sizes: Sizes  # of packed rows, of `fill`; a run adds to them

    def log_probs(self, params: Params, ref_params: Params | None, rollouts: Rollouts) -> LogProbs:
        """Launches what needs no rewards. `ref_params` None: no KL term."""
        order_P = None
        if (shards := self.scorer.mesh.shape["data"]) > 1:
            length_PG = transfer.to_host(rollouts.length_PG)
            order_P = row_sizes.balance(length_PG, shards, self.num_minibatches)
            rollouts = transfer.reorder_rows(self.scorer.mesh, rollouts, order_P)
        old_logp_PGC = self._log_probs(params, rollouts) if self.with_old else None
        ref_logp_PGC = None if ref_params is None else self._log_probs(ref_params, rollouts)
        return LogProbs(rollouts, order_P, old_logp_PGC, ref_logp_PGC)

    def _log_probs(self, params: Params, rollouts: Rollouts) -> Array:
        everything = np.arange(self.scorer.groups_in_shard(rollouts))
        microbatches = self.scorer.microbatches(rollouts, everything, self.sizes)
        return self.fill(params, microbatches.number, rollouts, *microbatches.arrays)

    def __call__(self, given: LogProbs, reward_PG: Array) -> Experience:
        """The experience, once the rewards are known."""
        if given.order_P is not None:
            reward_PG = transfer.reorder_rows(self.scorer.mesh, reward_PG, given.order_P)
        return self.base(given.rollouts, reward_PG).replace(
            old_logp_PGC=given.old_logp_PGC, ref_logp_PGC=given.ref_logp_PGC
        )


def make_prepare(
    scorer: Scorer,
    *,
    scale_by: str,
    mask_truncated: bool,
    with_old: bool,
    num_minibatches: int = 1,
) -> Prepare:
    """The preparation of rollouts; nothing is compiled or allocated yet.

    `with_old`: the policy's log-probabilities before the first update are computed, by the scorer
    itself, since the rollout is updated on more than once or the loss weighs whole completions.
    """
    scorer = dataclasses.replace(scorer, scan_layers=True)  # nothing of a layer is kept

    def one(params, rollouts: Rollouts, logp_PGC: Array, groups_M: Array, *where: Array) -> Array:
        part = scoring.rows(scorer, rollouts, groups_M)
        packed = Packed.of(logp_PGC.shape[-1], groups_M, *where)
        hidden_DED = scorer.hidden(params, part, packed.layout)
        target_DE, head = packed.take(part.completion_PGC), scorer.head(params)
        logp_DE = scoring.row_by_row(
            scorer,
            lambda hidden, target: logprobs.token_logprobs(
                hidden, head, target, scorer.sampling, scorer.along
            )[0],
            hidden_DED,
            target_DE,
        )
        return packed.put(logp_PGC, logp_DE.reshape(target_DE.shape))

    @jax.named_scope("scoring")
    def fill_shard(params, number: Array, rollouts: Rollouts, *microbatches_1: Array) -> Array:
        params = parameters.cast_layers(params, scorer.dtype)
        start = jnp.zeros_like(rollouts.logp_PGC)
        step = lambda logp, *where: one(params, rollouts, logp, *where)  # noqa: E731
        return accumulate.through(number, step, start, microbatches_1)

    fill = jax.jit(
        by_shard.by_data_shard(scorer.mesh, compiling.exact(scorer.dtype, fill_shard), 2),
        compiler_options=compiling.options(scorer.mesh),
    )

    @jax.jit
    @jax.named_scope("scoring")
    def base(rollouts: Rollouts, reward_PG: Array) -> Experience:
        return Experience(
            rollouts=rollouts,
            advantage_PG=advantages.group_advantages(reward_PG, scale_by=scale_by),
            action_PGC=action_mask(
                rollouts.length_PG,
                rollouts.stopped_PG,
                rollouts.completion_PGC.shape[-1],
                mask_truncated,
            ),
            old_logp_PGC=None,
            ref_logp_PGC=None,
        )

    return Prepare(scorer, with_old, num_minibatches, fill, base, Sizes())
