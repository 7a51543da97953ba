"""A layer of the decoder: attention, MLP and their norms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from grpo_jax.kernels import quantize
from grpo_jax.kernels.gpu_norm import Sum
from grpo_jax.structs import Array, ModelConfig

# Queries, keys and values, none of them rotated yet, to the attention's output and whatever the
# caller wants kept of them.
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]
# An activation and the logical axes of its dimensions to the same, placed over the devices.
Place = Callable[[Array, tuple[str | None, ...]], Array]


class Rows(NamedTuple):
    """How rows that devices divide between them become whole on each for the MLP, and the inverse.

    It is split by width over devices that have the attention of other rows each.
    """

    whole: Callable[[Array], Array] = lambda x: x
    split: Callable[[Array], Array] = lambda x: x
    wide: Callable[[Array], Array] = lambda x: x  # what is inside the MLP, [tokens, F]

    @staticmethod
    def placed(place: Place, row_axis: str) -> Rows:
        by = lambda axis: lambda x: place(x, (axis,) + (None,) * (x.ndim - 1))  # noqa: E731
        return Rows(by("shard_rows"), by(row_axis), lambda x: place(x, ("shard_rows", "mlp")))


UNDIVIDED = Rows()


class ByRow(NamedTuple):
    """Devices that share the MLP and have the attention of rows of their own each."""

    axis: str  # the logical axis of the rows
    gather: Callable[[Array, tuple[str, ...]], Array]  # a parameter of these logical axes


class Dense(nn.Module):
    """A dense layer whose kernel may be in 8 bits."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        normal = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
        kernel = self.param("kernel", normal, (x.shape[-1], self.features))
        y = quantize.product(x.astype(self.dtype), kernel, self.dtype)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = self.param("bias", zeros, (self.features,))
            y += bias.astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def _dense(features: int, axes: tuple[str, str], name: str, dtype, bias: bool = False) -> Dense:
    return Dense(features, axes, dtype, bias, name=name)


def _by_token(dense: Callable[[Array], Array], x: Array) -> Array:
    """A dense layer on [..., D] as one product over [tokens, D].

    With more axes the gradient of the kernel contracts over several at once, for which XLA on CPU
    first turns the incoming gradient round: 1.25 times the time of the product alone.
    """
    y = dense(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def rms_norm(config: ModelConfig, dtype, name: str | None = None, kind: Any = nn.RMSNorm) -> Any:
    return kind(
        epsilon=config.norm_eps,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("norm",)),
        name=name,
    )


def normed(norm: Callable[..., Any], x: Array | Sum) -> tuple[Array, Array]:
    """States that may still be to be added, and their norm."""
    return norm(x) if isinstance(x, Sum) else (x, norm(x))


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, attend: Attend):
        c = self.config
        counts = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        by_head = lambda y: y.reshape(*y.shape[:-1], -1, c.head_size)  # noqa: E731
        if self.has_variable("params", "qkv"):  # of `joined`
            features = sum(counts.values()) * c.head_size
            dense = _dense(features, ("embed", "heads"), "qkv", self.dtype, c.qkv_bias)
            ends = np.cumsum(list(counts.values()))[:-1]
            q, k, v = jnp.split(by_head(_by_token(dense, x)), ends, axis=-2)
        else:
            qkv = []
            for name, count in counts.items():
                axes = ("embed", "heads" if name == "q" else "kv_heads")
                dense = _dense(count * c.head_size, axes, name, self.dtype, c.qkv_bias)
                qkv.append(by_head(_by_token(dense, x)))
            q, k, v = qkv
        if c.qk_norm:
            q = rms_norm(c, self.dtype, "q_norm")(q)
            k = rms_norm(c, self.dtype, "k_norm")(k)
        out, kept = attend(q, k, v)
        out = out.reshape(*x.shape[:-1], c.num_heads * c.head_size)
        dense = _dense(c.width, ("heads", "embed"), "o", self.dtype, c.out_bias)
        return _by_token(dense, out), kept


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any

    rows: Rows

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _by_token(self._tokens, x)

    def _tokens(self, x: Array) -> Array:
        x, width = self.rows.whole(x), self.config.mlp_width
        if self.has_variable("params", "gate_up"):  # of `joined`
            both = _dense(2 * width, ("embed", "mlp"), "gate_up", self.dtype)(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = _dense(width, ("embed", "mlp"), "gate", self.dtype)(x)
            up = _dense(width, ("embed", "mlp"), "up", self.dtype)(x)
        y = self.rows.wide(nn.silu(self.rows.wide(gate)) * self.rows.wide(up))
        return self.rows.split(_dense(self.config.width, ("mlp", "embed"), "down", self.dtype)(y))


class Block(nn.Module):
    """One layer on hidden states [..., D]; any leading axes."""

    config: ModelConfig
    dtype: Any = jnp.float32
    norm: Any = nn.RMSNorm  # or `FusedNorm`, and what is returned is still to be added

    @nn.compact
    def __call__(self, x: Array | Sum, attend: Attend, rows: Rows = UNDIVIDED):
        norm = functools.partial(rms_norm, self.config, self.dtype, kind=self.norm)
        plus = jnp.add if self.norm is nn.RMSNorm else Sum
        x, y = normed(norm("attention_norm"), x)
        y, kept = Attention(self.config, self.dtype, name="attention")(y, attend)
        x, y = normed(norm("mlp_norm"), plus(x, y))
        return plus(x, MLP(self.config, self.dtype, rows, name="mlp")(y)), kept
