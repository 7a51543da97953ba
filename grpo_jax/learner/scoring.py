"""Runs the policy's network over given completions.

Axes beside those of `structs.py`, as in `packing.py`:

    J prompts of a microbatch   E predictions of a row: F completions' first tokens, then X entries
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.devices import by_shard, sharding, transfer
from grpo_jax.kernels import attention, primitives
from grpo_jax.kernels.attention import AttentionKernels
from grpo_jax.kernels.primitives import split_index, take_along, where
from grpo_jax.learner import packing
from grpo_jax.learner.logprobs import SequenceSplit
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.models import parameters, transformer
from grpo_jax.models.lanes import Layout, PackedInputs
from grpo_jax.models.placement import Placement
from grpo_jax.structs import Array, ModelConfig, Params, Rollouts, Sampling

# Default tokens of a microbatch on a device: enough for full speed. On a CPU, so few that the
# activations kept for the backward pass stay in its caches. Rows without lanes may be shorter, and
# an update of few rows wastes less of the last one then; but where a group is divided over more
# rows, its prompt is computed more often.
_TOKENS_AT_ONCE = 8192
_TOKENS_AT_ONCE_ON_CPU = 1536
_LEAST_TOKENS_ON_CPU = 512
_TOKENS_FOR_PROMPT = 32  # of a row, for each token of a prompt


def usual_tokens(mesh: Mesh, prompt_tokens: int | None = None) -> int:
    """Default tokens of a microbatch's row.

    `prompt_tokens`: of a prompt, if the row has no lanes. Lanes fill a short row badly.
    """
    tokens = _TOKENS_AT_ONCE
    if mesh.devices.flat[0].platform == "cpu":
        tokens = _TOKENS_AT_ONCE_ON_CPU
        if prompt_tokens is not None:
            least = max(_LEAST_TOKENS_ON_CPU, _TOKENS_FOR_PROMPT * prompt_tokens)
            tokens = min(tokens, least)
    return mesh.shape["sequence"] * tokens


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Runs the policy's network over given completions."""

    model: ModelConfig
    mesh: Mesh
    sampling: Sampling
    dtype: Any = jnp.float32  # of activations
    remat: str = "dots"  # as in `config.model.remat`
    scan_layers: bool = True
    microbatch: int = 0  # groups at once, more if completions are short; 0: by `tokens`
    kernels: AttentionKernels = attention  # of attention
    tokens: int = 0  # of a microbatch's row, if `microbatch` is 0; 0: the default
    whole: bool = False  # whether each group must be in one row, for a loss that reads it whole

    def microbatches(
        self, rollouts: Rollouts, groups_P: np.ndarray, sizes: CompiledSizes | None = None
    ) -> packing.Microbatches:
        """Some groups of each data shard in microbatches of about equally many tokens.

        `sizes`: the row sizes of their program.
        """
        prompt_tokens, (_, group, tokens) = rollouts.prompt_PQ.shape[1], rollouts.logp_PGC.shape
        shards, devices = self.mesh.shape["data"], self.mesh.shape["fsdp"] * self.parts
        sequence = self.mesh.shape["sequence"]
        of_group = prompt_tokens + group * max(tokens - 1, 1)
        in_lanes = self.kernels.needs_lanes(tokens - 1)
        usual = usual_tokens(self.mesh, None if in_lanes else prompt_tokens)
        tokens_at_once = self.tokens or usual
        return packing.pack(
            transfer.to_host(rollouts.length_PG).reshape(shards, -1, group),
            groups_P,
            prompt_tokens=prompt_tokens,
            completion_tokens=tokens,
            at_once=self.microbatch * of_group // (shards * devices) or tokens_at_once,
            devices=devices,
            multiple=sequence,
            share_lanes=self.kernels.shares_lanes,
            in_lanes=in_lanes,
            whole=self.whole,
            sizes=sizes,
        )

    @property
    def parts(self) -> int:
        """Attention rows that make one row of the MLP and the vocabulary."""
        return sharding.attention_parts(self.mesh, self.model.num_kv_heads)

    @property
    def placement(self) -> Placement:
        """The sharding of activations inside a data shard."""
        return Placement.of(self.mesh, self.model.num_kv_heads)

    def rows_of_vocabulary(self, x: Array) -> Array:
        """Values by attention row [B, E, ...]; rows that share the head are joined into one."""
        if self.parts == 1:
            return x
        x = self.placement.place(x, "shard_rows", *(None,) * (x.ndim - 1))
        return x.reshape(-1, self.parts * x.shape[1], *x.shape[2:])

    @property
    def along(self) -> SequenceSplit:
        return SequenceSplit(self.mesh)

    @property
    def row_axis(self) -> str:
        return self.placement.row_axis

    def groups_in_shard(self, rollouts: Rollouts) -> int:
        return len(rollouts.length_PG) // self.mesh.shape["data"]

    def hidden(self, params: Params, rollouts: Rollouts, layout: Layout | None = None) -> Array:
        """The hidden states that predict completion tokens, in `PackedInputs.predictors`' order.

        Without a layout: by completion, [P * G, C, D].
        """
        prompts = rollouts.prompt_PQ, rollouts.prompt_length_P
        inputs = PackedInputs.of(*prompts, rollouts.completion_PGC, layout, rollouts.begin_PGC)
        hidden = transformer.completion_states(
            params,
            self.model,
            inputs,
            dtype=self.dtype,
            remat=self.remat,
            scan=self.scan_layers,
            placement=self.placement,
            kernels=self.kernels,
        )
        if layout is None:
            hidden = inputs.by_completion(hidden)
            hidden = hidden.reshape(-1, *hidden.shape[2:])
        return hidden

    def head(self, params: Params) -> Array:
        """The LM head [D, V], gathered once for all chunks of the vocabulary's sweep."""
        head_DV = parameters.head_kernel(params)
        return by_shard.gathered(self.mesh, head_DV, ("embed", "vocab"), ("vocab",))


@dataclasses.dataclass(frozen=True)
class Packed:
    """One microbatch of a data shard: which token each prediction [B, E] of its rows belongs to.

    E = J * G + X, ordered as in `PackedInputs.predictors`; J counts the prompts of one device.
    """

    groups_BJ: Array
    index_BE: Array  # int32: (j * G + g) * C + c; 0 if empty
    there_BE: Array  # bool
    layout: tuple[Array, Array]  # for the network
    tokens: int  # C

    @staticmethod
    def of(tokens: int, groups_J: Array, own_JG: Array, token_BX: Array, lane_JWT: Array):
        own_BF = own_JG.reshape(len(token_BX), -1)  # each completion's first token
        first_BF = jnp.broadcast_to(jnp.arange(own_BF.shape[1]) * tokens, own_BF.shape)
        return Packed(
            groups_J.reshape(len(token_BX), -1),
            jnp.maximum(jnp.concatenate([first_BF, token_BX], axis=1), 0),
            jnp.concatenate([own_BF, token_BX >= 0], axis=1),
            (token_BX, lane_JWT),
            tokens,
        )

    def take(self, x_JGC: Array) -> Array:
        """Values by completion and token, gathered by prediction; arbitrary at empty ones."""
        flat = x_JGC.reshape(self.index_BE.shape[0], -1)
        return take_along(flat, self.index_BE)

    def take_of_completion(self, x_JG: Array) -> Array:
        """Values by completion, gathered by prediction."""
        flat = x_JG.reshape(self.index_BE.shape[0], -1)
        return take_along(flat, split_index(self.index_BE, self.tokens)[0])

    def by_completion(self, x_BE: Array, like_JGC: Array) -> Array:
        """Values by prediction, each at its completion and token, [J, G, C]; 0 elsewhere.

        The sum over a completion is thus the same however it is packed.
        """
        size = like_JGC.size // len(self.index_BE)
        past = size + jnp.arange(self.index_BE.shape[1])  # past the end: dropped
        place_BE = where(self.there_BE, self.index_BE, past)
        empty = jnp.zeros(size, x_BE.dtype)
        put = lambda at, x: empty.at[at].set(x, mode="drop", unique_indices=True)  # noqa: E731
        return jax.vmap(put)(place_BE, x_BE).reshape(like_JGC.shape)

    def put(self, x_PGC: Array, value_BE: Array) -> Array:
        """The shard's values, with the values of the predictions written to their places."""
        per_group = x_PGC[0].size
        group_BE, in_group_BE = split_index(self.index_BE, per_group)
        place_BE = take_along(self.groups_BJ, group_BE) * per_group + in_group_BE
        place_BE = where(self.there_BE, place_BE, x_PGC.size)  # past the end: dropped
        put = x_PGC.reshape(-1).at[place_BE].set
        return put(value_BE, mode="drop", wrap_negative_indices=False).reshape(x_PGC.shape)


def cut_to(limit: int, longest: int) -> int:
    """The length to which completions are cut before scoring, in quarters of the limit.

    Few lengths, since a program is compiled for each.
    """
    quarter = -(-limit // 4)
    return min(limit, -(-longest // quarter) * quarter)


def rows(scorer: Scorer, tree: Any, groups_J: Array) -> Any:
    """Groups of a data shard's arrays [P, ...], split over its devices; -1 gives any group."""
    groups_J = jnp.maximum(groups_J, 0)
    part = jax.tree.map(lambda x: primitives.rows(x, groups_J), tree)
    return by_shard.split_within_shard(scorer.mesh, part, scorer.row_axis)


def row_by_row(scorer: Scorer, f: Callable, *rows: Any) -> Any:
    """`f` applied to each device's row separately; results may have one more leading axis.

    Sums of `f` over the chunks of a row, above all the head's gradient, thus stay on the device and
    are reduced over devices once. With sequence parallelism `f` sees all rows at once.
    """
    rows = jax.tree.map(scorer.rows_of_vocabulary, rows)
    if len(rows[0]) == 1 or scorer.mesh.shape["sequence"] > 1:
        return f(*rows)
    return jax.vmap(lambda *row: f(*jax.tree.map(lambda x: x[None], row)))(*rows)
