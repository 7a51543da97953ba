"""Reward functions by name, and the rewards that they give to completions.

A reward function has the signature that TRL uses, called by keyword with lists of one entry per
completion: `f(prompts, completions, **columns) -> list[float | None]`. `columns` are the further
columns of the problems; None says that the function has no opinion on a row.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards.exact import exact_answer
from grpo_jax.rewards.format import answer_format

BUILT_IN: dict[str, Callable] = {"exact_answer": exact_answer, "answer_format": answer_format}

_FLOAT32_MAX = float(np.finfo(np.float32).max)


class RewardError(ValueError):
    """A reward function failed, or gave what is not one finite number (or None) per completion."""


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward function and its share in the sum."""

    name: str  # as metrics show it: a built-in name, or the function's own
    function: Callable
    weight: float


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the completions earned."""

    reward_B: np.ndarray  # float32: weighted sum; a reward that is None counts as 0
    by_name: dict[str, np.ndarray]  # float32 [B] of each reward, unweighted; NaN for None
    num_missing: int  # rows for which every reward was None


# --- By name --------------------------------------------------------------------------------------


def load(names: Sequence[str], weights: Sequence[float]) -> list[Reward]:
    """The rewards of `names`, each a built-in name or "module:function".

    Raises ValueError naming `rewards.names` where a name leads to no function, or to one whose
    short name another has, and `rewards.weights` where a weight is no finite number.
    """
    if len(names) != len(weights):
        raise ValueError(
            f"rewards.names has {len(names)} entries and rewards.weights {len(weights)}; "
            "give one weight for each reward."
        )
    rewards: dict[str, Reward] = {}
    for name, weight in zip(names, weights):
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"rewards.weights: {weight!r} for {name!r} is not a finite number.")
        short = name.rpartition(":")[2]
        if short in rewards:
            raise ValueError(
                f"rewards.names = {tuple(names)!r} has two rewards called {short!r}, which metrics "
                "could not tell apart. Name each once, or rename one function."
            )
        rewards[short] = Reward(short, _function(name), float(weight))
    return list(rewards.values())


def _function(name: str) -> Callable:
    if name in BUILT_IN:
        return BUILT_IN[name]
    module_name, colon, attribute = name.partition(":")
    if not colon:
        raise _unknown(name, "is not a built-in reward", list(BUILT_IN))
    if not module_name or not attribute:
        raise _unknown(name, "lacks the module or the function", [])
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        raise _unknown(
            name, f"cannot be imported ({type(error).__name__}: {error})", list(BUILT_IN)
        ) from error
    if not hasattr(module, attribute):
        callables = [n for n, v in vars(module).items() if callable(v)]
        raise _unknown(name, f"names nothing: {module_name} has no {attribute!r}", callables)
    function = getattr(module, attribute)
    if not callable(function):
        raise _unknown(name, f"is a {type(function).__name__}, not a function", [])
    return function


def _unknown(name: str, what: str, candidates: list[str]) -> ValueError:
    close = difflib.get_close_matches(name.rpartition(":")[2], candidates, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return ValueError(
        f"rewards.names: {name!r} {what}.{hint} Give a built-in reward ({', '.join(BUILT_IN)}) or "
        '"module:function" with a module that Python can import from the current folder.'
    )


# --- Scoring --------------------------------------------------------------------------------------


def score(
    rewards: Sequence[Reward],
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list],
) -> Scores:
    """The rewards of B completions; row i of every list belongs to completion i.

    Raises RewardError, naming the reward, when one raises or does not return one finite number or
    None per completion.
    """
    rows = len(completions)
    lengths = {"prompts": len(prompts)} | {name: len(values) for name, values in columns.items()}
    assert set(lengths.values()) == {rows}, f"{rows} completions, but {lengths}"
    by_name = {r.name: _run(r, prompts, completions, columns) for r in rewards}
    total_B = np.zeros(rows, np.float64)
    missing_B = np.ones(rows, bool)
    for reward in rewards:
        given_B = by_name[reward.name]
        total_B += reward.weight * np.nan_to_num(given_B, nan=0.0).astype(np.float64)
        missing_B &= np.isnan(given_B)
    return Scores(total_B.astype(np.float32), by_name, int(missing_B.sum()))


def _run(
    reward: Reward, prompts: list[str], completions: list[str], columns: dict[str, list]
) -> np.ndarray:
    copies = {name: list(values) for name, values in columns.items()}  # a reward may change its own
    try:
        values = reward.function(prompts=list(prompts), completions=list(completions), **copies)
    except Exception as error:  # a user's function may fail in any way
        first = _shorten(completions[0]) if completions else "none"
        raise RewardError(
            f"The reward {reward.name!r} raised {type(error).__name__}: {error}. It was called "
            f"with {len(completions)} completions and the columns {sorted(columns)}; the first "
            f"completion was {first}."
        ) from error
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = list(values)
    if not isinstance(values, (list, tuple)):
        raise RewardError(
            f"The reward {reward.name!r} returned a {type(values).__name__}; it must return a list "
            "of one number, or None, per completion."
        )
    if len(values) != len(completions):
        raise RewardError(
            f"The reward {reward.name!r} returned {len(values)} values for {len(completions)} "
            "completions; it must return one number, or None, for each."
        )
    return np.array(
        [_number(reward.name, i, v, completions[i]) for i, v in enumerate(values)], np.float32
    )


def _number(name: str, row: int, value: Any, completion: str) -> float:
    if value is None:
        return math.nan
    is_number = isinstance(value, (numbers.Real, np.bool_))
    if isinstance(value, np.generic):
        value = value.item()
    # Compared before converting: what float32 cannot hold would become an infinity.
    if is_number and abs(value) <= _FLOAT32_MAX:
        return float(value)
    what = "beyond finite float32" if is_number else "not a number"
    raise RewardError(
        f"The reward {name!r} returned {_shorten(value)} ({type(value).__name__}) for row {row}, "
        f"which is {what}. Return a finite number, or None to give no reward. Its completion was "
        f"{_shorten(completion)}."
    )


def _shorten(value: Any, limit: int = 200) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
