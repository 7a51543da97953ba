"""The values that stay fixed while a rollout is learned from: `Prepare`.

They are the advantages, the log-probabilities of the reference and of the policy before its first
update, the tokens of highest entropy, and the values and returns of a critic. Each is computed only
if the loss or the advantage reads it. Others may be given, such as what a loss of preferences
reads.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.algorithm import advantages as advantages_lib
from grpo_jax.algorithm import distillation, preferences
from grpo_jax.algorithm import gae as gae_lib
from grpo_jax.algorithm.advantages import AdvantageOptions
from grpo_jax.algorithm.gae import GAE
from grpo_jax.algorithm.hybrids import Weigh, given_tokens
from grpo_jax.algorithm.token_selection import top_entropy
from grpo_jax.devices import by_shard, compiling, sharding, transfer
from grpo_jax.devices.compiling import Call
from grpo_jax.kernels.primitives import where
from grpo_jax.learner import accumulate, logprobs, row_sizes, scoring
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.scalars import Values
from grpo_jax.learner.scoring import Packed, Scorer
from grpo_jax.models import parameters
from grpo_jax.structs import Array, Experience, Params, Rollouts


def action_mask(length_PG: Array, stopped_PG: Array, tokens: int, mask_truncated: bool) -> Array:
    """True for tokens the policy chose and is trained on, its stop token included, [P, G, C]."""
    action_PGC = jnp.arange(tokens)[None, None] < length_PG[..., None]
    return action_PGC & stopped_PG[..., None] if mask_truncated else action_PGC


@dataclasses.dataclass(frozen=True)
class LogProbs:
    """Completions on the device, with the values [P, G, C] of their tokens that the loss reads."""

    rollouts: Rollouts
    order_P: np.ndarray | None  # order of the prompts; None: as they were given
    old_logp_PGC: Array | None
    ref_logp_PGC: Array | None
    entropy_PGC: Array | None  # of the policy; None: `Prepare.selects` is False
    value_PGC: Array | None = None  # of the critic; None: there is none
    teacher_logp_PGC: Array | None = None

    def in_order(self, rows: Array) -> np.ndarray:
        """Rows of the experience on the host, in the order in which the prompts were given."""
        rows = transfer.to_host(rows)
        return rows if self.order_P is None else rows[np.argsort(self.order_P)]


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Computes a rollout's advantages and log-probabilities, in two steps.

    With several data shards it reorders the prompts inside each minibatch, so that all shards have
    about equally much to compute.
    """

    scorer: Scorer
    options: AdvantageOptions
    with_old: bool  # the policy's log-probabilities before the first update
    num_minibatches: int
    selects: bool  # whether only tokens of high entropy carry the policy gradient
    # Program: log-probabilities of microbatches, filled in; if it `selects`, entropies too.
    score: Callable
    select: Callable  # program: the tokens of highest entropy
    advantages: Callable  # program: the experience without log-probabilities
    sizes: CompiledSizes  # packed row sizes of `score`; grows during a run
    values: Values | None = None  # of a critic; None: there is none
    # Programs: the teacher's log-probabilities; the advantages that it changes. None: no teacher.
    score_teacher: Callable | None = None
    teach: Callable | None = None
    teacher: Params | None = None  # its weights

    def log_probs(
        self,
        params: Params | None,
        ref_params: Params | None,
        rollouts: Rollouts,
        critic_params: Params | None = None,
    ) -> LogProbs:
        """Launches the scoring, which needs no rewards. `ref_params` None: no KL term.

        `params` None: nothing is scored by the policy. `critic_params`: of the critic, if there is
        one.
        """
        length_PG, order_P = rollouts.length_PG, None
        if (shards := self.scorer.mesh.shape["data"]) > 1:
            length_PG = transfer.to_host(length_PG)
            order_P = row_sizes.balance(length_PG, shards, self.num_minibatches)
            rollouts, length_PG = self._reordering(rollouts, order_P)(), length_PG[order_P]
        scored = self._scoring(params, ref_params, rollouts, length_PG, critic_params)
        found = {call.part: call() for call in scored}
        beside = found.get("critic"), found.get("teacher")
        if not self.selects:
            logp, ref_logp = found.get("policy"), found.get("reference")
            return LogProbs(rollouts, order_P, logp, ref_logp, None, *beside)
        (logp, entropy), (ref_logp, _) = found["policy"], found.get("reference", (None, None))
        return LogProbs(rollouts, order_P, logp, ref_logp, entropy, *beside)

    def __call__(
        self,
        given: LogProbs,
        reward: Array,
        greedy: Array | None = None,
        known_PG: Array | None = None,
        beside: Mapping[str, Array] = MappingProxyType({}),
    ) -> Experience:
        """The experience, once the rewards are known.

        `reward`: [P, G], or by function [P, G, R]; `greedy`: rewards of greedy completions, [P] or
        [P, R] (`advantages.advantages`). `known_PG`: False for completions that are left out, since
        their reward is unknown: none of their tokens is an action. None: all are known. `beside`:
        further fields of the experience, [P, ...].
        """
        rewards, beside = (reward, greedy, known_PG), dict(beside)
        if given.order_P is not None:
            reorder = lambda x: self._reordering(x, given.order_P)()  # noqa: E731
            rewards, beside = jax.tree.map(reorder, (rewards, beside))
        log_probs = given.old_logp_PGC, given.ref_logp_PGC
        reward, greedy, known_PG = rewards
        valued = self._valuing(given.rollouts, reward, greedy, log_probs, given.value_PGC, known_PG)
        experience = valued().replace(
            old_logp_PGC=given.old_logp_PGC, ref_logp_PGC=given.ref_logp_PGC, **beside
        )
        if self.teach is not None:
            log_probs = given.teacher_logp_PGC, given.old_logp_PGC
            advantage_PGC = self._teaching(experience.advantage, *log_probs)()
            experience = experience.replace(advantage=advantage_PGC, teacher_logp_PGC=log_probs[0])
        if not self.selects:
            return experience
        selected_PGC = self._selecting(given.entropy_PGC, experience.action_PGC)()
        return experience.replace(top_entropy_PGC=selected_PGC)

    def calls(
        self,
        params: Params,
        ref_params: Params | None,
        rollouts: Rollouts,
        length_PG: np.ndarray,
        critic_params: Params | None = None,
    ) -> list[Call]:
        """The programs of `log_probs` and `__call__` in their order, for rollouts by their shapes.

        `length_PG`: the lengths of the completions, which do not follow from the shapes.
        """
        rewards = self._reward_shapes(rollouts)
        scored = self._scoring(params, ref_params, rollouts, length_PG, critic_params)
        log_probs = rollouts.logp_PGC, rollouts.logp_PGC
        value_PGC = None if self.values is None else rollouts.logp_PGC
        valued = [self._valuing(rollouts, *rewards, log_probs, value_PGC)]
        if self.selects:
            (entropy_PGC,) = (call.result()[1] for call in scored if call.part == "policy")
            action_PGC = valued[0].result().action_PGC
            valued.append(self._selecting(entropy_PGC, action_PGC))
        if self.teach is not None:
            valued.append(self._teaching(valued[0].result().advantage, *log_probs))
        if self.scorer.mesh.shape["data"] == 1:
            return scored + valued
        order_P = np.arange(len(length_PG))
        orders = [self._reordering(x, order_P) for x in (rollouts, *rewards) if x is not None]
        return orders[:1] + scored + orders[1:] + valued

    def _reward_shapes(self, rollouts: Rollouts) -> tuple[Any, Any]:
        """Shapes of the rewards that the advantages read, and of those of greedy completions."""
        functions = (len(self.options.weights),) * self.options.reads_each_reward

        def shape(like: Any) -> jax.ShapeDtypeStruct:
            whole = (*like.shape, *functions)
            return jax.ShapeDtypeStruct(whole, np.float32, sharding=like.sharding)

        is_greedy = self.options.baseline == "greedy"
        return shape(rollouts.length_PG), shape(rollouts.prompt_length_P) if is_greedy else None

    def _scoring(
        self, params, ref_params, rollouts, length_PG: np.ndarray, critic_params
    ) -> list[Call]:
        valued = []
        if self.values is not None:
            valued = [self.values.call(critic_params, rollouts, length_PG, "critic")]
        read = {"policy": params} if self.with_old and params is not None else {}
        if ref_params is not None:
            read["reference"] = ref_params
        if self.score_teacher is not None:
            read["teacher"] = self.teacher
        if not read:
            return valued
        everything = np.arange(self.scorer.groups_in_shard(rollouts))
        packed = self.scorer.microbatches(
            rollouts.replace(length_PG=length_PG), everything, self.sizes
        )
        programs = {"teacher": self.score_teacher}
        return [
            Call(
                programs.get(part, self.score),
                (weights, packed.number, rollouts, *packed.arrays),
                part,
            )
            for part, weights in read.items()
        ] + valued

    def _reordering(self, rows: Any, order_P: np.ndarray) -> Call:
        return Call(transfer.reordering(self.scorer.mesh), (rows, order_P))

    def _valuing(
        self,
        rollouts: Rollouts,
        reward: Array,
        greedy: Array | None,
        log_probs: tuple[Array | None, Array | None],
        value_PGC: Array | None,
        known_PG: Array | None = None,
    ) -> Call:
        read = log_probs if self.options.reads_log_probs else None
        return Call(self.advantages, (rollouts, reward, greedy, read, value_PGC, known_PG))

    def _teaching(self, advantage_PG: Array, teacher_logp_PGC: Array, logp_PGC: Array) -> Call:
        return Call(self.teach, (advantage_PG, teacher_logp_PGC, logp_PGC))

    def _selecting(self, entropy_PGC: Array, action_PGC: Array) -> Call:
        return Call(self.select, (entropy_PGC, action_PGC))


def make_prepare(
    scorer: Scorer,
    options: AdvantageOptions,
    *,
    mask_truncated: bool,
    with_old: bool,
    num_minibatches: int = 1,
    top_entropy_share: float = 1.0,
    values: Values | None = None,
    gae: GAE | None = None,
    weigh: Weigh | None = None,
    of_teacher: Scorer | None = None,
    teacher_coef: float = 1.0,
) -> Prepare:
    """A `Prepare` of these options; nothing is compiled or allocated yet.

    `with_old`: the scorer computes the policy's log-probabilities before the first update. They are
    needed if a rollout has several updates, if the loss weighs whole completions, or if the KL is a
    part of the reward. With a `top_entropy_share` below 1 they are needed for the entropies that
    come with them. With the `values` of a critic the advantages are those of `gae`, and of
    `options` only the KL in the reward and the whitening over tokens are read. `weigh`: of a
    hybrid. `of_teacher`: the scorer of a teacher whose reward, times `teacher_coef`, is added to
    the advantages of tokens; its rows are those of `scorer`.
    """
    selects = top_entropy_share < 1
    assert with_old or not (options.reads_log_probs or selects or of_teacher)
    forward = lambda scorer: dataclasses.replace(scorer, scan_layers=True)  # noqa: E731
    scorer = forward(scorer)  # no backward pass: nothing to keep

    @jax.jit
    @jax.named_scope("scoring")
    def select(entropy_PGC: Array, action_PGC: Array) -> Array:
        return top_entropy(entropy_PGC, action_PGC, top_entropy_share)

    @jax.jit
    @jax.named_scope("scoring")
    def teach(advantage_PG: Array, teacher_logp_PGC: Array, logp_PGC: Array) -> Array:
        return distillation.with_reward(advantage_PG, teacher_coef, teacher_logp_PGC, logp_PGC)

    return Prepare(
        scorer,
        options,
        with_old,
        num_minibatches,
        selects,
        _make_score(scorer, with_entropy=selects),
        select,
        _make_advantages(options, gae, mask_truncated, weigh),
        CompiledSizes(),
        values,
        of_teacher and _make_score(forward(of_teacher), with_entropy=False),
        of_teacher and teach,
    )


def _make_advantages(
    options: AdvantageOptions, gae: GAE | None, mask_truncated: bool, weigh: Weigh | None
) -> Callable:
    """The program of the experience without log-probabilities."""

    @jax.jit
    @jax.named_scope("scoring")
    def advantages(
        rollouts: Rollouts,
        reward: Array,
        greedy: Array | None = None,
        log_probs: tuple[Array, Array] | None = None,
        value_PGC: Array | None = None,
        known_PG: Array | None = None,
    ) -> Experience:
        shape = rollouts.length_PG, rollouts.stopped_PG, rollouts.completion_PGC.shape[-1]
        action_PGC = action_mask(*shape, mask_truncated)
        if rollouts.chosen_PGC is not None:
            action_PGC &= rollouts.chosen_PGC
        if known_PG is not None:
            action_PGC &= known_PG[..., None] | given_tokens(rollouts, action_PGC)
        given = Experience(rollouts, reward, action_PGC, old_logp_PGC=None, ref_logp_PGC=None)
        if weigh is not None:
            given = weigh(given, advantages_lib.total(options, reward), known_PG)
            reward = weigh.hybrid.known(reward, rollouts, action_PGC)
            action_PGC &= ~given_tokens(rollouts, action_PGC)
        if value_PGC is not None:
            advantage_PGC, return_PGC = gae_lib.estimate(
                gae,
                reward,
                value_PGC,
                action_PGC,
                kl_coef=options.kl_coef if options.reads_log_probs else 0.0,
                log_probs=log_probs,
                whitens=options.whiten == "tokens",
            )
            valued = {"value_PGC": value_PGC, "return_PGC": return_PGC}
            return given.replace(advantage=advantage_PGC, **valued)
        advantage_PG = advantages_lib.advantages(
            options,
            reward,
            length_PG=rollouts.num_trained_PG,
            greedy=greedy,
            action_PGC=action_PGC,
            log_probs=log_probs,
        )
        return given.replace(advantage=advantage_PG)

    return advantages


def _make_score(scorer: Scorer, *, with_entropy: bool) -> Callable:
    """The program that scores microbatches: log-probabilities, or a pair of them and entropies."""

    def one(params, rollouts: Rollouts, filled: Any, groups_J: Array, *where: Array) -> Any:
        part = scoring.rows(scorer, rollouts, groups_J)
        packed = Packed.of(rollouts.logp_PGC.shape[-1], groups_J, *where)
        hidden_BED = scorer.hidden(params, part, packed.layout)
        target_BE, head = packed.take(part.completion_PGC), scorer.head(params)

        def of_rows(hidden, target):
            how = scorer.sampling, scorer.along, scorer.model.logit_cap
            found = logprobs.token_logprobs(hidden, head, target, *how)
            return found if with_entropy else found[0]

        found = scoring.row_by_row(scorer, of_rows, hidden_BED, target_BE)
        put = lambda x_PGC, x: packed.put(x_PGC, x.reshape(target_BE.shape))  # noqa: E731
        return jax.tree.map(put, filled, found)

    @jax.named_scope("scoring")
    def score(params, number: Array, rollouts: Rollouts, *microbatches_1: Array) -> Any:
        params = parameters.cast_layers(params, scorer.dtype)
        start = jnp.zeros_like(rollouts.logp_PGC)
        start = (start, start) if with_entropy else start
        step = lambda filled, *where: one(params, rollouts, filled, *where)  # noqa: E731
        return accumulate.through(number, step, start, microbatches_1)

    return jax.jit(
        by_shard.by_data_shard(scorer.mesh, compiling.exact(scorer.dtype, score), 2),
        compiler_options=compiling.options(scorer.mesh),
    )


@functools.cache
def divergence(mesh: Mesh) -> Callable:
    """The program of KTO's reference point, [P, G] alike everywhere.

    From mismatched completions, their log-probabilities [P, G, C], and the reference's sums [P, G].
    """

    @jax.jit
    @jax.named_scope("scoring")
    def reference_point(rollouts: Rollouts, logp_PGC: Array, ref_logp_PG: Array) -> Array:
        logp_PG = completion_sums(rollouts, logp_PGC)
        there_PG = rollouts.chosen_PGC.any(-1)
        point = preferences.reference_point(logp_PG - ref_logp_PG, there_PG)
        placed = sharding.sharding_of(mesh, ("rows", None), logp_PG.shape)
        return jax.lax.with_sharding_constraint(jnp.full_like(logp_PG, point), placed)

    return reference_point


def completion_sums(rollouts: Rollouts, logp_PGC: Array) -> Array:
    """Log-probabilities of completions whose tokens are chosen, float32 [P, G]."""
    return where(rollouts.chosen_PGC, logp_PGC, 0.0).sum(-1)
