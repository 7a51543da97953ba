"""A layer of the decoder: attention, MLP and their norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from grpo_jax.kernels import dense as dense_lib
from grpo_jax.kernels.norm import AddNorm, Norm, Residual, parameter
from grpo_jax.kernels.quantize import FrozenProduct, frozen_product
from grpo_jax.models.placement import REPLICATED, MlpPlacement
from grpo_jax.structs import Array, Layer, ModelConfig

# Maps queries, keys and values before rotation to (output of attention, any state that the caller
# keeps).
Attend = Callable[[Array, Array, Array], tuple[Array, Any]]


class Dense(nn.Module):
    """A dense layer; its kernel may be in 8 or 4 bits or have a low-rank adapter."""

    features: int
    axes: tuple[str, str]
    dtype: Any
    bias: bool = False
    frozen_product: FrozenProduct = frozen_product

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[-1], self.features
        if self.has_variable("params", "kernel"):  # `self.param` knows arrays of this size alone
            kernel = self.get_variable("params", "kernel")
            assert kernel.shape == size, (kernel.shape, size)
        else:
            normal = nn.with_logical_partitioning(nn.initializers.normal(0.02), self.axes)
            kernel = self.param("kernel", normal, size)
        y = dense_lib.product(x.astype(self.dtype), kernel, self.dtype, self.frozen_product)
        if self.bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            bias = parameter(self, "bias", zeros, (self.features,))
            y += lax.broadcast_in_dim(bias.astype(self.dtype), y.shape, (y.ndim - 1,))
        return y


def silu(x: Array) -> Array:
    return x * lax.logistic(x)


def _by_token(dense: Callable[[Array], Array], x: Array) -> Array:
    """Applies a dense layer to [..., D] as one product over [tokens, D].

    With more axes the kernel's gradient contracts over several at once, and XLA on CPU transposes
    the incoming gradient first: 1.25 times the time of the product alone.
    """
    y = dense(x.reshape(-1, x.shape[-1]))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def rms_norm(config: ModelConfig, dtype, name: str | None = None, kind: Any = Norm) -> Any:
    first = nn.initializers.constant(1 - config.norm_offset)
    return kind(
        epsilon=config.norm_eps,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(first, ("norm",)),
        offset=config.norm_offset,
        name=name,
    )


class Attention(nn.Module):
    config: ModelConfig
    dtype: Any
    fused: bool  # the parameters are those of `parameters.fuse_projections`
    frozen_product: FrozenProduct

    @nn.compact
    def __call__(self, x: Array, attend: Attend):
        c = self.config
        counts = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}
        by_head = lambda y: y.reshape(*y.shape[:-1], -1, c.head_size)  # noqa: E731
        if self.fused:
            features = sum(counts.values()) * c.head_size
            dense = self._dense(features, ("embed", "heads"), "qkv", c.qkv_bias)
            ends = np.cumsum(list(counts.values()))[:-1]
            q, k, v = jnp.split(by_head(_by_token(dense, x)), ends, axis=-2)
        else:
            qkv = []
            for name, count in counts.items():
                axes = ("embed", "heads" if name == "q" else "kv_heads")
                dense = self._dense(count * c.head_size, axes, name, c.qkv_bias)
                qkv.append(by_head(_by_token(dense, x)))
            q, k, v = qkv
        if c.qk_norm:
            q, k = self._normed(q, "q_norm"), self._normed(k, "k_norm")
        out, kept = attend(q, k, v)
        out = out.reshape(*x.shape[:-1], c.num_heads * c.head_size)
        dense = self._dense(c.width, ("heads", "embed"), "o", c.out_bias)
        return _by_token(dense, out), kept

    def _dense(self, features: int, axes: tuple[str, str], name: str, bias: bool) -> Dense:
        return Dense(features, axes, self.dtype, bias, self.frozen_product, name=name)

    def _normed(self, x: Array, name: str) -> Array:
        """Normed queries or keys [..., heads, H]: each head alone, or a token's heads as one."""
        norm = rms_norm(self.config, self.dtype, name)
        if self.config.qk_norm == "head":
            return norm(x)
        return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


_ACTIVATIONS = {"silu": silu, "gelu_tanh": nn.gelu}  # by `ModelConfig.activation`


class MLP(nn.Module):
    config: ModelConfig
    dtype: Any
    fused: bool  # the parameters are those of `parameters.fuse_projections`
    frozen_product: FrozenProduct
    placement: MlpPlacement

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _by_token(self._tokens, x)

    def _tokens(self, x: Array) -> Array:
        x, width = self.placement.gather(x), self.config.mlp_width
        if self.fused:
            both = self._dense(2 * width, ("embed", "mlp"), "gate_up")(x)
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate = self._dense(width, ("embed", "mlp"), "gate")(x)
            up = self._dense(width, ("embed", "mlp"), "up")(x)
        by_width, activation = self.placement.by_width, _ACTIVATIONS[self.config.activation]
        y = by_width(activation(by_width(gate)) * by_width(up))
        down = self._dense(self.config.width, ("mlp", "embed"), "down")(y)
        return self.placement.scatter(down)

    def _dense(self, features: int, axes: tuple[str, str], name: str) -> Dense:
        product = self.frozen_product
        return Dense(features, axes, self.dtype, frozen_product=product, name=name)


_MIXERS = {"attention": Attention}  # by `Layer.mixer`
_FFNS = {"dense": MLP}  # by `Layer.ffn`


class Block(nn.Module):
    """One layer on a residual stream of states [..., D]; any leading axes."""

    config: ModelConfig
    layer: Layer
    dtype: Any = jnp.float32
    fused: bool = False  # the parameters are those of `parameters.fuse_projections`
    mlp: MlpPlacement = REPLICATED
    norm: type[nn.Module] = AddNorm  # or `gpu_norm.FusedNorm`
    frozen_product: FrozenProduct = frozen_product  # or `gpu_codes.FewRows`

    @nn.compact
    def __call__(self, x: Residual, attend: Attend) -> tuple[Residual, Any]:
        mixer, ffn = _MIXERS[self.layer.mixer], _FFNS[self.layer.ffn]
        sizes = self.config, self.dtype, self.fused, self.frozen_product
        states, read = self._read(x, "attention")
        branch, kept = mixer(*sizes, name="attention")(read, attend)
        states, read = self._read(Residual(states, self._added(branch, "attention")), "mlp")
        branch = ffn(*sizes, self.mlp, name="mlp")(read)
        return Residual(states, self._added(branch, "mlp")), kept

    def _read(self, x: Residual, of: str) -> tuple[Array, Array]:
        """The states, and the input of a branch."""
        if self.config.norms == "after":
            return (states := x.sum()), states
        return rms_norm(self.config, self.dtype, f"{of}_norm", self.norm)(x)

    def _added(self, branch: Array, of: str) -> Array:
        """The output of a branch, as it is added to the states."""
        if self.config.norms != "before":
            branch = rms_norm(self.config, self.dtype, f"{of}_post_norm")(branch)
        factor = self.config.residual_factor
        return branch if factor == 1 else branch * jnp.asarray(factor, branch.dtype)
