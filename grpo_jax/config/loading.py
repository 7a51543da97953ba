"""A config file read, with the overrides of the command line."""

from __future__ import annotations

import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.algorithm.presets import PRESETS
from grpo_jax.config import options, other_names, rules
from grpo_jax.config.dotted import assign, flatten, override
from grpo_jax.messages.values import shown

# The files of configs/, as they come with the package.
SHIPPED = Path(__file__).resolve().parents[1] / "configs"


class Usage(ValueError):  # noqa: N818
    """An argument that no program has; the command ends with status 2, as argparse's errors do."""


def load(path: str, overrides: list[str]) -> ConfigDict:
    """The config of a file with `--config.name=value` arguments applied, checked and frozen.

    Raises ValueError, naming the option and the remedy, for anything that is wrong with it.
    """
    config = read(path, overrides)
    rules.check(config)
    return ConfigDict(config).lock()


def read(path: str | None, overrides: list[str]) -> ConfigDict:
    """The same before it is checked. Without a file: the defaults with the overrides."""
    config = options.default() if path is None else _read_file(path)
    for argument in overrides:
        name, equals, text = argument.partition("=")
        if not name.startswith("--config.") or not equals:
            raise Usage(other_names.no_such_argument(argument))
        option = name.removeprefix("--config.")
        if option not in options.BY_NAME:
            raise Usage(other_names.no_such(option))
        override(config, option, text)
    settle(config)
    return config


_SHORT = {"bf16": "bfloat16", "fp32": "float32", "f32": "float32"}


def settle(config: ConfigDict) -> None:
    """Sets what a preset says, and values that people write in another way, such as "bf16"."""
    for name, value in PRESETS.get(config.algorithm.preset, {}).items():
        name = name if "." in name else f"algorithm.{name}"
        if flatten(config)[name] == options.BY_NAME[name].default:
            assign(config, name, value)
    for name, value in flatten(config).items():
        if name.endswith("dtype") and value in _SHORT:
            assign(config, name, _SHORT[value])
    names = config.rewards.names
    if isinstance(names, tuple) and all(isinstance(name, str) for name in names):
        config.rewards.names = tuple(map(_with_colon, names))


def _with_colon(spec: str) -> str:
    """ "module:function" of "module.function" and of "file.py:function"; other names as they are.

    As TRL and verl have them. A file is the module that it is from the current folder.
    """
    name, bracket, arguments = spec.partition("(")
    file, colon, function = name.strip().partition(":")
    if colon and file.endswith(".py"):
        parts = Path(file.removesuffix(".py")).parts
        if not all(map(str.isidentifier, parts)):
            raise ValueError(
                f"rewards.names: {shown(spec)} names a file that is no module from the current "
                'folder. Write "module:function", and begin where the module lies, or set '
                "PYTHONPATH."
            )
        return f"{'.'.join(parts)}:{function}{bracket}{arguments}"
    dotted = re.fullmatch(r"((?:[A-Za-z_]\w*\.)+)([A-Za-z_]\w*)(\s+as\s+\S+)?", name.strip())
    if ":" in name or not dotted:
        return spec
    return f"{dotted[1][:-1]}:{dotted[2]}{dotted[3] or ''}{bracket}{arguments}"


def _read_file(path: str) -> ConfigDict:
    """The config of a file, or of the one in configs/ that has the name `path`."""
    file = Path(path)
    shipped = SHIPPED / f"{path}.py"
    if not file.suffix and not file.is_file() and shipped.is_file():
        file = shipped
    if not file.is_file():
        known = sorted(p.stem for p in SHIPPED.glob("[a-z]*.py"))
        hint = f" Those that come with grpo_jax: {', '.join(known)}." if known else ""
        raise ValueError(f"--config: there is no file {path!r}.{hint}")
    if file.suffix != ".py":
        raise ValueError(f"--config: {path} is not a Python file, NAME.py, as in configs/.")
    spec = importlib.util.spec_from_file_location("grpo_jax_config_file", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (Exception, SystemExit) as error:  # a user's file may fail in any way
        named = _no_option(error, path)
        if named:
            raise ValueError(f"--config: {named}") from error
        raise ValueError(
            f"--config: {path} does not give a config ({type(error).__name__}: {error}). It needs "
            "a function get_config() that changes and returns grpo_jax.config.default()."
        ) from error
    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"--config: get_config() of {path} returns a {type(config).__name__}, not a config. "
            "Let it return the one that it got from grpo_jax.config.default()."
        )
    config.rewards.names = tuple(
        spec_of(name) if callable(name) else name for name in config.rewards.names
    )
    return config


def _no_option(error: BaseException, path: str) -> str:
    """What is said of an error by which a config tells a file that it has no such option, or ""."""
    told = re.search(r'Key "(\w+)" does not exist', str(error))
    name = told[1] if told else isinstance(error, AttributeError) and error.name
    file = str(Path(path).absolute())
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    if not name or not frames or not (told or isinstance(error.obj, ConfigDict)):
        return ""
    section = re.search(rf"\b(\w+)\.{name}\b", frames[-1].line or "")
    if section and section[1] in options.SECTIONS:
        name = f"{section[1]}.{name}"
    return f"{path}, line {frames[-1].lineno}: {other_names.no_such(name)}"


def spec_of(found: Callable) -> str:
    """The name, "module:function", of a function that a config gives in its place.

    Raises ValueError where a worker process could not import it by that: one of the config file
    itself, one within another, or one that was bound.
    """
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", "")
    if found is getattr(sys.modules.get(module), name, None) and module != "__main__":
        return f"{module}:{name}"
    name = getattr(found, "__name__", type(found).__name__)
    raise ValueError(
        f"rewards.names holds the function {name!r} itself, which the processes of rewards could "
        "not import. Put it into a module that Python can import from the current folder, such as "
        f'my_rewards.py, and write "my_rewards:{name}".'
    )
