"""How the policy's network is run over given completions.

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
from grpo_jax.kernels import attention
from grpo_jax.kernels.attention import AttentionKernels
from grpo_jax.learner import packing
from grpo_jax.learner.logprobs import SequenceSplit
from grpo_jax.learner.row_sizes import CompiledSizes
from grpo_jax.models import parameters, transformer
from grpo_jax.models.lanes import Layout, PackedInputs
from grpo_jax.models.placement import Placement
from grpo_jax.structs import Array, ModelConfig, Params, Rollouts, Sampling

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
    kernels: AttentionKernels = attention  # compute the attention
    tokens: int = 0  # of a row of a microbatch, where that is 0; 0: the usual number

    def microbatches(
        self, rollouts: Rollouts, groups_P: np.ndarray, sizes: CompiledSizes | None = None
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
            transfer.to_host(rollouts.length_PG).reshape(shards, -1, group),
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
    def placement(self) -> Placement:
        """Where activations lie on the devices of a data shard."""
        return Placement.of(self.mesh, self.model.num_kv_heads)

    def rows_of_vocabulary(self, x: Array) -> Array:
        """Values by row of attention [B, E, ...], those that share the head one after another."""
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
        """The hidden states that predict completion tokens, as `PackedInputs.predictors` has them.

        Without a layout as rows, [P * G, C, D].
        """
        prompts = rollouts.prompt_PQ, rollouts.prompt_length_P
        inputs = PackedInputs.of(*prompts, rollouts.completion_PGC, layout)
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
    """One microbatch of a data shard: whose tokens its rows' predictions [B, E] are.

    E = J * G + X, ordered as `PackedInputs.predictors` has them, J counted on one device.
    """

    groups_BJ: Array
    index_BE: Array  # int32: (j * G + g) * C + c; 0 where there is none
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
        """Values by completion and token at the predictions; some value where there is none."""
        flat = x_JGC.reshape(self.index_BE.shape[0], -1)
        return jnp.take_along_axis(flat, self.index_BE, axis=1)

    def take_of_completion(self, x_JG: Array) -> Array:
        """Values by completion at its predictions."""
        flat = x_JG.reshape(self.index_BE.shape[0], -1)
        return jnp.take_along_axis(flat, self.index_BE // self.tokens, axis=1)

    def put(self, x_PGC: Array, value_BE: Array) -> Array:
        """The shard's values with those of the predictions in their places."""
        per_group = x_PGC[0].size
        group_BE = jnp.take_along_axis(self.groups_BJ, self.index_BE // per_group, axis=1)
        place_BE = group_BE * per_group + self.index_BE % per_group
        place_BE = jnp.where(self.there_BE, place_BE, x_PGC.size)  # past the end: dropped
        return x_PGC.reshape(-1).at[place_BE].set(value_BE, mode="drop").reshape(x_PGC.shape)


def cut_to(limit: int, longest: int) -> int:
    """Tokens to which completions are cut before they are scored, in quarters of the limit.

    Few lengths: a program is compiled once for each.
    """
    quarter = -(-limit // 4)
    return min(limit, -(-longest // quarter) * quarter)


def rows(scorer: Scorer, tree: Any, groups_J: Array) -> Any:
    """Some groups of a data shard's arrays [P, ...], over its devices by row; any group for -1."""
    groups_J = jnp.maximum(groups_J, 0)
    part = jax.tree.map(lambda x: x[groups_J], tree)
    return by_shard.split_within_shard(scorer.mesh, part, scorer.row_axis)


def row_by_row(scorer: Scorer, f: Callable, *rows: Any) -> Any:
    """`f` of the row of each device by itself; its results may have one more leading axis.

    So what `f` sums over the chunks of its row, the head's gradient above all, is summed where it
    is, and over devices once. A row that several devices share goes with the others.
    """
    rows = jax.tree.map(scorer.rows_of_vocabulary, rows)
    if len(rows[0]) == 1 or scorer.mesh.shape["sequence"] > 1:
        return f(*rows)
    return jax.vmap(lambda *row: f(*jax.tree.map(lambda x: x[None], row)))(*rows)
