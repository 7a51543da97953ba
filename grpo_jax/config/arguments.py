"""The arguments of a run's command line, read before anything that takes long is imported."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from ml_collections import ConfigDict

from grpo_jax.config import loading, other_names, reference, rules
from grpo_jax.messages.credentials import redact


@dataclasses.dataclass(frozen=True)
class Processes:
    """How a process of several finds the others, where it does not by itself."""

    coordinator: str = ""  # HOST:PORT of process 0
    num_processes: int | None = None
    process_id: int | None = None


class Asked(NamedTuple):
    """What a run's command line asks for."""

    config: ConfigDict
    folder: Path  # the workdir
    processes: Processes
    check: bool  # to say what the run would be, and end


def prog(name: str) -> str:
    """How a program was called, for its usage line: by the command grpo-jax, or as a module."""
    command = Path(sys.argv[0]).name.split(" ")[0]
    return f"grpo-jax {name}" if command == "grpo-jax" else f"python -m grpo_jax.{name}"


# What stands before a colon in rewards.names and names no module: prefixes of rewards.kinds.
NO_MODULES = {"classifier", "ensemble", "environment", "judge", "model", "python"}

RUNS = {
    "train": "Trains a policy by GRPO.",
    "sft": "Trains a model on texts, chats, or prompts with completions.",
    "dpo": "Trains a model on preferences: DPO and its relatives, KTO, ORPO.",
    "reward_model": "Trains a reward model on pairs, by Bradley and Terry.",
}


def of_run(argv: list[str], name: str) -> Asked:
    """What a run's command line asks for.

    `name`: of the program, one of `RUNS`. Everything but `--config`, `--workdir` and what
    `add_processes` adds must be an override, `--config.name=value`. `--help` lists all options and
    `--print-config` those in force; both end the program. Raises ValueError for what cannot be
    read, and a config that does not fit.
    """
    parser, known, overrides = answer(argv, name)
    if known.config is None:
        parser.error("--config FILE is required; --help lists all options")
    config = load_config(known.config, overrides)
    folder = Path(known.workdir or Path("runs") / Path(known.config).stem)
    return Asked(config, folder, processes(known), getattr(known, "check", False))


def answer(
    argv: list[str], name: str
) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    """Ends the program where it is asked for help or for the config; else what stands there."""
    parser = run_parser(name)
    known, overrides = parse(parser, argv)
    if known.help:
        width = min(shutil.get_terminal_size().columns, 100)
        listing = reference.listing(loading.read(known.config, overrides), width)
        print_and_exit(f"{parser.format_help()}\n{listing}")
    if known.print_config:
        config = loading.read(known.config, overrides)
        rules.check(config)
        print_and_exit(reference.as_file(config))
    return parser, known, overrides


def run_parser(name: str) -> argparse.ArgumentParser:
    """The arguments of a program of `RUNS`."""
    parser = argparse.ArgumentParser(
        prog=prog(name), description=RUNS[name], allow_abbrev=False, add_help=False
    )
    parser.add_argument(
        "-h", "--help", action="store_true", help="show this and all options with FILE's values"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a file as in configs/, or the name of one: quickstart"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the run; default runs/NAME_OF_CONFIG"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="show the options that are in force, and end"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="read the model, the data, the rewards and the devices, say what the run would be and "
        "need, and end; nothing is written",
    )
    parser.usage = f"{parser.prog} --config FILE [--workdir DIR] [--config.NAME=VALUE ...]"
    add_processes(parser)
    return parser


def print_and_exit(text: str) -> NoReturn:
    """Ends the program with a text on standard output."""
    try:
        print(redact(text), flush=True)
    except BrokenPipeError:  # a pager that was left; Python would complain when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit()


def load_config(path: str, overrides: list[str]) -> ConfigDict:
    """The config of a file with overrides, as `loading.load`; what it names can be imported.

    A module of its rewards, environments or tools that is found nowhere else is looked for in the
    config's folder, then in the current one.
    """
    config = loading.load(path, overrides)
    named = *config.environment.classes, *config.environment.tools
    find_modules([*config.rewards.names, *named], Path(path).resolve().parent, Path.cwd())
    return config


def find_modules(specs: Iterable[str], *folders: Path) -> None:
    """Has modules looked for in these folders, too, if one of them is found nowhere else.

    `specs`: entries "module:name", or "other=module:name", with or without arguments in brackets.
    """
    heads = [spec.partition("(")[0].rpartition("=")[2] for spec in specs]
    modules = {head.partition(":")[0].partition(".")[0].strip() for head in heads if ":" in head}
    if any(map(_is_missing, modules - NO_MODULES)):
        sys.path += [str(folder) for folder in folders if str(folder) not in sys.path]


def _is_missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ValueError:  # no name of a module
        return False


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which a process of several finds the others."""
    group = parser.add_argument_group(
        "a run of several processes",
        "Found by itself on TPU pods, GKE and SLURM; elsewhere each process needs all three, or "
        "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID in its environment.",
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of process 0")
    group.add_argument("--num-processes", type=int, metavar="N")
    group.add_argument("--process-id", type=int, metavar="I", help="from 0")


def processes(known: argparse.Namespace) -> Processes:
    """What the options of `add_processes` say."""
    return Processes(known.coordinator, known.num_processes, known.process_id)


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What the parser knows, and the rest as it was written, `--config.name=value` in one.

    `--max_tokens` is taken for `--max-tokens`. Raises `loading.Usage` for what is neither.
    """
    written = {_with_hyphens(argument): argument for argument in argv}
    known, rest = parser.parse_known_args(_joined([*map(_with_hyphens, argv)]))
    rest = [written.get(argument, argument) for argument in rest]
    takes = re.findall(r"--[a-z][a-z-]*", parser.format_help())
    for argument in rest:
        if not argument.startswith("--config.") or "--config" not in takes:
            raise loading.Usage(other_names.no_such_argument(argument, takes))
    return known, rest


def _with_hyphens(argument: str) -> str:
    if not argument.startswith("--") or argument.startswith("--config."):
        return argument
    name, equals, value = argument.partition("=")
    return f"{name.replace('_', '-')}{equals}{value}"


def _joined(argv: list[str]) -> list[str]:
    """`--config.name value` as `--config.name=value`."""
    joined: list[str] = []
    for argument in argv:
        waits = joined and joined[-1].startswith("--config.") and "=" not in joined[-1]
        if waits and not argument.startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
