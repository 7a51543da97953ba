"""TRL's `GRPOTrainer`: it translates TRL's arguments and calls `grpo_jax.train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.api.trained import Trained
from grpo_jax.api.training import train
from grpo_jax.trl.base import Trainer, num_devices
from grpo_jax.trl.callbacks import functions_of
from grpo_jax.trl.config import GRPOConfig, options_of
from grpo_jax.trl.lora import options_of_peft

_REFUSED = {
    "processing_class": "the tokenizer of the model's folder is used",
    "reward_processing_classes": "the tokenizer of the reward model's folder is used",
    "quantization_config": "lora.base_dtype among the options",
    "rollout_func": "write an environment with a method `respond` (docs/environments.md)",
}

_NO_LIMIT = 1_000_000  # turns


class GRPOTrainer(Trainer):
    """TRL 1.16's `GRPOTrainer`: its arguments, `train()` and `save_model()`.

    `reward_funcs`: functions, names of built-in rewards, and folders or hub ids of reward models.
    `callbacks` are functions, as for `grpo_jax.train`, or instances of `TrainerCallback`, whose
    on_step_end, on_log and on_evaluate are called. `peft_config` is PEFT's `LoraConfig`.
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
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        tools: Sequence[Callable] | None = None,
        environment_factory: Any = None,
        options: dict[str, Any] | None = None,
        **refused: Any,
    ):
        needed = train_dataset
        if train_dataset is None and environment_factory is not None:
            needed = ()  # made in train()
        super().__init__(model, args, needed, optimizers, refused)
        if needed is not train_dataset:
            self._check_without_data(environment_factory)
        self._model, self._callbacks = model, tuple(callbacks or ())
        functions_of(self._callbacks, self.args)  # refuses others at once
        self._data = train_dataset, eval_dataset
        self._options = options_of_peft(peft_config) | dict(options or {})
        self._tools, self._environments = tools, environment_factory
        self._rewards = _weighed(reward_funcs, self.args.reward_weights)

    def train(self, resume_from_checkpoint: bool | None = None) -> Trained:
        """Trains, or continues in `args.output_dir`; returns the result of `grpo_jax.train`."""
        self._check_resume(resume_from_checkpoint)
        data, eval_data = self._data
        converses = bool(self._tools or self._environments)
        rows = 0 if data is None else len(data)
        options = options_of(self.args, rows, num_devices()) | self._options
        if data is None:  # an episode's random numbers are those of its problem
            number = options["batch.prompts"] * options["loop.num_steps"]
            data = [{"prompt": [{"role": "user", "content": ""}]}] * number
        if converses:
            calls = self.args.max_tool_calling_iterations
            options.setdefault("environment.max_turns", _NO_LIMIT if calls is None else calls + 1)
        updates = options["batch.minibatches"] * self.args.num_iterations
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
            callbacks=functions_of(self._callbacks, self.args, updates),
            **options,
        )
        return self.run

    def _check_without_data(self, environment_factory: Any) -> None:
        """Raises ValueError if environments alone do not say what is asked, and how long."""
        if isinstance(environment_factory, Mapping):
            raise ValueError(
                "GRPOTrainer(environment_factory={...}) needs a train_dataset whose column "
                "`environment` names one for each row."
            )
        if self.args.max_steps <= 0:
            raise ValueError(
                "GRPOTrainer without a train_dataset needs GRPOConfig(max_steps=...): how long it "
                "trains. Its environment's reset() returns the prompt."
            )

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
    return list(zip(map(_reward, functions), weights))


def _reward(function: Any) -> Any:
    """A reward; a folder or hub id is that of a reward model, as in TRL. ValueError for a model."""
    if hasattr(function, "forward") and hasattr(function, "config"):
        raise ValueError(
            f"reward_funcs holds a {type(function).__name__}. Give the reward model's folder or "
            "hub id: JAX has weights of its own."
        )
    is_name = isinstance(function, str) and ":" not in function
    if is_name and ("/" in function or Path(function).is_dir()):
        return f"model:{function}"
    return function
