"""The model of a config, or of a path that a user gives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from grpo_jax.config import derived, record
from grpo_jax.data import tasks
from grpo_jax.devices import transfer
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.hf import tokenizer as tokenizer_lib
from grpo_jax.models.lora import attached
from grpo_jax.models.policy import Policy
from grpo_jax.run import saved as saved_lib
from grpo_jax.run import workdir
from grpo_jax.setup import lora
from grpo_jax.structs import Layer, ModelConfig, Params, Rotary


def model_shape(
    config: ConfigDict, folder: Path | None = None, head: str | None = None
) -> ModelConfig:
    """The shape of the model that the config trains, in a run's folder if one is given.

    `head`: what it is trained with, as in `ModelConfig`; None: as it comes.
    """
    kept = None if folder is None else folder / "source"
    path = config.model.path
    if path:
        model = folder_lib.read_config(policy_lib.find(path, kept=kept), folder_lib.as_given(path))
        model = model.within(derived.longest_row(config))
    else:
        model = new_policy(config).model
    model = model if head is None else dataclasses.replace(model, head=head)
    return lora.adapted(model, config, None if folder is None else folder / lora.KEPT)


def new_policy(config: ConfigDict) -> Policy:
    """A new policy of the config, with the tokenizer of model.tokenizer or of its task.

    Raises ValueError for a tokenizer that cannot be read, or has no token that ends a text.
    """
    path = config.model.tokenizer
    if not path:
        return new(config.model, tasks.load(config.data.task).make_tokenizer())
    tokenizer = tokenizer_lib.load_tokenizer(folder_lib.resolve(path, "model.tokenizer"))
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"model.tokenizer = {path!r} has no eos_token, so a model could not end a completion. "
            "Set eos_token in its tokenizer_config.json."
        )
    return new(config.model, tokenizer, max(derived.longest_row(config), _POSITIONS))


_POSITIONS = 1024  # of a new model, at least


def new(
    options: ConfigDict, tokenizer: PreTrainedTokenizerBase, longest: int = _POSITIONS
) -> Policy:
    """A Qwen2-shaped policy of the sizes in `config.model`, without weights yet.

    `longest`: tokens of its longest row.
    """
    model = ModelConfig(
        family="qwen2",
        vocab_size=len(tokenizer),
        width=options.width,
        mlp_width=options.mlp_width,
        layers=(Layer(),) * options.num_layers,
        num_heads=options.num_heads,
        num_kv_heads=options.num_kv_heads,
        head_size=options.width // options.num_heads,
        rotaries=(Rotary(100.0),),  # rows are short: a low base turns all frequencies
        norm_eps=1e-6,
        max_position=longest,
        tied_head=True,
        qkv_bias=True,
    )
    return Policy(model, tokenizer, (tokenizer.eos_token_id,), None)


@dataclasses.dataclass(frozen=True)
class Found:
    """A model found by `find_model`."""

    policy: policy_lib.Policy
    saved: tuple[str | Path, int] | None  # (folder, number) of a checkpoint; None: the policy's
    said: str  # for a run: the step of the model; "": no run
    step: int = 0  # of the checkpoint


def find_model(path: str, option: str = "--model", *, may_score: bool = False) -> Found:
    """The model of a Hugging Face folder or hub id, or of a run's folder.

    For a run it is the export or the newest checkpoint, whichever is later; RUN@STEP and RUN@best
    name a checkpoint. `may_score`: also of a run that trains a reward model. Raises ValueError,
    which names the `option`, if there is no model, or none that writes.
    """
    run, at, which = path.rpartition("@")
    if at and not Path(path).exists() and _is_run(Path(run)):
        return _checkpoint(Path(run), which, option, may_score)
    folder = Path(path)
    if not _is_run(folder):
        return Found(policy_lib.read(path, option), None, "")
    export, saved = folder / "export", _checkpoints_of(folder)
    exported = workdir.exported(export) if (export / "config.json").exists() else None
    if "://" in str(saved) or Path(saved).is_dir():
        with contextlib.suppress(saved_lib.NoneWhole), saved_lib.Saved(saved) as newest:
            if exported is None or newest.number > exported["updates"]:
                return _found(folder, newest, option, may_score)
    if exported is None and not (export / "config.json").exists():
        raise ValueError(f"{option} {folder} is the folder of a run that has no checkpoint yet.")
    step = "an unknown step" if exported is None else f"step {exported['step']}"
    return Found(policy_lib.read(str(export), option), None, f"{folder}: export of {step}")


def _checkpoint(folder: Path, which: str, option: str, may_score: bool) -> Found:
    """The checkpoint of a run by step, "best" or "newest"."""
    saved = _checkpoints_of(folder)
    number = None if which == "newest" else saved_lib.find(saved, which)
    with saved_lib.Saved(saved, number) as chosen:
        return _found(folder, chosen, option, may_score)


def _found(folder: Path, checkpoint: saved_lib.Saved, option: str, may_score: bool) -> Found:
    options = record.read(folder / "config.json")["options"]
    source = options["model.path"] or str(folder / "bootstrap" / "export")
    step = checkpoint.facts().get("state", {}).get("step", checkpoint.number)
    if checkpoint.head == "scalar" and not may_score:
        raise ValueError(
            f"{option} {folder} is the run of a reward model: it scores texts, and has no head "
            "that writes one. Give a language model."
        )
    policy = policy_lib.read(source, kept=folder / "source", head=checkpoint.head)
    policy = lora.adapted_policy(policy, lora.recorded(options), folder / lora.KEPT)
    said = f"{folder}: checkpoint of step {step}"
    return Found(policy, (_checkpoints_of(folder), checkpoint.number), said, step)


def _checkpoints_of(folder: Path) -> str | Path:
    options = record.read(folder / "config.json")["options"]
    return options["checkpoint.folder"] or folder / "checkpoints"


def _is_run(folder: Path) -> bool:
    """Whether a folder is a run's folder, by its record."""
    file = folder / "config.json"
    if not file.is_file() or (folder / "tokenizer_config.json").exists():
        return (folder / "checkpoints").is_dir()
    try:
        return "binding" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / "checkpoints").is_dir()


def load_params(found: Found, mesh: Mesh, dtype) -> Params:
    """The weights of a found model."""
    policy = found.policy
    if found.saved is None:
        return policy_lib.load_params(policy, mesh, seed=0, dtype=dtype)
    frozen = lora.frozen_params(policy, mesh, dtype)
    with saved_lib.Saved(*found.saved) as checkpoint:
        params = checkpoint.params(policy_lib.trained_like(policy.model, mesh))
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    return attached(frozen, params, policy.model)


def trained_params(found: Found, mesh: Mesh) -> tuple[Params, Params | None]:
    """(trained, frozen) weights of a found checkpoint, at the precision of training.

    Frozen weights are None if all weights are trained.
    """
    assert found.saved is not None
    policy = found.policy
    frozen = lora.frozen_params(policy, mesh, jnp.dtype(policy.stored or "float32"))
    with saved_lib.Saved(*found.saved) as checkpoint:
        return checkpoint.trained(policy_lib.trained_like(policy.model, mesh)), frozen


def open_model(path: str, mesh: Mesh, dtype) -> tuple[policy_lib.Policy, Params]:
    """Policy and weights of the model that `find_model` finds."""
    found = find_model(path)
    return found.policy, load_params(found, mesh, dtype)


def first_reference(
    config: ConfigDict, policy: Policy, mesh: Mesh, frozen: Params | None, kept: Path
) -> Params:
    """The policy as it begins, at the precision of scoring; in host memory if the config says so.

    For adapters the frozen weights without a copy. `kept`: the run's copy of lora.path.
    """
    if frozen is not None:
        return lora.reference(config, policy, mesh, frozen, kept)
    params = policy_lib.load_params(policy, mesh, config.seed, jnp.dtype(config.model.dtype))
    return transfer.to_host_memory(params) if config.model.offload_reference else params
