"""Entries of `rewards.names` with a prefix: one row of a table for each prefix.

A row says what stands after the prefix, where such rewards are computed, and how an entry is
resolved. A new kind of reward is a new row, and the code that computes it. An entry without a known
prefix is a built-in name or "module:function", and is computed in the workers.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable

WORKERS = "workers"  # the processes of `pool`, one call for each group
DEVICES = "devices"  # by a model on the mesh, after a rollout
HOST = "host"  # in the main process, which waits for others, such as a server
EPISODES = "episodes"  # in the process of an episode's environment, when the episode has ended
OTHERS = "others"  # from the other rewards of the same completions, once these are known


@dataclasses.dataclass(frozen=True)
class Kind:
    """The entries with one prefix."""

    after: str  # what stands after the prefix, for messages
    runs: str  # where: one of the words above
    # "module:function", imported when needed: from what stands after the prefix to the reward
    # function. Of a reward that no worker computes, its arguments tell which columns are read, and
    # it is not called. It raises ValueError, naming rewards.names, for what cannot be read.
    function: str
    # From what stands after the prefix to the name in metrics, if the entry gives none.
    name: Callable[[str], str]

    def resolve(self, after: str) -> Callable:
        """The reward function of an entry; `after`: what stands after the prefix."""
        module, _, name = self.function.partition(":")
        return getattr(importlib.import_module(module), name)(after)


def of_call(after: str) -> str:
    """The name of a function, from its name with arguments in brackets."""
    return after.partition("(")[0].strip().rpartition(":")[2]


def of_folder(after: str) -> str:
    """The name of a folder, or of the run whose export it is, or the adapter of its export."""
    whole = after.rstrip("/").removesuffix("/export/adapter") or after
    *_, parent, name = "", *whole.rstrip("/").split("/")
    name = parent if name == "export" and parent else name
    return re.sub(r"[^\w.\-]", "_", name)


def of_label(after: str) -> str:
    """The name of a label after a folder and #, or of the folder."""
    folder, _, label = after.partition("(")[0].partition("#")
    return re.sub(r"[^\w.\-]", "_", label.strip() or of_folder(folder.strip()))


def of_file(after: str) -> str:
    """The name of a file without its folder and ending."""
    name = after.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.\-]", "_", name.rpartition(".")[0] or name)


KINDS: dict[str, Kind] = {
    "model:": Kind(
        "folder or hub id of a reward model",
        DEVICES,
        "grpo_jax.rewards.kinds:of_no_worker",
        of_folder,
    ),
    "environment:": Kind(
        '"get_reward", or "module:function" of a function that takes `environments`',
        EPISODES,
        "grpo_jax.rewards.kinds:of_no_worker",
        of_call,
    ),
    "classifier:": Kind(
        "folder of a classifier of texts, # and one of its labels",
        WORKERS,
        "grpo_jax.rewards.classifiers:function",
        of_label,
    ),
    "ensemble:": Kind(
        "form of an ensemble, with its members in brackets",
        OTHERS,
        "grpo_jax.rewards.ensembles:function",
        of_call,
    ),
    "judge:": Kind(
        "file of a rubric",
        HOST,
        "grpo_jax.rewards.judging.rubric:as_function",
        of_file,
    ),
    "python:": Kind(
        "name of a function that a Python program gave",
        WORKERS,
        "grpo_jax.rewards.registry:given_function",
        of_call,
    ),
}


def split(entry: str) -> tuple[str, str]:
    """The prefix of an entry, "" if it has none of the table, and the rest."""
    for prefix in KINDS:
        if entry.startswith(prefix):
            return prefix, entry.removeprefix(prefix)
    return "", entry


def runs(entry: str) -> str:
    """Where the reward of an entry is computed."""
    prefix, _ = split(entry)
    return KINDS[prefix].runs if prefix else WORKERS


def of_no_worker(after: str) -> Callable:
    """The function of a reward that reads no column, and that no worker computes."""

    def computed_elsewhere(prompts: list, completions: list) -> list[float]:
        raise AssertionError(f"the reward of {after!r} is no function of the workers")

    return computed_elsewhere
