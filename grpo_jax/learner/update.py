"""One optimizer update on a minibatch: `Update`.

One program goes through the packed microbatches; gradients are summed, then divided once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from grpo_jax.algorithm.components import LossComponent
from grpo_jax.devices import compiling, transfer
from grpo_jax.devices.compiling import Call
from grpo_jax.kernels.primitives import where
from grpo_jax.learner import accumulate, logprobs, scalars, scoring, train_state
from grpo_jax.learner.accumulate import Carry
from grpo_jax.learner.logprobs import Teacher
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.learner.scoring import Packed, Scorer
from grpo_jax.models.lora import Weights
from grpo_jax.structs import Array, Experience, Params, TrainState


def _loss_sums(
    weights: Weights,
    scorer: Scorer,
    component: LossComponent,
    part: Experience,
    packed: Packed,
    of_teacher: Scorer | None = None,
):
    """Summed loss of one microbatch, and (sums, maxima) of its diagnostics."""
    params = weights.whole(scorer.model)
    hidden_BED = scorer.hidden(params, part.rollouts, packed.layout)
    if scorer.model.head == "scalar":
        values = (scalars.of_states(scorer, params, hidden_BED),)
        total, *of_tokens, action = _of_completions(component, part, packed, values)
    else:
        of_microbatch = _by_completion if component.needs_completions else _by_token
        found = scorer, component, part, packed, hidden_BED, scorer.head(params)
        if of_teacher is not None:
            found = *found, _teacher(weights, of_teacher, component, part, packed)
        total, *of_tokens, action = of_microbatch(*found)
    sums, maxima = component.diagnostics(*of_tokens, action)
    sums |= {"loss": total, "tokens": action.sum().astype(jnp.float32)}
    return total, (sums, maxima)


def _teacher(
    weights: Weights,
    of_teacher: Scorer,
    component: LossComponent,
    part: Experience,
    packed: Packed,
) -> Teacher:
    """The teacher at the predictions of a microbatch, whose rows are those of the policy."""
    hidden_BED = of_teacher.hidden(weights.teacher, part.rollouts, packed.layout)
    head_DV = of_teacher.head(weights.teacher)
    return Teacher(hidden_BED, head_DV, component.beta, of_teacher.model.logit_cap)


def _by_token(
    scorer: Scorer,
    component: LossComponent,
    part: Experience,
    packed: Packed,
    hidden_BED: Array,
    head_DV: Array,
    teacher: Teacher | None = None,
) -> tuple[Any, ...]:
    """The summed loss, and what `diagnostics` reads, by prediction: one sweep of the vocabulary."""
    terms = component.terms(part, packed.take, packed.take_of_completion)
    weight_PGC, _ = component.weights(part.action_PGC)
    weight_BE = where(packed.there_BE, packed.take(weight_PGC), 0.0)
    action_BE = packed.take(part.action_PGC) & packed.there_BE

    def loss(hidden, target, weight, terms, *of_teacher):
        how = component.loss, scorer.sampling, scorer.along, scorer.model.logit_cap
        beside = None if teacher is None else teacher.replace(hidden_BTD=of_teacher[0])
        rows = hidden, head_DV, target, weight, terms
        return logprobs.loss(*how, *rows, beside, component.reads_best)

    target_BE = packed.take(part.rollouts.completion_PGC)
    beside = () if teacher is None else (teacher.hidden_BTD,)
    total, *found = scoring.row_by_row(
        scorer, loss, hidden_BED, target_BE, weight_BE, terms, *beside
    )
    return total.sum(), *(x.reshape(weight_BE.shape) for x in found), terms, action_BE


def _by_completion(
    scorer: Scorer,
    component: LossComponent,
    part: Experience,
    packed: Packed,
    hidden_BED: Array,
    head_DV: Array,
) -> tuple[Array, Array, Array, Any, Array]:
    """The same by completion and token, of a loss that reads whole completions."""

    def both(hidden, target):
        how = component.reads_entropy(part), scorer.sampling, scorer.along, scorer.model.logit_cap
        return logprobs.differentiable(*how, hidden, head_DV, target)

    found = scoring.row_by_row(scorer, both, hidden_BED, packed.take(part.rollouts.completion_PGC))
    return _of_completions(component, part, packed, found)


def _of_completions(
    component: LossComponent, part: Experience, packed: Packed, found: tuple[Array, ...]
) -> tuple[Any, ...]:
    """The summed loss, and what `diagnostics` reads, by completion and token.

    `found`: what the model gives by prediction: log-probabilities and entropies, or values.
    """
    place = lambda x: packed.by_completion(  # noqa: E731
        x.reshape(packed.there_BE.shape), part.action_PGC
    )
    action_PGC = part.action_PGC & place(packed.there_BE)  # others are in another microbatch
    take = lambda x: where(action_PGC, x, jnp.zeros((), x.dtype))  # noqa: E731
    found_PGC = [take(place(x)) for x in found]
    terms = component.terms(part, take, lambda x_PG: take(x_PG[..., None]))
    weight, _ = component.weights(action_PGC)
    loss = component.loss(*found_PGC, terms)
    weighed = weight * where(weight != 0, loss, 0.0)
    return weighed.sum(), *found_PGC, terms, action_PGC


class Launched(NamedTuple):
    """An update of which all but the optimizer's step is launched."""

    carry: Carry  # holds the gradients
    step: Callable[[], tuple[TrainState, dict[str, Array]]]  # donates the state


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer update on a minibatch; donates the given state.

    Minibatch i of n holds prompts i, i + n, ... of the experience. With `offload` the optimizer's
    state is in the host's memory, except during the optimizer's step.
    """

    scorer: Scorer
    component: LossComponent
    num_minibatches: int
    offload: bool
    zero_gradient: Callable[[], Carry]  # program: a carry of zeros
    gradient: Callable[..., Carry]  # program: adds microbatches
    optimizer_step: Callable[..., tuple[TrainState, dict[str, Array]]]
    sizes: CompiledSizes  # packed row sizes of `gradient`; grows during a run
    compiled: set[tuple[int, ...]]  # shapes for which `optimizer_step` is compiled
    teacher: Params | None = None  # weights of the teacher; None: the loss reads none

    def __call__(
        self,
        state: TrainState,
        experience: Experience,
        index: int,
        before_donating: Callable[[Carry], None] = lambda carry: None,
        frozen: Params | None = None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after the update on minibatch `index`, and metrics.

        `before_donating(carry)` is called when all but the optimizer's step is launched; `carry`
        holds the gradients. The state stays valid until it returns. `frozen`: the parameters that
        are not trained, if adapters are. Metrics are float32 scalars by their logged names, and
        `skipped`, True if the update was refused.
        """
        launched = self.launched(state, experience, index, frozen)
        before_donating(launched.carry)
        return launched.step()

    def launched(
        self,
        state: TrainState,
        experience: Experience,
        index: int,
        frozen: Params | None = None,
    ) -> Launched:
        """The update on minibatch `index`, up to the optimizer's step."""
        length_PG, none = experience.rollouts.length_PG, self.zero_gradient()
        weights = Weights(state.params, frozen, self.teacher)
        carry = self._adding(weights, none, experience, length_PG, index)()
        if self.offload:  # a copy: the caller's stays in place
            state = state.replace(opt_state=transfer.to_device_memory(state.opt_state))
        step = self._step(state, carry, experience, index)
        if (shape := experience.action_PGC.shape) not in self.compiled:
            step.lower().compile()  # before donating: slow, and may be interrupted
            self.compiled.add(shape)

        def finish() -> tuple[TrainState, dict[str, Array]]:
            state, metrics = step()
            if self.offload:
                state = state.replace(opt_state=transfer.to_host_memory(state.opt_state))
            return state, metrics

        return Launched(carry, finish)

    def calls(
        self,
        state: TrainState,
        experience: Experience,
        length_PG: np.ndarray,
        frozen: Params | None = None,
    ) -> list[Call]:
        """The programs of an update in their order, for an experience by its shapes.

        `length_PG`: the completions' lengths, which do not follow from shapes. `state` is on the
        devices.
        """
        zero = Call(self.zero_gradient, ())
        carry = zero.result()
        weights = Weights(state.params, frozen, self.teacher)
        adding = self._adding(weights, carry, experience, length_PG, 0)
        return [zero, adding, self._step(state, carry, experience, 0)]

    def _adding(
        self,
        weights: Weights,
        carry: Carry,
        experience: Experience,
        length_PG: np.ndarray,
        index: int,
    ) -> Call:
        rollouts = experience.rollouts
        groups_P = np.arange(self.scorer.groups_in_shard(rollouts))[index :: self.num_minibatches]
        packed = self.scorer.microbatches(
            rollouts.replace(length_PG=length_PG), groups_P, self.sizes
        )
        return Call(self.gradient, (weights, packed.number, carry, experience, *packed.arrays))

    def _step(self, state: TrainState, carry: Carry, experience: Experience, index: int) -> Call:
        args = state, carry, experience.action_PGC, np.int32(index)
        return Call(self.optimizer_step, args)


def make_update(
    scorer: Scorer,
    component: LossComponent,
    optimizer: optax.GradientTransformation,
    *,
    num_minibatches: int,
    offload: bool = False,
    bounds: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    of_teacher: Scorer | None = None,
) -> Update:
    """The update that minimizes a component; nothing is compiled or allocated yet.

    It refuses an update that is not finite, or with a metric outside its `bounds`: (lowest,
    highest) by name. `of_teacher`: the teacher's scorer, for a component that compares with one; it
    has the rows of `scorer`.
    """
    like = train_state.state_like(scorer.model, scorer.mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def loss_sums(weights, experience: Experience, groups_J: Array, *where: Array):
        packed = Packed.of(experience.action_PGC.shape[-1], groups_J, *where)
        part = scoring.rows(scorer, experience, groups_J)
        return _loss_sums(weights, scorer, component, part, packed, of_teacher)

    def through(
        weights, number: Array, carry: Carry, experience: Experience, *microbatches_1: Array
    ) -> Carry:
        def step(carry, *where):
            return accumulate.add_gradient(loss_sums, weights, carry, experience, *where)

        return accumulate.through(number, step, carry, microbatches_1)

    zero_gradient, gradient = accumulate.make_accumulate(
        scorer, through, sums=(*component.sums, "loss", "tokens"), maxima=component.maxima
    )

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiling.options(scorer.mesh),
    )
    @jax.named_scope("update")
    def optimizer_step(state: TrainState, carry: Carry, action_PGC: Array, index: Array):
        grads, sums, maxima = accumulate.reduce_shards(scorer, carry)
        _, group, tokens = action_PGC.shape
        of_index_PGC = action_PGC.reshape(-1, num_minibatches, group, tokens)[:, index]
        count = jnp.maximum(component.weights(of_index_PGC)[1], 1.0)
        loss = sums.pop("loss") / count
        grads = jax.tree.map(lambda g: g / count, grads)
        means = component.means(sums)
        outside = [(means[n] < low) | (means[n] > high) for n, (low, high) in bounds.items()]
        wanted = ~functools.reduce(jnp.logical_or, outside, jnp.bool_(False))
        state, metrics = accumulate.apply_gradient(state, optimizer, grads, loss, wanted)
        return state, metrics | means | maxima | {component.metric: loss}

    return Update(
        scorer,
        component,
        num_minibatches,
        offload,
        zero_gradient,
        gradient,
        optimizer_step,
        CompiledSizes(),
        set(),
    )
