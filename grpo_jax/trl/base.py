"""What TRL's trainers have in common here: their arguments, and what comes after training."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from grpo_jax.api.trained import Trained
from grpo_jax.trl.arguments import Arguments

# What scripts of TRL call besides, and what to use here.
_ELSEWHERE = {
    "push_to_hub": "upload the folder that save_model() returns with huggingface_hub",
    "add_callback": "give callbacks=[...] to the trainer",
    "state": "train() returns the run, whose metrics are run.metrics",
    "model": "train() returns the run, whose model is run.model()",
    "processing_class": "run.model().tokenizer is the tokenizer, run being what train() returns",
    "accelerator": "there is none: print() prints",
    "log_metrics": "a run prints its metrics, and run.metrics has them",
    "save_metrics": "metrics.jsonl in the run's folder has them",
    "save_state": "a run saves itself in its folder",
    "hub_model_id": "nothing is uploaded",
}


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
            name = str(getattr(model, "name_or_path", ""))
            raise ValueError(
                f"{own}(model=...) is a {type(model).__name__}. Give the folder or hub id of "
                f"a Hugging Face model{f', here {name!r}' if name else ''}: JAX has weights of its "
                "own."
            )
        for name, value in refused.items():
            if name not in self.refused:
                raise ValueError(f"{own} has no argument {name}.")
            if value is not None and not (name == "processing_class" and _is_own(value, model)):
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

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """The folder of the trained model, which transformers loads.

        It is `export` in the run's folder; with another `output_dir` that folder gets a copy.
        Raises ValueError before the run has finished, and for a folder that is not empty.
        """
        if self.run is None or not self.run.is_finished:
            raise ValueError("save_model() comes after train(), once the run has finished.")
        export = self.run.workdir / "export"
        if output_dir is None or Path(output_dir).resolve() == self.run.workdir.resolve():
            return export
        folder = Path(output_dir)
        if jax.process_index() == 0:
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(
                    f"save_model({str(folder)!r}): that folder is not empty. Give another; the "
                    f"model is in {export}."
                )
            shutil.copytree(export, folder, dirs_exist_ok=True)
        return folder

    def _check_resume(self, resume_from_checkpoint: bool | str | None) -> None:
        """Raises ValueError for a checkpoint: a run goes on from its own newest one."""
        if isinstance(resume_from_checkpoint, (str, Path)):
            raise ValueError(
                f"train(resume_from_checkpoint={str(resume_from_checkpoint)!r}): a run goes on "
                "from the newest checkpoint in its output_dir by itself. To begin another run from "
                "a checkpoint, give model='RUN@STEP' and another output_dir."
            )

    def __getattr__(self, name: str) -> Any:
        if name in _ELSEWHERE:
            raise AttributeError(f"{type(self).__name__} has no {name}: {_ELSEWHERE[name]}.")
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def num_devices() -> int:
    """The factor of TRL's batch sizes: accelerators, or on CPUs processes, as in TRL.

    A CPU's cores may be devices of JAX, and a batch must not depend on their number. Where there
    can be no accelerator, JAX does not start yet: the run makes its cores devices before.
    """
    is_alone = not jax.distributed.is_initialized()
    plugins = ("jax_plugins", "libtpu")
    if is_alone and not any(importlib.util.find_spec(name) for name in plugins):
        return 1
    return jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()


def _is_own(tokenizer: Any, model: str | Path) -> bool:
    """Whether it is the tokenizer of the model's folder or hub id, unchanged but for padding."""
    if str(getattr(tokenizer, "name_or_path", "")) != str(model):
        return False
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(str(model), trust_remote_code=False)
    return all(
        getattr(tokenizer, name, None) == getattr(own, name, None)
        for name in ("chat_template", "eos_token", "bos_token")
    ) and (tokenizer.get_vocab() == own.get_vocab())
