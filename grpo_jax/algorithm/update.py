"""From rewarded rollouts to new parameters: two jitted programs.

`Prepare` computes what stays fixed for a rollout: advantages, and the log-probabilities of the
reference and of the policy before its first update, each only where the loss reads it. `Update` is
one optimizer update on a minibatch. Both go through packed microbatches in one
program; gradients are summed and divided once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from grpo_jax import compiling, sharding
from grpo_jax.algorithm import advantages, logprobs, losses, packing, rows
from grpo_jax.models import attention, transformer
from grpo_jax.structs import (
    Array,
    Experience,
    ModelConfig,
    Params,
    Rollouts,
    Sampling,
    TrainState,
)

# Tokens of a microbatch on a device, where the config does not say: enough for full speed, so few
# that what the backward pass keeps of them stays in the caches of a CPU.
_TOKENS_AT_ONCE = 8192
_TOKENS_AT_ONCE_ON_CPU = 1536


def usual_tokens(mesh: Mesh) -> int:
    """Tokens of a row of a microbatch, where nobody says how many."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return mesh.shape["sequence"] * (_TOKENS_AT_ONCE_ON_CPU if on_cpu else _TOKENS_AT_ONCE)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """How the policy's network is run over given completions."""

    model: ModelConfig
    mesh: Mesh
    sampling: Sampling
    dtype: Any = jnp.float32  # of activations
    remat: str = "dots"  # as in `config.model.remat`
    scan_layers: bool = True
    microbatch: int = 0  # groups at once, more where completions are short; 0: by their tokens
    kernels: transformer.Kernels = attention  # compute the attention
    tokens: int = 0  # of a row of a microbatch, where that is 0; 0: the usual number

    def microbatches(
        self, rollouts: Rollouts, groups_P: np.ndarray, sizes: rows.Sizes | None = None
    ) -> packing.Microbatches:
        """Some groups of each data shard in microbatches of about equally many tokens.

        `sizes`: of the program that they are for.
        """
        prompt_tokens, (_, group, tokens) = rollouts.prompt_PQ.shape[1], rollouts.logp_PGC.shape
        shards, devices = self.mesh.shape["data"], self.mesh.shape["fsdp"] * self.parts
        sequence = self.mesh.shape["sequence"]
        whole = prompt_tokens + group * max(tokens - 1, 1)
        tokens_at_once = self.tokens or usual_tokens(self.mesh)
        return packing.pack(
            sharding.to_host(rollouts.length_PG).reshape(shards, -1, group),
            groups_P,
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            at_once=self.microbatch * whole // (shards * devices) or tokens_at_once,
            devices=devices,
            multiple=sequence,
            share_lanes=self.kernels.shares_lanes,
            sizes=sizes,
        )

    @property
    def parts(self) -> int:
        """Rows of attention to one of the MLP and the vocabulary."""
        return sharding.attention_parts(self.mesh, self.model.num_kv_heads)

    @property
    def row_axis(self) -> str:
        return sharding.row_axis(self.mesh, self.model.num_kv_heads)

    @property
    def apart(self) -> transformer.ByRow | None:
        """How the devices that share the MLP have rows of attention each; None: they share heads.

        XLA would send activations in place of the weights, which it is therefore told to gather.
        """
        if self.parts == 1:
            return None
        gather = functools.partial(sharding.gathered, self.mesh, split=("mlp", "vocab"))
        return transformer.ByRow(self.row_axis, gather)

    def rows_of_vocabulary(self, x: Array) -> Array:
        """Values by row of attention [D, E, ...], those that share the head one after another."""
        if self.parts == 1:
            return x
        axes = ("shard_rows",) + (None,) * (x.ndim - 1)
        return self.place(x, axes).reshape(-1, self.parts * x.shape[1], *x.shape[2:])

    def place(self, x: Array, axes: tuple[str | None, ...]) -> Array:
        return sharding.place_within_shard(self.mesh, x, axes)

    @property
    def along(self) -> logprobs.Along:
        return logprobs.Along(self.mesh.shape["sequence"], self.place)

    def groups_in_shard(self, rollouts: Rollouts) -> int:
        return len(rollouts.length_PG) // self.mesh.shape["data"]

    def hidden(
        self, params: Params, rollouts: Rollouts, layout: tuple[Array, Array] | None = None
    ) -> Array:
        """The hidden states that predict completion tokens, as `transformer.score` orders them.

        Without a layout as rows, [P * G, C, D].
        """
        hidden = transformer.score(
            params,
            self.model,
            rollouts.prompt_PQ,
            rollouts.prompt_length_P,
            rollouts.completion_PGC,
            layout,
            dtype=self.dtype,
            remat=self.remat,
            scan=self.scan_layers,
            place=self.place,
            apart=self.apart,
            kernels=self.kernels,
        )
        return hidden if layout is not None else hidden.reshape(-1, *hidden.shape[2:])

    def head(self, params: Params) -> Array:
        """The LM head [D, V], gathered once for all chunks of the vocabulary's sweep."""
        head_DV = transformer.head_kernel(params)
        return sharding.gathered(self.mesh, head_DV, ("embed", "vocab"), ("vocab",))


@dataclasses.dataclass(frozen=True)
class _Packed:
    """One microbatch of a data shard: whose tokens its rows' predictions [D, E] are.

    E = M * G + X, ordered as `transformer.score` has them, M counted on one device.
    """

    groups_DM: Array
    index_DE: Array  # int32: (m * G + g) * C + c; 0 where there is none
    there_DE: Array  # bool
    layout: tuple[Array, Array]  # for the network
    tokens: int  # C

    @staticmethod
    def of(tokens: int, groups_M: Array, own_MG: Array, token_DX: Array, lane_MLT: Array):
        own_DF = own_MG.reshape(len(token_DX), -1)  # each completion's first token
        first_DF = jnp.broadcast_to(jnp.arange(own_DF.shape[1]) * tokens, own_DF.shape)
        return _Packed(
            groups_M.reshape(len(token_DX), -1),
            jnp.maximum(jnp.concatenate([first_DF, token_DX], axis=1), 0),
            jnp.concatenate([own_DF, token_DX >= 0], axis=1),
            (token_DX, lane_MLT),
            tokens,
        )

    def take(self, x_MGC: Array) -> Array:
        """Values by completion and token at the predictions; some value where there is none."""
        flat = x_MGC.reshape(self.index_DE.shape[0], -1)
        return jnp.take_along_axis(flat, self.index_DE, axis=1)

    def take_of_completion(self, x_MG: Array) -> Array:
        """Values by completion at its predictions."""
        flat = x_MG.reshape(self.index_DE.shape[0], -1)
        return jnp.take_along_axis(flat, self.index_DE // self.tokens, axis=1)

    def put(self, x_PGC: Array, value_DE: Array) -> Array:
        """The shard's values with those of the predictions in their places."""
        per_group = x_PGC[0].size
        group_DE = jnp.take_along_axis(self.groups_DM, self.index_DE // per_group, axis=1)
        place_DE = group_DE * per_group + self.index_DE % per_group
        place_DE = jnp.where(self.there_DE, place_DE, x_PGC.size)  # past the end: dropped
        return x_PGC.reshape(-1).at[place_DE].set(value_DE, mode="drop").reshape(x_PGC.shape)


def action_mask(length_PG: Array, stopped_PG: Array, tokens: int, mask_truncated: bool) -> Array:
    """True for tokens the policy chose and is trained on, its stop token included, [P, G, C]."""
    action_PGC = jnp.arange(tokens)[None, None] < length_PG[..., None]
    return action_PGC & stopped_PG[..., None] if mask_truncated else action_PGC


def cut_to(limit: int, longest: int) -> int:
    """Tokens to which completions are cut before they are scored, in quarters of the limit.

    Few lengths: a program is compiled once for each.
    """
    quarter = -(-limit // 4)
    return min(limit, -(-longest // quarter) * quarter)


def _rows(scorer: Scorer, tree: Any, groups_M: Array) -> Any:
    """Some groups of a data shard's arrays [P, ...], over its devices by row; any group for -1."""
    groups_M = jnp.maximum(groups_M, 0)
    part = jax.tree.map(lambda x: x[groups_M], tree)
    return sharding.split_within_shard(scorer.mesh, part, scorer.row_axis)


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
    sizes: rows.Sizes  # of packed rows, of `fill`; a run adds to them

    def log_probs(self, params: Params, ref_params: Params | None, rollouts: Rollouts) -> LogProbs:
        """Launches what needs no rewards. `ref_params` None: no KL term."""
        order_P = None
        if (shards := self.scorer.mesh.shape["data"]) > 1:
            length_PG = sharding.to_host(rollouts.length_PG)
            order_P = rows.balance(length_PG, shards, self.num_minibatches)
            rollouts = sharding.reorder_rows(self.scorer.mesh, rollouts, order_P)
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
            reward_PG = sharding.reorder_rows(self.scorer.mesh, reward_PG, given.order_P)
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
        part = _rows(scorer, rollouts, groups_M)
        packed = _Packed.of(logp_PGC.shape[-1], groups_M, *where)
        hidden_DED = scorer.hidden(params, part, packed.layout)
        target_DE, head = packed.take(part.completion_PGC), scorer.head(params)
        logp_DE = _row_by_row(
            scorer,
            lambda hidden, target: logprobs.score(
                hidden, head, target, scorer.sampling, scorer.along
            )[0],
            hidden_DED,
            target_DE,
        )
        return packed.put(logp_PGC, logp_DE.reshape(target_DE.shape))

    @jax.named_scope("scoring")
    def fill_shard(params, number: Array, rollouts: Rollouts, *microbatches_1: Array) -> Array:
        params = transformer.with_layers_in(params, scorer.dtype)
        start = jnp.zeros_like(rollouts.logp_PGC)
        step = lambda logp, *where: one(params, rollouts, logp, *where)  # noqa: E731
        return _through(number, step, start, microbatches_1)

    fill = jax.jit(
        sharding.by_data_shard(scorer.mesh, compiling.exact(scorer.dtype, fill_shard), 2),
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

    return Prepare(scorer, with_old, num_minibatches, fill, base, rows.Sizes())


def _through(number: Array, step: Callable, carry: Any, microbatches_1: tuple[Array, ...]) -> Any:
    """`step(carry, *microbatch)` over so many of one data shard's microbatches.

    How many is no part of what is compiled: an update may have more than the last.
    """

    def nth(n: Array, carry: Any) -> Any:
        of = lambda x: jax.lax.dynamic_index_in_dim(x[0], n, keepdims=False)  # noqa: E731
        return step(carry, *map(of, microbatches_1))

    return jax.lax.fori_loop(0, number, nth, carry)


def _row_by_row(scorer: Scorer, f: Callable, *rows: Any) -> Any:
    """`f` of the row of each device by itself; its results may have one more leading axis.

    So what `f` sums over the chunks of its row, the head's gradient above all, is summed where it
    is, and over devices once. A row that several devices share goes with the others.
    """
    rows = jax.tree.map(scorer.rows_of_vocabulary, rows)
    if len(rows[0]) == 1 or scorer.mesh.shape["sequence"] > 1:
        return f(*rows)
    return jax.vmap(lambda *row: f(*jax.tree.map(lambda x: x[None], row)))(*rows)


def _loss_sums(
    params: Params, scorer: Scorer, objective: losses.Objective, part: Experience, packed: _Packed
):
    """Summed loss of one microbatch, and (sums, maxima) of what explains it."""
    rollouts, action_PGC = part.rollouts, part.action_PGC
    take = lambda x: None if x is None else packed.take(x)  # noqa: E731
    terms = {
        "advantage": packed.take_of_completion(part.advantage_PG),
        "old_logp": take(part.old_logp_PGC),
        "ref_logp": take(part.ref_logp_PGC),
        "sampler_logp": take(rollouts.logp_PGC),
        "sequence_log_ratio": None,
    }
    if objective.sums_sequences:
        log_ratio_PG = losses.sequence_log_ratio(part.old_logp_PGC, rollouts.logp_PGC, action_PGC)
        terms["sequence_log_ratio"] = packed.take_of_completion(log_ratio_PG)
    weight_BC, _ = losses.weights(action_PGC.reshape(-1, packed.tokens), objective)
    weight_DE = jnp.where(packed.there_DE, take(weight_BC.reshape(action_PGC.shape)), 0.0)
    action_DE = take(action_PGC) & packed.there_DE
    head = scorer.head(params)

    def loss(hidden, target, weight, terms):
        token_loss = functools.partial(losses.token_loss, objective)
        return logprobs.loss(
            token_loss, scorer.sampling, scorer.along, hidden, head, target, weight, terms
        )

    hidden_DED = scorer.hidden(params, rollouts, packed.layout)
    total, logp_DE, entropy_DE = _row_by_row(
        scorer, loss, hidden_DED, take(rollouts.completion_PGC), weight_DE, terms
    )
    total, logp_DE, entropy_DE = (
        total.sum(),
        logp_DE.reshape(weight_DE.shape),
        entropy_DE.reshape(weight_DE.shape),
    )
    sums, maxima = losses.diagnostics(objective, logp_DE, entropy_DE, terms, action_DE)
    sums |= {"loss": total, "tokens": action_DE.sum().astype(jnp.float32)}
    return total, (sums, maxima)


# Gradient sums in float32, metric sums, metric maxima; inside a program for microbatches those of
# one data shard, between programs [shards, ...]: the shards meet once, at the end of an update.
Carry = tuple[Params, dict, dict]


def add_gradient(loss_sums, params: Params, carry: Carry, *part: Any) -> Carry:
    """The carry with one microbatch more; `loss_sums(params, *part) -> (total, (sums, maxima))`."""
    grads, sums, maxima = carry
    (_, (new_sums, new_maxima)), new_grads = jax.value_and_grad(loss_sums, has_aux=True)(
        params, *part
    )
    grads = jax.tree.map(lambda g, n: g + n.astype(jnp.float32), grads, new_grads)
    sums = jax.tree.map(jnp.add, sums, new_sums)
    return grads, sums, jax.tree.map(jnp.maximum, maxima, new_maxima)


def over_shards(scorer: Scorer, carry: Carry) -> Carry:
    """The carries of all data shards, [shards, ...], as one; gradients lie as moments do."""
    grads, sums, maxima = carry
    grads, sums = jax.tree.map(lambda x: x.sum(0), (grads, sums))
    grads = jax.lax.with_sharding_constraint(grads, _spread_shardings(scorer.model, scorer.mesh))
    return grads, sums, jax.tree.map(lambda x: x.max(0), maxima)


def make_adding(
    scorer: Scorer, through: Callable[..., Carry], *, sums: Iterable[str], maxima: Iterable[str]
) -> tuple[Callable[[], Carry], Callable[..., Carry]]:
    """Two programs: `empty() -> carry`, and `add(params, number, carry, *rows) -> carry`.

    `through(params, number, carry, *rows)` adds one data shard's rows to its carry; its metrics
    have the names `sums` and `maxima`. `number` is the same for all shards. `add` takes its carry
    away.
    """
    mesh, like = scorer.mesh, transformer.param_shapes(scorer.model)
    shards = mesh.shape["data"]
    stacked = functools.partial(sharding.stacked, mesh)
    placed = _param_shardings(scorer.model, mesh)
    scalar = stacked(sharding.replicated(mesh))
    shardings = (jax.tree.map(stacked, placed), *(dict.fromkeys(n, scalar) for n in (sums, maxima)))

    @functools.partial(jax.jit, out_shardings=shardings)
    def empty() -> Carry:
        grads = jax.tree.map(lambda x: jnp.zeros((shards, *x.shape), jnp.float32), like)
        return grads, *({name: jnp.zeros(shards) for name in names} for names in (sums, maxima))

    @jax.named_scope("update")
    def add_shard(params: Params, number: Array, carry: Carry, *rows: Any) -> Carry:
        params = transformer.with_layers_in(params, scorer.dtype)
        carry = through(params, number, jax.tree.map(lambda x: x[0], carry), *rows)
        return jax.tree.map(lambda x: x[None], carry)

    add = jax.jit(
        sharding.by_data_shard(mesh, compiling.exact(scorer.dtype, add_shard), 2),
        donate_argnums=2,
        out_shardings=shardings,
        compiler_options=compiling.options(scorer.mesh),
    )
    return empty, add


@jax.named_scope("optimizer")
def apply_gradient(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    grads: Params,
    loss: Array,
    wanted: Array | bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """The state after one optimizer step, or unchanged but for its counters.

    A loss or gradient that is not finite, and one that is not `wanted`, leaves parameters and
    optimizer as they were and counts in `num_skipped`.
    """
    grad_norm = optax.tree.norm(grads)
    accepted = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & wanted
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)  # noqa: E731
    state = TrainState(
        params=keep(params, state.params),
        opt_state=keep(opt_state, state.opt_state),
        num_updates=state.num_updates + 1,
        num_skipped=state.num_skipped + ~accepted,
    )
    return state, {"policy/grad_norm": grad_norm, "skipped": ~accepted}


def refuse(state: TrainState, number: int) -> TrainState:
    """The state as after so many updates that were refused: only its counters move."""
    moved = [
        jax.device_put(np.int32(int(count) + number), count.sharding)
        for count in (state.num_updates, state.num_skipped)
    ]
    return state.replace(num_updates=moved[0], num_skipped=moved[1])


@dataclasses.dataclass(frozen=True)
class Update:
    """One optimizer update on a minibatch; it donates the state that it is given.

    Minibatch i of n holds prompts i, i + n, ... of the experience. With `offload` the optimizer's
    state comes to the devices for its own step alone, and lies in the host's memory otherwise.
    """

    scorer: Scorer
    num_minibatches: int
    offload: bool
    empty: Callable[[], Carry]  # programs: no gradients yet,
    add: Callable[..., Carry]  # those of some microbatches added,
    finish: Callable[..., tuple[TrainState, dict[str, Array]]]  # and the optimizer's step
    sizes: rows.Sizes  # of packed rows, of `add`; a run adds to them
    compiled: set[tuple[int, ...]]  # shapes for which `finish` was compiled so far

    def __call__(
        self,
        state: TrainState,
        experience: Experience,
        index: int,
        before_donating: Callable[[Carry], None] = lambda carry: None,
    ) -> tuple[TrainState, dict[str, Array]]:
        """The state after the update on minibatch `index`, and metrics.

        `before_donating(carry)` is called once all but the optimizer's step is launched; `carry`
        holds the gradients. Until it returns the state is whole. Metrics are float32 scalars by
        their logged names, and `skipped`, True where the update was refused.
        """
        num_groups = self.scorer.groups_in_shard(experience.rollouts)
        groups_P = np.arange(num_groups)[index :: self.num_minibatches]
        microbatches = self.scorer.microbatches(experience.rollouts, groups_P, self.sizes)
        number, arrays = microbatches.number, microbatches.arrays
        carry = self.add(state.params, number, self.empty(), experience, *arrays)
        action_PGC = experience.action_PGC
        if self.offload:  # a copy: that of the caller stays where it is
            state = state.replace(opt_state=sharding.to_device_memory(state.opt_state))
        if action_PGC.shape not in self.compiled:  # by now: it takes long, and may be given up
            self.finish.lower(state, carry, action_PGC, np.int32(index)).compile()
            self.compiled.add(action_PGC.shape)
        before_donating(carry)
        state, metrics = self.finish(state, carry, action_PGC, np.int32(index))
        if self.offload:
            state = state.replace(opt_state=sharding.to_host_memory(state.opt_state))
        return state, metrics


def make_update(
    scorer: Scorer,
    objective: losses.Objective,
    optimizer: optax.GradientTransformation,
    *,
    num_minibatches: int,
    offload: bool = False,
    bounds: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Update:
    """The update of a policy; nothing is compiled or allocated yet.

    It refuses what is not finite, and what has a metric out of its `bounds`, lowest and highest
    value by name.
    """
    like = state_like(scorer.model, scorer.mesh, optimizer)
    shardings = jax.tree.map(lambda x: x.sharding, like)

    def loss_sums(params, experience: Experience, groups_M: Array, *where: Array):
        packed = _Packed.of(experience.action_PGC.shape[-1], groups_M, *where)
        part = _rows(scorer, experience, groups_M)
        return _loss_sums(params, scorer, objective, part, packed)

    def through(
        params, number: Array, carry: Carry, experience: Experience, *microbatches_1: Array
    ) -> Carry:
        def step(carry, *where):
            return add_gradient(loss_sums, params, carry, experience, *where)

        return _through(number, step, carry, microbatches_1)

    empty, add = make_adding(
        scorer, through, sums=(*losses.SUMS, "loss", "tokens"), maxima=losses.MAXIMA
    )

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiling.options(scorer.mesh),
    )
    @jax.named_scope("update")
    def finish(state: TrainState, carry: Carry, action_PGC: Array, index: Array):
        grads, sums, maxima = over_shards(scorer, carry)
        _, group, tokens = action_PGC.shape
        action_BC = action_PGC.reshape(-1, num_minibatches, group, tokens)[:, index]
        action_BC = action_BC.reshape(-1, tokens)
        count = jnp.maximum(losses.weights(action_BC, objective)[1], 1.0)
        tokens = jnp.maximum(sums.pop("tokens"), 1.0)
        loss = sums.pop("loss") / count
        grads = jax.tree.map(lambda g: g / count, grads)
        means = {name: value / tokens for name, value in sums.items()}
        outside = [(means[n] < low) | (means[n] > high) for n, (low, high) in bounds.items()]
        wanted = ~functools.reduce(jnp.logical_or, outside, jnp.bool_(False))
        state, metrics = apply_gradient(state, optimizer, grads, loss, wanted)
        return state, metrics | means | maxima | {"policy/loss": loss}

    return Update(scorer, num_minibatches, offload, empty, add, finish, rows.Sizes(), set())


def _param_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    shapes = transformer.param_shapes(model)
    return sharding.tree_shardings(mesh, transformer.logical_axes(model), shapes)


def _spread_shardings(model: ModelConfig, mesh: Mesh) -> Any:
    """Where moments and summed gradients lie: as parameters, and split over data shards."""
    return jax.tree.map(
        lambda x, placed: sharding.spread(mesh, placed, x.shape),
        transformer.param_shapes(model),
        _param_shardings(model, mesh),
    )


def _state_shardings(like: TrainState, model: ModelConfig, mesh: Mesh, optimizer) -> TrainState:
    """Where each part of the state lives."""
    whole = sharding.replicated(mesh)
    opt_state = optax.tree_map_params(
        optimizer,
        # A moment may be several arrays of the parameter's axes, some shorter.
        lambda kept, placed: jax.tree.map(lambda x: sharding.along(mesh, placed, x.shape), kept),
        like.opt_state,
        _spread_shardings(model, mesh),
        transform_non_params=lambda _: whole,
        is_leaf=lambda x: not isinstance(x, dict),
    )
    return TrainState(_param_shardings(model, mesh), opt_state, whole, whole)


def state_like(
    model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation, dtype=jnp.float32
) -> TrainState:
    """Shapes, dtypes and shardings of the train state, parameters of `dtype`; none is made."""
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), transformer.param_shapes(model)
    )
    like = jax.eval_shape(functools.partial(_init_state, optimizer=optimizer), params)
    return jax.tree.map(
        lambda x, placed: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed),
        like,
        _state_shardings(like, model, mesh, optimizer),
    )


def start(
    params: Params, model: ModelConfig, mesh: Mesh, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first update; `params` are given away."""
    shardings = jax.tree.map(lambda x: x.sharding, state_like(model, mesh, optimizer))
    init = functools.partial(_init_state, optimizer=optimizer)
    return jax.jit(init, donate_argnums=0, out_shardings=shardings)(params)


def _init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, optimizer.init(params), jnp.int32(0), jnp.int32(0))
