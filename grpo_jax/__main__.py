"""The command grpo-jax, also `python -m grpo_jax`: all programs, and what there is to choose from.

    grpo-jax train --config quickstart
    grpo-jax options optim

Help and lists are shown before any slow import.
"""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

from grpo_jax import __version__
from grpo_jax.config import arguments, completion, loading, options, parsers, reference
from grpo_jax.data import tasks
from grpo_jax.rewards import registry

PROGRAMS = {
    "train": "GRPO; a new model is first trained on worked solutions",
    "sft": "supervised training on texts, chats, or prompts with completions",
    "dpo": "trains on preferences: DPO and its relatives, KTO, ORPO",
    "reward_model": "trains a reward model on pairs",
    "generate": "completes a prompt with a model or a run",
    "evaluate": "answers held-out problems with several models, side by side",
    "score": "scores texts of a dataset with a config's rewards; no model needed",
    "label": "draws completions, compares them by rewards, and writes pairs or scores",
    "export": "writes a checkpoint of a run, such as its best, as a Hugging Face folder",
    "plan": "memory, traffic and time of a step on devices that are not there",
    "report": "draws the curves of a run again, or of several beside each other",
    "profile": "the longest operations of a traced run",
}
LISTS = {
    "options": "options of a run: all, or those of the sections that are named",
    "rewards": "reward functions that are built in",
    "tasks": "tasks that make their own problems",
    "configs": "config files that come with the package",
    "completion": "a script for the tab key, of bash or zsh; it says where to keep it",
}


def main() -> None:
    """Runs the program that the first argument names."""
    name, *rest = sys.argv[1:] or ["--help"]
    try:
        if name in ("-h", "--help"):
            arguments.print_and_exit(_help())
        elif name == "--version":
            print(f"grpo_jax {__version__}")
        elif name in LISTS:
            arguments.print_and_exit(_listed(name, rest))
        elif name in PROGRAMS:
            _run(name, rest)
        else:
            known = ", ".join([*PROGRAMS, *LISTS])
            raise ValueError(
                f"there is no program {name!r}. Give one of {known}; grpo-jax --help says what "
                "they do."
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _help() -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    told = lambda named: [  # noqa: E731
        line
        for name, text in named.items()
        for line in textwrap.wrap(
            text, width, initial_indent=f"  {name:13}", subsequent_indent=" " * 15
        )
    ]
    lines = ["usage: grpo-jax PROGRAM [...]", "", "programs, each with --help:", *told(PROGRAMS)]
    lines += ["", "what there is:", *told(LISTS)]
    return "\n".join([*lines, "", "  --version"])


def _run(name: str, argv: list[str]) -> None:
    sys.argv = [f"grpo-jax {name}", *argv]
    parsers.help_early(name, argv)
    program = importlib.import_module(f"grpo_jax.{name}")
    if name == "report":
        program.main(argv)
    else:
        importlib.import_module("grpo_jax.cli").main(program.main)


# --- What there is --------------------------------------------------------------------------------


def _listed(name: str, chosen: list[str]) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    if name == "options":
        known = [section for section in options.SECTIONS if section]
        for section in chosen:
            if section not in known:
                raise ValueError(f"{section!r} is no section of options: {', '.join(known)}.")
        return reference.listing(options.default(), width, chosen)
    if name == "completion":
        if len(chosen) != 1 or chosen[0] not in completion.SHELLS:
            raise ValueError(f"name a shell: grpo-jax completion {' or '.join(completion.SHELLS)}.")
        return completion.script(chosen[0], PROGRAMS, LISTS)
    if chosen:
        raise ValueError(f"grpo-jax {name} takes no arguments, and {chosen[0]!r} is one.")
    entries = {"rewards": _rewards, "tasks": _tasks, "configs": _configs}[name]()
    return "\n".join(
        line
        for head, text in entries
        for line in [
            head,
            *textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    "),
        ]
    )


def _rewards() -> Iterable[tuple[str, str]]:
    for name, spec in registry.BUILT_IN.items():
        module = spec.partition(":")[0].rpartition(".")[2]
        yield name, _documented(Path(registry.__file__).with_name(f"{module}.py"), name)


def _tasks() -> Iterable[tuple[str, str]]:
    for file in sorted(Path(tasks.__file__).parent.glob("[a-z]*.py")):
        yield file.stem, _documented(file)


def _configs() -> Iterable[tuple[str, str]]:
    for file in sorted(loading.SHIPPED.glob("[a-z]*.py")):
        yield file.stem, _documented(file)


def _documented(file: Path, function: str = "") -> str:
    """The first paragraph of the docstring of a file, or of a function in it, without import."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if function:
        (tree,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)
    return " ".join((ast.get_docstring(tree) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    main()
