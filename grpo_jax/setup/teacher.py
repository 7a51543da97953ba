"""The teacher of a config: a frozen model that scores the policy's completions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.kernels import attention
from grpo_jax.learner.experience import Prepare
from grpo_jax.learner.scoring import Scorer
from grpo_jax.learner.update import Update
from grpo_jax.messages.values import shown
from grpo_jax.models import policy as policy_lib
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.policy import Policy
from grpo_jax.structs import ModelConfig, Params

_OPTION = "distill.teacher"


def shape(config: ConfigDict) -> ModelConfig | None:
    """The shape of the config's teacher; None if it has none."""
    path = config.distill.teacher
    if not path:
        return None
    found = folder_lib.read_config(
        policy_lib.find(path, _OPTION), folder_lib.as_given(path, _OPTION)
    )
    return found.within(derived.longest_row(config))


def read(config: ConfigDict, policy: Policy) -> Policy | None:
    """The config's teacher, without weights; None if it has none.

    Raises ValueError if its tokens are not those of the policy.
    """
    path = config.distill.teacher
    if not path:
        return None
    teacher = policy_lib.read(path, _OPTION).within(derived.longest_row(config))
    named = f"{_OPTION} = {shown(path)}"
    own, theirs = policy.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if own != theirs:
        differing = sorted(t for t in own.keys() | theirs.keys() if own.get(t) != theirs.get(t))
        first = differing[0]
        raise ValueError(
            f"{named} has another tokenizer than the policy: {len(differing)} tokens differ, such "
            f"as {shown(first)}, which is {_number(own, first)} for the policy and "
            f"{_number(theirs, first)} for the teacher. Choose a teacher of the same family, or "
            "imitate its texts with grpo_jax.sft."
        )
    sizes = policy.model.vocab_size, teacher.model.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{named} has a vocabulary of {sizes[1]} entries in its weights, and the policy one of "
            f"{sizes[0]}: their distributions have different lengths. Resize the embeddings of one "
            "of them."
        )
    if teacher.model.codes:
        raise ValueError(
            f"{named} has its kernels in NF4 (bitsandbytes), and a teacher needs whole ones. Give "
            "the model that they were made from, such as the id without its -bnb-4bit."
        )
    return teacher


def _number(vocabulary: dict[str, int], token: str) -> str:
    return f"number {vocabulary[token]}" if token in vocabulary else "unknown"


def scorer_of(scorer: Scorer, teacher: ModelConfig) -> Scorer:
    """The teacher's scorer, whose rows are those of the policy's `scorer`.

    Raises ValueError if the mesh splits the attention of the two models differently.
    """
    found = dataclasses.replace(scorer, model=teacher)
    if not scorer.kernels.shares_lanes or teacher.head_size != scorer.model.head_size:
        found = dataclasses.replace(found, kernels=attention)
    if found.parts != scorer.parts:
        raise ValueError(
            f"mesh.tensor = {scorer.mesh.shape['tensor']} splits {scorer.model.num_kv_heads} "
            f"key-value heads of the policy and {teacher.num_kv_heads} of {_OPTION} differently, "
            "so that their rows do not match. Set mesh.tensor to a divisor of both."
        )
    return found


def told(config: ConfigDict, teacher: Policy | None) -> list[str]:
    """A description of the teacher, in a line."""
    if teacher is None:
        return []
    model, distill = teacher.model, config.distill
    how = f"beta {distill.beta:g}" if distill.loss == "divergence" else "as a reward of each token"
    return [
        f"Teacher: {model.family}, {model.num_params:,} parameters, from {distill.teacher}; "
        f"{how}, weight {distill.coef:g}"
    ]


def load(config: ConfigDict, teacher: Policy, mesh: Mesh) -> Params:
    """The teacher's weights, in the precision of activations."""
    return policy_lib.load_params(teacher, mesh, config.seed, jnp.dtype(config.model.dtype))


def like(config: ConfigDict, teacher: ModelConfig, mesh: Mesh) -> Params:
    """Shapes and shardings of `load`."""
    dtype = jnp.dtype(config.model.dtype)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding),
        policy_lib.param_like(teacher, mesh),
    )


def given_to(prepare: Prepare, update: Update, weights: Any) -> tuple[Prepare, Update]:
    """Both with the weights of the teacher, where they read one."""
    if prepare.score_teacher is not None:
        return dataclasses.replace(prepare, teacher=weights), update
    return prepare, dataclasses.replace(update, teacher=weights)
