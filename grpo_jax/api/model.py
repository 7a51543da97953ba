"""`grpo_jax.load`: a model for generation from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from grpo_jax import cli, generate
from grpo_jax.data.problems import Problem
from grpo_jax.devices import sharding
from grpo_jax.generate import Completions
from grpo_jax.sampling.engine import Engine
from grpo_jax.setup.model import find_model, load_params
from grpo_jax.structs import Params, Sampling

Prompt = str | list[dict[str, Any]]  # a text, or chat messages


class Model:
    """A model with its weights on the devices. `load` makes one."""

    def __init__(self, path: str | Path, *, dtype: str = "float32"):
        cli.use_compile_cache()
        self.path = str(path)
        found = find_model(self.path)
        self._mesh, self._dtype = sharding.make_mesh(), jnp.dtype(dtype)
        self._policy = found.policy
        with cli.held_settings():
            self._params = load_params(found, self._mesh, self._dtype)
        self._engines: dict[tuple, tuple[Engine, Params]] = {}  # with its published weights

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, of transformers."""
        return self._policy.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_tokens: int = 256,
        num_samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> Completions | list[Completions]:
        """Completes prompts: raw texts, or chat messages through the chat template.

        Returns `Completions` for one prompt, and a list of them for a list of prompts.
        `temperature` 0 takes the most likely token; `top_k` 0 keeps all tokens. Raises ValueError
        for a prompt that is too long.
        """
        generate.check(
            max_tokens=max_tokens, num_samples=num_samples, seed=seed, top_k=top_k,
            temperature=temperature, top_p=top_p,
        )  # fmt: skip
        is_one = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], dict))
        asked = [prompts] if is_one else list(prompts)
        if not asked:
            return []
        ids = [
            generate.encode_prompt(
                self._policy, Problem(prompt, {}, f"prompts[{number}]"), max_tokens
            )
            for number, prompt in enumerate(asked)
        ]
        sampling = Sampling(temperature, top_k, top_p)
        with cli.held_settings():
            engine, published = self._engine(sampling, max_tokens, max(map(len, ids)))
            rollouts = generate.complete(
                engine, published, ids, num_samples=num_samples, seed=seed, temperature=temperature
            )
        found = generate.completions(self._policy, ids, rollouts)
        return found[0] if is_one else found

    def _engine(
        self, sampling: Sampling, max_tokens: int, longest_prompt: int
    ) -> tuple[Engine, Params]:
        """The engine for these sampling options; its programs are compiled once."""
        policy = self._policy.within(longest_prompt + max_tokens)
        key = policy.model, sampling, max_tokens
        if key not in self._engines:
            engine = generate.engine_of(policy, self._mesh, sampling, max_tokens, self._dtype)
            self._engines[key] = engine, engine.publish(self._params)
        return self._engines[key]


def load(path: str | Path, *, dtype: str = "float32") -> Model:
    """The model of a Hugging Face folder or hub id, or of a run's folder, finished or not.

        grpo_jax.load("runs/a").generate(["1+2=", "3+4="], max_tokens=64).

    Raises ValueError if there is none.
    """
    return Model(path, dtype=dtype)
