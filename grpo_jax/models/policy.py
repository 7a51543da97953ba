"""The model that a run trains: its shape, its tokenizer, and the tokens that end a completion."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from grpo_jax import keys
from grpo_jax.devices import sharding
from grpo_jax.devices.compiling import Call
from grpo_jax.kernels.nf4 import NF4
from grpo_jax.messages.console import say
from grpo_jax.models import lora, parameters
from grpo_jax.models.hf import config_json, export, weights
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.hf import tokenizer as tokenizer_lib
from grpo_jax.structs import Array, ModelConfig, Params


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model without its weights: what all programs need besides them."""

    model: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]
    source: Path | None  # Hugging Face folder it was read from; None: a new model
    stored: str | None = None  # dtype of the weights there
    kept: Path | None = None  # a copy of its files for the export; None: no copy
    pad_id: int | None = None  # the pad token, after which a scalar head is not read
    has_new_head: bool = False  # the source has an LM head, and the model a scalar one

    def within(self, longest: int) -> Policy:
        """The policy for rows of at most `longest` tokens; see `ModelConfig.within`."""
        return dataclasses.replace(self, model=self.model.within(longest))

    def text(self, ids, after: Sequence[int] = ()) -> str:
        """Completion ids as text, special tokens left out.

        Some tokenizers drop the space at the start of a text; with the prompt's ids as `after` it
        is kept.
        """
        decode = lambda row: self.tokenizer.decode(row, skip_special_tokens=True)  # noqa: E731
        ids, before = [int(i) for i in ids], decode(list(after)) if after else ""
        whole = decode([*after, *ids])
        return whole[len(before) :] if whole.startswith(before) else decode(ids)

    def refuse_unknown(self, ids: Sequence[int], where: str) -> None:
        """Raises ValueError if a token is outside the model's vocabulary; `where` names the text.

        This happens if tokens were added to the tokenizer without resizing the model. A lookup in
        the embedding would return its last row.
        """
        if not len(ids) or max(ids) < self.model.vocab_size:
            return
        unknown = max(ids)
        raise ValueError(
            f"{where} holds the token {self.tokenizer.convert_ids_to_tokens(unknown)!r} (id "
            f"{unknown}), for which the model has no embedding: the tokenizer has "
            f"{len(self.tokenizer)} tokens, and the model's vocab_size is {self.model.vocab_size}. "
            "Leave the token out, or resize the model's embeddings."
        )

    def check_length(
        self,
        prompt_ids: Sequence[Sequence[int]],
        max_tokens: int,
        option: str = "rollout.max_tokens",
    ) -> None:
        """Raises ValueError if prompt and completion exceed the model's maximal length.

        `option` is the option that sets `max_tokens`.
        """
        longest, most = max(map(len, prompt_ids)), self.model.max_position
        if longest + max_tokens > most:
            mend = f", or set {option} to {most - longest} or less" if longest < most else ""
            raise ValueError(
                f"The longest prompt has {longest} tokens; with a completion of {max_tokens} "
                f"({option}) that is {longest + max_tokens}, and the model takes {most}. Leave "
                f'long prompts out with data.max_prompt_tokens and data.overlong = "drop"{mend}.'
            )


def find(
    path: str, option: str = "model.path", kept: Path | None = None, file: str = "config.json"
) -> Path:
    """The folder of a model; if it is gone, `kept`, the run's copy of its files.

    `option` is the option that gave the path; the copy is valid if it has `file`. Raises ValueError
    if there is neither.
    """
    try:
        return folder_lib.resolve(path, option)
    except ValueError:
        if kept is None or not (kept / file).exists():
            raise
        return kept


def read(
    path: str, option: str = "model.path", kept: Path | None = None, head: str = "vocabulary"
) -> Policy:
    """The policy of a Hugging Face folder or hub id; ValueError for a broken one.

    `option` and `kept` as in `find`; a policy from `kept` has no weights. `head` as in
    `ModelConfig`: of a folder with an LM head, a model with a scalar head gets a new one. A folder
    with a scalar head has no other.
    """
    folder = find(path, option, kept)
    if folder == kept:
        say(
            f"warning: {folder_lib.as_given(path, option)} is not there any more. Its config and "
            f"tokenizer are those that the run has kept in {kept}."
        )
    model = folder_lib.read_config(folder, folder_lib.as_given(path, option))
    _refuse_head(model, head, folder_lib.as_given(path, option))
    tokenizer = tokenizer_lib.load_tokenizer(folder)
    if tokenizer.vocab_size > model.vocab_size:  # without added tokens
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model's vocab_size "
            f"is {model.vocab_size}. They do not belong together."
        )
    stop_ids = tokenizer_lib.stop_ids(folder, tokenizer, model.vocab_size)
    pad_id = tokenizer_lib.pad_id(folder_lib.read_json(folder / "config.json"), tokenizer)
    return Policy(
        dataclasses.replace(model, head=head),
        tokenizer,
        stop_ids,
        folder,
        weights.stored_dtype(folder),
        pad_id=pad_id,
        has_new_head=head != model.head,
    )


def _refuse_head(model: ModelConfig, head: str, given: str) -> None:
    """Raises ValueError if a folder's model cannot have this head."""
    if head == "scalar":
        config_json.refuse_scalar(model, given)
    elif model.head == "scalar":
        raise ValueError(
            f"{given} is a reward model (config.json: ForSequenceClassification): it gives a "
            "score to a text and has no head that writes one. Give a language model "
            "(ForCausalLM); a reward model goes to rewards.names, reward_model or critic.path."
        )


def keep(policy: Policy, folder: Path) -> Policy:
    """The policy, after copying the source's files that its export needs to `folder`."""
    if policy.source is None or policy.source == folder:
        return policy
    if jax.process_index() == 0:  # the process that exports
        export.keep(folder, policy.model, policy.source, policy.stored, policy.tokenizer)
    return dataclasses.replace(policy, kept=folder)


def load_params(
    policy: Policy,
    mesh: Mesh,
    seed: int,
    dtype=jnp.float32,
    keep: Callable[[Any, Array], Any] = lambda path, x: x,
    codes: Callable[[Any], NF4 | None] = lambda path: None,
    parts: Collection[str] | None = None,
) -> Params:
    """The policy's weights, sharded over the devices: read from its source, or fresh.

    `keep`, `codes` and `parts` (of a policy with a source) as in `weights.load_params`. Raises
    ValueError, naming the array, if a weight from the source is not finite.
    """
    if policy.source is not None:
        model = policy.model
        model = dataclasses.replace(model, head="none") if policy.has_new_head else model
        params = weights.load_params(policy.source, model, mesh, dtype, keep, codes, parts)
        refuse_nonfinite(params, mesh, f"{policy.source}", "Get its files again.")
        if policy.has_new_head and parts is None:
            return params | {"score": load_head(policy, mesh, seed, dtype)}
        return params
    return drawing(policy.model, mesh, keys.key_for(seed, "init"), dtype)()


def load_head(policy: Policy, mesh: Mesh, seed: int, dtype=jnp.float32) -> Params:
    """The scalar head of a policy with a source: read from there, or fresh. Raises as above."""
    if policy.has_new_head:
        return drawing_head(policy.model, mesh, keys.key_for(seed, "head"), dtype)()
    return load_params(policy, mesh, seed, dtype, parts=("score",))["score"]


def drawing(model: ModelConfig, mesh: Mesh, key: Array, dtype=jnp.float32) -> Call:
    """The program that initializes a new model's weights."""
    shardings = jax.tree.map(lambda x: x.sharding, param_like(model, mesh))

    @functools.partial(jax.jit, out_shardings=shardings)
    def init_params(key: Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), parameters.init(model, key))

    return Call(init_params, (key,))


def drawing_head(model: ModelConfig, mesh: Mesh, key: Array, dtype=jnp.float32) -> Call:
    """The program that initializes a scalar head."""
    placed = jax.tree.map(lambda x: x.sharding, param_like(model, mesh)["score"])

    @functools.partial(jax.jit, out_shardings=placed)
    def init_head(key: Array) -> Params:
        head = parameters.scalar_head(model, key)
        return jax.tree.map(lambda x: x.astype(dtype), head)

    return Call(init_head, (key,))


def new_adapters(
    model: ModelConfig, mesh: Mesh, seed: int, dtype=jnp.float32, purpose: str = "adapters"
) -> Params:
    """New adapters, which do not change the model yet; `purpose`: of their random key."""
    return drawing_adapters(model, mesh, keys.key_for(seed, purpose), dtype)()


def drawing_adapters(model: ModelConfig, mesh: Mesh, key: Array, dtype=jnp.float32) -> Call:
    """The program that initializes new adapters, which do not change the model yet."""
    placed = jax.tree.map(lambda x: x.sharding, trained_like(model, mesh)["layers"])

    @functools.partial(jax.jit, out_shardings={"layers": placed})
    def init_adapters(key: Array) -> Params:
        return jax.tree.map(lambda x: x.astype(dtype), lora.init(model, key))

    return Call(init_adapters, (key,))


def refuse_nonfinite(tree: Any, mesh: Mesh, source: str, remedy: str) -> None:
    """Raises ValueError if arrays of a tree have NaN or infinities; `source` names their origin."""
    counting = counting_nonfinite(tree, mesh)
    (floats,) = counting.args
    wrong = {name: int(n) for name, n in jax.device_get(counting()).items() if n}
    if wrong:
        name = min(wrong, key=lambda n: (not n.startswith("params/"), n))
        more = f", and {len(wrong) - 1} more arrays have such" if len(wrong) > 1 else ""
        raise ValueError(
            f"{source}: {wrong[name]} of the {floats[name].size} values of {name} are NaN or "
            f"infinite{more}. {remedy}"
        )


def counting_nonfinite(tree: Any, mesh: Mesh) -> Call:
    """The program that counts NaN and infinities by array name."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    floats = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    }

    @functools.partial(jax.jit, out_shardings=sharding.replicated(mesh))
    def count_nonfinite(arrays: dict[str, Array]) -> dict[str, Array]:
        return {name: (~jnp.isfinite(x)).sum() for name, x in arrays.items()}

    return Call(count_nonfinite, (floats,))


def param_like(model: ModelConfig, mesh: Mesh) -> Params:
    """Shape, dtype (float32) and sharding of every parameter, without arrays."""
    return _like(mesh, parameters.param_shapes(model), parameters.logical_axes(model))


def trained_like(model: ModelConfig, mesh: Mesh) -> Params:
    """The same of the trained parameters."""
    return _like(mesh, lora.trained_shapes(model), lora.trained_axes(model))


def _like(mesh: Mesh, shapes: Params, axes: Params) -> Params:
    placed = sharding.tree_shardings(mesh, axes, shapes)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
    )
