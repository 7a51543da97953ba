"""TRL's trainers of given completions: they translate its arguments and call `grpo_jax.sft`."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from typing import Any

from grpo_jax.api import given
from grpo_jax.api.trained import Trained
from grpo_jax.trl import given_config as configs
from grpo_jax.trl.base import Trainer, num_devices
from grpo_jax.trl.callbacks import functions_of
from grpo_jax.trl.lora import options_of_peft

_REFUSED = {
    "processing_class": "the tokenizer of the model's folder is used",
    "data_collator": "rows are packed by the run itself",
    "compute_metrics": "callbacks see the metrics of each step",
    "quantization_config": "lora.base_dtype among the options",
}
_OF_SFT = {
    "compute_loss_func": "SFTConfig(loss_type=...)",
    "optimizer_cls_and_kwargs": "AdamW, by the options of SFTConfig",
    "preprocess_logits_for_metrics": "metrics are those of docs/metrics.md",
    "formatting_func": "map the dataset to a column `text` before",
}
_OF_DPO = {"ref_model": "the reference is the model as training begins, or without its adapters"}
_EXPERIMENTAL = {
    "model_init": "give the folder or hub id of a model as `model`",
    "preprocess_logits_for_metrics": "metrics are those of docs/metrics.md",
}
_OF_REWARD = {
    "optimizer_cls_and_kwargs": "AdamW, by the options of RewardConfig",
    "preprocess_logits_for_metrics": "metrics are those of docs/metrics.md",
}


class _GivenTrainer(Trainer):
    """A trainer of given completions, by the run and the translation of its subclass."""

    metric: str  # of the held-out loss
    head = "vocabulary"  # of the model, or "scalar"
    _train: Callable[..., Trained]
    _options_of: Callable[..., dict[str, Any]]

    def __init__(
        self,
        model: str,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        options: dict[str, Any] | None = None,
        **refused: Any,
    ):
        super().__init__(model, args, train_dataset, optimizers, refused)
        for name, rows in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            if rows is not None and not isinstance(rows, Sized):
                raise ValueError(
                    f"{type(self).__name__}({name}=...) is a {type(rows).__name__}, which has no "
                    "length. Give a datasets.Dataset or a list of dicts; data.streaming of "
                    f"grpo_jax.{type(self)._train.__name__} reads data from files while it trains."
                )
        self._model, self._callbacks = model, functions_of(callbacks or (), self.args)
        self._data = train_dataset, eval_dataset
        adapters = options_of_peft(peft_config, type(self).__name__, self.head)
        self._options = adapters | dict(options or {})

    def train(self, resume_from_checkpoint: bool | None = None) -> Trained:
        """Trains, or continues in `args.output_dir`; returns the result of `grpo_jax.sft`."""
        self._check_resume(resume_from_checkpoint)
        data, held_out = self._data
        number = 0 if held_out is None else len(held_out)
        options = type(self)._options_of(self.args, len(data), number, num_devices())
        if not options["evaluation.num_problems"]:
            held_out = None
        self.run = type(self)._train(
            self._model,
            data,
            held_out,
            workdir=self.args.output_dir,
            callbacks=self._callbacks,
            **options | self._options,
        )
        return self.run

    def evaluate(self) -> dict[str, float]:
        """The metrics of the eval_dataset at the run's end, by this trainer's names."""
        if self.run is None:
            raise ValueError("evaluate() comes after train().")
        measured = [row for row in self.run.metrics if self.metric in row]
        if not measured:
            raise ValueError(
                f"{type(self).__name__} measured nothing. Give it an eval_dataset, and "
                f"{self.config.__name__}(eval_strategy='steps')."
            )
        section = self.metric.partition("/")[0]
        return {name: x for name, x in measured[-1].items() if name.startswith(f"{section}/eval_")}


class SFTTrainer(_GivenTrainer):
    """TRL 1.16's `SFTTrainer`: its arguments, `train()`, `evaluate()` and `save_model()`.

    `train_dataset`: a `datasets.Dataset` or a list of dicts, of texts, chats, or prompts with
    completions. `callbacks` are as for `GRPOTrainer`. `peft_config` is PEFT's `LoraConfig`.
    `options` are this trainer's options by name, for settings that TRL does not have. Raises
    ValueError for arguments that this trainer does not support.
    """

    refused = _REFUSED | _OF_SFT
    suffix = "SFT"
    config = configs.SFTConfig
    metric = "sft/eval_loss"
    _train = staticmethod(given.sft)
    _options_of = staticmethod(configs.options_of_sft)


class DPOTrainer(_GivenTrainer):
    """TRL 1.16's `DPOTrainer`, of pairs; otherwise as `SFTTrainer`."""

    refused = _REFUSED | _OF_DPO
    suffix = "DPO"
    config = configs.DPOConfig
    metric = "preference/eval_loss"
    _train = staticmethod(given.dpo)
    _options_of = staticmethod(configs.options_of_dpo)


class KTOTrainer(_GivenTrainer):
    """TRL 1.16's `KTOTrainer`, of completions with labels; otherwise as `SFTTrainer`."""

    refused = _REFUSED | _OF_DPO
    suffix = "KTO"
    config = configs.KTOConfig
    metric = "preference/eval_loss"
    _train = staticmethod(given.dpo)
    _options_of = staticmethod(configs.options_of_kto)


class ORPOTrainer(_GivenTrainer):
    """TRL 1.16's `trl.experimental.orpo.ORPOTrainer`, of pairs; otherwise as `SFTTrainer`."""

    refused = _REFUSED | _EXPERIMENTAL
    suffix = "ORPO"
    config = configs.ORPOConfig
    metric = "preference/eval_loss"
    _train = staticmethod(given.dpo)
    _options_of = staticmethod(configs.options_of_orpo)


class CPOTrainer(_GivenTrainer):
    """TRL 1.16's `trl.experimental.cpo.CPOTrainer`, of pairs; otherwise as `SFTTrainer`."""

    refused = _REFUSED | _EXPERIMENTAL
    suffix = "CPO"
    config = configs.CPOConfig
    metric = "preference/eval_loss"
    _train = staticmethod(given.dpo)
    _options_of = staticmethod(configs.options_of_cpo)


class RewardTrainer(_GivenTrainer):
    """TRL 1.16's `RewardTrainer`, of pairs; otherwise as `SFTTrainer`."""

    refused = _REFUSED | _OF_REWARD
    suffix = "Reward"
    config = configs.RewardConfig
    metric = "reward_model/eval_loss"
    head = "scalar"
    _train = staticmethod(given.reward_model)
    _options_of = staticmethod(configs.options_of_reward)
