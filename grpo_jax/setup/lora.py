"""A config's low-rank adapters: their layers, initial values, and frozen base weights."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from grpo_jax.config.options import default
from grpo_jax.devices import sharding
from grpo_jax.hosts import processes
from grpo_jax.kernels.nf4 import NF4
from grpo_jax.messages.values import shown
from grpo_jax.models import lora
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.hf import peft, targets
from grpo_jax.models.hf.targets import Spec
from grpo_jax.models.policy import Policy
from grpo_jax.structs import Array, Lora, ModelConfig, Params

KEPT = "source_adapter"  # in a run's folder: copy of its initial adapter
_USUAL_OF_ALL = 3e-6  # full fine-tuning uses learning rates below this


def recorded(options: Mapping[str, Any]) -> ConfigDict:
    """A config with the section `lora` of a run's record: options by their dotted names."""
    config = default()
    for name, usual in config.lora.items():
        value = options.get(f"lora.{name}", usual)
        config.lora[name] = tuple(value) if isinstance(value, list) else value
    return config


def _spec_of(config: ConfigDict, head: str, kept: Path | None) -> Spec | None:
    """The adapters that a config asks for; None: all weights are trained."""
    if config.lora.path:
        return peft.read_config(_folder(config.lora.path, kept), head=head)
    return _of_options(config, config.lora.rank) if config.lora.rank else None


def _of_options(config: ConfigDict, rank: int) -> Spec:
    """The adapters that the options of `lora` ask for."""
    return Spec(
        rank=rank,
        alpha=config.lora.alpha,
        stabilized=config.lora.rank_stabilized,
        targets=tuple(config.lora.targets),
        exclude=tuple(config.lora.exclude),
        ranks=_pairs(config.lora.rank_pattern, "lora.rank_pattern", int),
        alphas=_pairs(config.lora.alpha_pattern, "lora.alpha_pattern", float),
        where="lora.targets",
    )


def _folder(path: str, kept: Path | None) -> Path:
    return policy_lib.find(path, "lora.path", kept, peft.CONFIG)


def _pairs(entries: Sequence[str], name: str, kind: type) -> dict[str, Any]:
    found = {}
    for entry in entries:
        pattern, equals, value = str(entry).rpartition("=")
        try:
            found[pattern] = kind(value)
            assert equals and pattern and found[pattern] > 0
        except (ValueError, AssertionError) as error:
            raise ValueError(
                f'{name}: {shown(entry)} is not "pattern=number" with a number above 0, such as '
                '"mlp.down_proj=8".'
            ) from error
    return found


def adapted(model: ModelConfig, config: ConfigDict, kept: Path | None = None) -> ModelConfig:
    """The shape of a model with the adapters that a config asks for; ValueError for wrong ones.

    `kept`: a run's copy of lora.path, which may be gone.
    """
    spec = _spec_of(config, model.head, kept)
    given = f"model.path = {shown(config.model.path)}"
    return _with_adapters(model, spec, config, given, "lora.rank = 0")


def adapted_critic(
    model: ModelConfig,
    config: ConfigDict,
    of_policy: Lora | None,
    adapter: Path | None = None,
    kept: Path | None = None,
) -> ModelConfig:
    """The shape of a critic with the adapters that a config asks for; ValueError for wrong ones.

    `of_policy`: the policy's adapters. `adapter`: the folder of PEFT that the critic begins with,
    if it does. `kept` as in `adapted`.
    """
    rank, path = config.critic.lora_rank, config.critic.path
    if adapter is not None:
        if rank != -1:
            raise ValueError(
                f"critic.lora_rank = {rank}, but critic.path = {shown(path)} holds adapters, which "
                "say their rank. Leave critic.lora_rank at -1, or give a whole model, such as the "
                "export that the adapters lie in."
            )
        spec = peft.read_config(adapter, "critic.path", head="scalar")
    elif rank == -1 and not path:  # the same layers
        spec = None
        if of_policy is not None:
            return dataclasses.replace(model, lora=of_policy)
    elif rank == -1:
        spec = _spec_of(config, "vocabulary", kept)
    else:
        spec = _of_options(config, rank) if rank else None
    given = f"critic.path = {shown(path)}" if path else f"model.path = {shown(config.model.path)}"
    return _with_adapters(model, spec, config, given, f"critic.lora_rank = {rank}")


def _with_adapters(
    model: ModelConfig, spec: Spec | None, config: ConfigDict, given: str, asked: str
) -> ModelConfig:
    """`given`, `asked`: the options that name the model and the rank, with their values."""
    base = _base(model, config.lora.base_dtype, given, asked, is_adapted=spec is not None)
    if spec is None:
        return model
    return dataclasses.replace(model, lora=targets.lora_of(model, spec, base=base))


def _base(model: ModelConfig, dtype: str, given: str, asked: str, *, is_adapted: bool) -> str:
    """The precision of the layers' kernels, as in `Lora`; `dtype`: lora.base_dtype."""
    if not model.codes:
        return dtype
    remedy = "or give the model that they were made from, such as the id without its -bnb-4bit."
    if not is_adapted:
        raise ValueError(
            f"{given} has its kernels in NF4 (bitsandbytes), and {asked} trains all weights, "
            f"which needs whole ones. Set {asked.partition(' ')[0]}, such as to 16, {remedy}"
        )
    if dtype not in ("auto", "nf4"):
        raise ValueError(
            f"lora.base_dtype = {shown(dtype)}, but {given} has its kernels in NF4 "
            f'(bitsandbytes). Set it to "auto", which takes them, {remedy}'
        )
    return "nf4"


def adapted_policy(policy: Policy, config: ConfigDict, kept: Path | None = None) -> Policy:
    """A policy with the adapters that a config asks for."""
    return dataclasses.replace(policy, model=adapted(policy.model, config, kept))


def adapter_at(path: str, option: str) -> Path | None:
    """The folder of PEFT at a path; None: it has a whole model."""
    folder = policy_lib.find(path, option)
    return folder if peft.is_adapter(folder) else None


def base_at(path: str, option: str, adapter: Path | None) -> tuple[str, str]:
    """The path of the whole model, and the option that gives it."""
    if adapter is None:
        return path, option
    return peft.base_of(adapter), peft.base_option(adapter)


def keep(config: ConfigDict, folder: Path) -> None:
    """Copies lora.path, if one is given, to the run's folder: it may be gone at a restart."""
    if config.lora.path:
        keep_adapter(_folder(config.lora.path, folder / KEPT), folder / KEPT, "lora.path")


def keep_adapter(source: Path, kept: Path, option: str) -> None:
    """Copies a folder of PEFT to `kept`, unless it is there; `option` gave the source."""
    if processes.is_first() and not (kept / peft.WEIGHTS).exists():
        kept.mkdir(parents=True, exist_ok=True)
        for name in (peft.CONFIG, peft.WEIGHTS):  # weights last: they mark a whole copy
            shutil.copyfile(source / name, kept / name)
    processes.barrier(f"the copy of {option}")


# --- Weights --------------------------------------------------------------------------------------


def frozen_params(policy: Policy, mesh: Mesh, dtype: Any) -> Params | None:
    """The frozen parameters, in `dtype` or in codes; None if all are trained."""
    model = policy.model
    if model.lora is None:
        return None
    dtype = jnp.dtype(dtype)
    placed = sharding.tree_shardings(
        mesh, lora.frozen_axes(model), lora.frozen_shapes(model, dtype)
    )

    def keep(path: Any, x: Array) -> Any:
        where = of(path)
        return x if isinstance(where, NamedSharding) else _quantizing(model, path, where)(x)

    def of(path: Any) -> Any:
        return functools.reduce(lambda tree, key: tree[key.key], path, placed)

    def codes(path: Any) -> NF4 | None:
        where = of(path)
        return where if model.codes and isinstance(where, NF4) else None

    return policy_lib.load_params(policy, mesh, 0, dtype, keep, codes, placed.keys())


def _quantizing(model: ModelConfig, path: Any, placed: Any) -> Any:
    replicated = sharding.replicated(jax.tree.leaves(placed)[0].mesh)

    @functools.partial(jax.jit, out_shardings=placed)
    def quantize_base(x: Array) -> Any:
        whole = lambda x: jax.lax.with_sharding_constraint(x, replicated)  # noqa: E731
        return lora.frozen_leaf(model, path, x, whole)

    return quantize_base


def frozen_like(model: ModelConfig, mesh: Mesh, dtype: Any) -> Params | None:
    """Shapes and shardings of `frozen_params`."""
    if model.lora is None:
        return None
    like = lora.frozen_shapes(model, dtype)
    placed = sharding.tree_shardings(mesh, lora.frozen_axes(model), like)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, placed
    )


def first_params(config: ConfigDict, policy: Policy, mesh: Mesh, kept: Path | None) -> Params:
    """The initial trained weights: the policy's weights, or new or given adapters and its head."""
    dtype, model = jnp.dtype(config.model.param_dtype), policy.model
    if model.lora is None:
        return policy_lib.load_params(policy, mesh, config.seed, dtype)
    if config.lora.path:
        return given_params(_folder(config.lora.path, kept), policy, mesh, config.seed, dtype)
    return new_params(policy, mesh, config.seed, dtype)


def new_params(
    policy: Policy, mesh: Mesh, seed: int, dtype: Any, purpose: str = "adapters"
) -> Params:
    """New adapters of a policy, and its head if it is a scalar one; `purpose`: of their key."""
    adapters = policy_lib.new_adapters(policy.model, mesh, seed, dtype, purpose)
    return _with_head(adapters, policy, mesh, seed, dtype)


def given_params(folder: Path, policy: Policy, mesh: Mesh, seed: int, dtype: Any) -> Params:
    """The adapters of a PEFT folder; of a reward model also the head, from there or its own."""
    adapters = peft.load(folder, policy.model, mesh, dtype)
    return _with_head(adapters, policy, mesh, seed, dtype)


def _with_head(adapters: Params, policy: Policy, mesh: Mesh, seed: int, dtype: Any) -> Params:
    if policy.model.head != "scalar" or "score" in adapters:
        return adapters
    return adapters | {"score": policy_lib.load_head(policy, mesh, seed, dtype)}


def attached(frozen: Params, trained: Params, model: ModelConfig, mesh: Mesh) -> Params:
    """`lora.attached`, all of it on the devices."""
    whole = sharding.replicated(mesh)
    put = lambda x: x if isinstance(x, jax.Array) else jax.device_put(x, whole)  # noqa: E731
    return jax.tree.map(put, lora.attached(frozen, trained, model))


def attached_like(frozen: Params | None, trained: Params, model: ModelConfig, mesh: Mesh) -> Params:
    """Shapes and shardings of the tree that the network reads, from those of its parts."""
    whole = sharding.replicated(mesh)

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        is_host = isinstance(x, np.ndarray)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) if is_host else x

    return jax.tree.map(shape, lora.attached(frozen, trained, model))


def reference(
    config: ConfigDict, policy: Policy, mesh: Mesh, frozen: Params, kept: Path | None
) -> Params:
    """The reference for adapters: the frozen weights alone, or with the adapter of lora.path.

    The weights are not copied.
    """
    if not config.lora.path:
        return frozen
    dtype = jnp.dtype(config.model.dtype)
    given = peft.load(_folder(config.lora.path, kept), policy.model, mesh, dtype)
    return attached(frozen, given, policy.model, mesh)


def told(config: ConfigDict, model: ModelConfig) -> list[str]:
    """Messages on the trained weights, and on a learning rate that suits only full fine-tuning."""
    if model.lora is None:
        return []
    ranks = sorted({rank for adapter in model.lora.adapters for rank in adapter.ranks if rank})
    names = ", ".join(adapter.path for adapter in model.lora.adapters)
    lines = [
        f"LoRA: rank {', '.join(map(str, ranks))} on {names}: {lora.num_trained(model):,} "
        f"parameters learn, {100 * lora.num_trained(model) / model.num_params:.2f} %"
    ]
    rate = config.optim.learning_rate
    if rate < _USUAL_OF_ALL:
        lines.append(
            f"warning: optim.learning_rate = {rate:g} is usual where all weights learn. Adapters "
            f"take about ten times that: {10 * rate:g} to {50 * rate:g}; see docs/lora.md."
        )
    return lines
