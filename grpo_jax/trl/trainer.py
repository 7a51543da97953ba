"""TRL's `GRPOTrainer`: it translates TRL's arguments and calls `grpo_jax.train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from grpo_jax.api.trained import Trained
from grpo_jax.api.training import train
from grpo_jax.trl.base import Trainer
from grpo_jax.trl.config import GRPOConfig, options_of
from grpo_jax.trl.lora import options_of_peft

_REFUSED = {
    "processing_class": "the tokenizer of the model's folder is used",
    "reward_processing_classes": "reward models are not built yet",
    "quantization_config": "not built yet",
    "rollout_func": "write an environment with a method `respond` (docs/environments.md)",
}

_NO_LIMIT = 1_000_000  # turns


class GRPOTrainer(Trainer):
    """TRL 1.16's `GRPOTrainer`: its arguments, `train()` and `save_model()`.

    `callbacks` are functions, as for `grpo_jax.train`. `peft_config` is PEFT's `LoraConfig`.
    `options` are this trainer's options by name, for settings that TRL does not have. Raises
    ValueError for arguments that this trainer does not support.
    """

    refused = _REFUSED
    suffix = "GRPO"
    config = GRPOConfig

    def __init__(
        self,
        model: str,
        reward_funcs: str | Callable | Sequence[str | Callable] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        callbacks: Sequence[Callable] = (),
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        tools: Sequence[Callable] | None = None,
        environment_factory: Any = None,
        options: dict[str, Any] | None = None,
        **refused: Any,
    ):
        super().__init__(model, args, train_dataset, optimizers, refused)
        self._model, self._callbacks = model, tuple(callbacks)
        self._data = train_dataset, eval_dataset
        self._options = options_of_peft(peft_config) | dict(options or {})
        self._tools, self._environments = tools, environment_factory
        self._rewards = _weighed(reward_funcs, self.args.reward_weights)

    def train(self) -> Trained:
        """Trains, or continues in `args.output_dir`; returns the result of `grpo_jax.train`."""
        data, eval_data = self._data
        converses = bool(self._tools or self._environments)
        options = options_of(self.args, len(data), len(jax.devices())) | self._options
        if converses:
            calls = self.args.max_tool_calling_iterations
            options.setdefault("environment.max_turns", _NO_LIMIT if calls is None else calls + 1)
        if eval_data is not None and str(self.args.eval_strategy) == "no":
            eval_data = None
        self.run = train(
            self._model,
            self._rewards or None,
            data,
            eval_data,
            workdir=self.args.output_dir,
            tools=self._tools,
            environments=self._environments,
            callbacks=self._callbacks,
            **options,
        )
        return self.run

    def evaluate(self, eval_dataset: Any = None) -> dict[str, Any]:
        """Metrics of the trained model on problems, as in `Trained.evaluate`."""
        if self.run is None:
            raise ValueError("evaluate() comes after train().")
        return self.run.evaluate(eval_dataset)


def _weighed(functions: Any, weights: Sequence[float] | None) -> list[tuple[Any, float]]:
    if functions is None:
        return []
    functions = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if len(weights) != len(functions):
        raise ValueError(
            f"reward_weights has {len(weights)} numbers, and reward_funcs {len(functions)} "
            "functions."
        )
    return list(zip(functions, weights))
