"""What TRL's trainers have in common here: their arguments, and what comes after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from grpo_jax.api.trained import Trained
from grpo_jax.trl.arguments import Arguments


class Trainer:
    """The arguments of a trainer of TRL that all have; ValueError for one that is refused."""

    refused: ClassVar[Mapping[str, str]] = {}  # arguments that must be None, and why
    suffix: ClassVar[str]  # of the default output_dir
    config: ClassVar[type[Arguments]]

    def __init__(
        self,
        model: Any,
        args: Arguments | None,
        train_dataset: Any,
        optimizers: Sequence,
        refused: Mapping[str, Any],
    ):
        own = type(self).__name__
        if not isinstance(model, (str, Path)):
            raise ValueError(
                f"{own}(model=...) is a {type(model).__name__}. Give the folder or hub id of "
                "a Hugging Face model: JAX has weights of its own."
            )
        for name, value in refused.items():
            if name not in self.refused:
                raise ValueError(f"{own} has no argument {name}.")
            if value is not None:
                raise ValueError(f"{own}({name}=...): {self.refused[name]}.")
        if tuple(optimizers) != (None, None):
            raise ValueError(
                f"{own}(optimizers=...): AdamW, by the options of {self.config.__name__}."
            )
        if train_dataset is None or isinstance(train_dataset, str):
            raise ValueError(
                f"{own} needs a train_dataset: a datasets.Dataset, or a list of dicts."
            )
        self.args = args or self.config(f"{Path(str(model)).name}-{self.suffix}")
        self.run: Trained | None = None

    def save_model(self, output_dir: str | None = None) -> Path:
        """The folder of the trained model, which transformers loads."""
        if self.run is None or not self.run.is_finished:
            raise ValueError("save_model() comes after train(), once the run has finished.")
        if output_dir is not None:
            raise ValueError(
                f"save_model({output_dir!r}): the model is in {self.run.workdir / 'export'}."
            )
        return self.run.workdir / "export"
