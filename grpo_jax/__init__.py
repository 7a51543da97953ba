"""grpo_jax: train reasoning language models by Group Relative Policy Optimization, in JAX."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """What programs import from here, on first use: it takes seconds to import."""
    if name in ("train", "sft", "dpo", "reward_model"):  # modules that can be called
        return importlib.import_module(f"grpo_jax.{name}")
    if name == "load":
        return importlib.import_module("grpo_jax.api.model").load
    if name == "load_reward_model":
        return importlib.import_module("grpo_jax.api.reward_model").load_reward_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _leave_current_folder() -> None:
    """Removes the current folder from the path of a program started by `python -m grpo_jax.`.

    Python puts it first, so files beside a model or a data set would be imported in place of
    libraries. If this package itself is there, as in a checkout, the folder is searched last.
    """
    try:
        folder = os.getcwd()
    except OSError:  # deleted, and so not on the path
        return
    if sys.path[:1] == [folder]:
        del sys.path[0]
        if os.path.dirname(os.path.dirname(os.path.abspath(__file__))) == folder:
            sys.path.append(folder)


def _help_early(name: str) -> None:
    """Shows the help of a program, if asked for, before the program's slow imports.

    Errors in the arguments are left to the program.
    """
    if {"-h", "--help"} & {*sys.argv}:
        parsers = importlib.import_module("grpo_jax.config.parsers")
        if name in parsers.BY_PROGRAM:
            with contextlib.suppress(ValueError):
                parsers.help_early(name, sys.argv[1:])


# While Python looks for the module of `-m`, sys.argv[0] is "-m"; the module is the last entry of
# orig_argv before the program's own arguments. An import by any other program changes nothing.
if sys.argv[:1] == ["-m"]:
    _module = sys.orig_argv[-len(sys.argv)]
    if "grpo_jax." in _module:
        if not sys.flags.safe_path:
            _leave_current_folder()
        _help_early(_module.rpartition(".")[2])


def _say_nothing_of_pytorch() -> None:
    """Keeps transformers from reporting at import that PyTorch is missing.

    Only its tokenizers and their files are used here, and they do not need PyTorch.
    """
    import logging  # after the early help

    is_news = lambda record: not str(record.msg).startswith("PyTorch was not found")  # noqa: E731
    logging.getLogger("transformers").addFilter(is_news)


_say_nothing_of_pytorch()
