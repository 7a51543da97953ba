"""Reward functions by name: looks up the config's names, binds arguments, checks the data.

A reward function has the signature that TRL uses, called by keyword with lists of one entry per
completion: `f(prompts, completions, **columns) -> list[float | None]`. `columns` are the further
columns of the problems; None means that the function does not apply to a row. If a prompt is a list
of chat messages, its completion is one too. Besides the columns there are these arguments:

    rendered_prompts        each prompt as the model read it: a text, chat template included
    completion_ids          token ids of each completion, stop token included
    max_completion_tokens   the run's limit, tokens
    trainer_state           with `global_step` (rollouts done), `max_steps` and `epoch`
    log_metric(name, value) adds a number to the run's metrics, averaged over a step
    log_extra(name, values) adds a column to the table of samples
    log_steps(steps)        of each completion (end, value) of its steps, for rewards.by_step

A function gets the arguments that it names, or all of them if it takes `**columns`.

An entry may end in " as LABEL", its name in metrics: `regex(pattern="...") as cited`. So one
function can be given twice. Entries with a prefix are those of `kinds.KINDS`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.messages.values import shown
from grpo_jax.rewards import extras, given, kinds, slow_import

_BY_MODULE = {
    "exact": ("exact_answer",),
    "math_answer": ("math_answer",),
    "numeric": ("numeric_answer",),
    "choices": ("multiple_choice",),
    "text": ("exact_match", "token_f1", "mentions", "repetition_penalty"),
    "overlap": ("bleu", "rouge", "fact_overlap"),
    "similarity": ("similarity",),
    "format": ("answer_format", "think_format", "think_answer_format"),
    "tags": ("strict_tags", "soft_tags", "reasoning_steps", "regex"),
    "structured": ("json_schema",),
    "steps": ("right_steps",),
    "length": ("soft_overlong", "cosine_length", "relative_length"),
    "language": ("language_consistency",),
    "tone": ("sentiment", "clean_language", "toxicity"),
    "programs": ("code",),
    "classifiers": ("classifier",),
}
BUILT_IN: dict[str, str] = {
    name: f"grpo_jax.rewards.{module}:{name}"
    for module, names in _BY_MODULE.items()
    for name in names
}

_OTHERWISE = (
    "another reward: with rewards.names = () and rewards.weights = () the environment's own counts "
    "alone."
)
_LABEL = re.compile(r"(.*\S)\s+as\s+([^\W\d][\w.\-]*)\s*", re.DOTALL)

# Arguments of a function besides the dataset's columns.
GIVEN = (
    "prompts",
    "completions",
    "rendered_prompts",
    "completion_ids",
    "max_completion_tokens",
    "trainer_state",
    "log_metric",
    "log_extra",
    "log_steps",
)


@dataclasses.dataclass(frozen=True)
class Reward:
    """One reward function and its weight in the sum."""

    name: str  # the name in metrics: a built-in name, or the function's own
    spec: str  # the config's entry without its label: what `function` resolves
    weight: float
    gives_accuracy: bool = False  # 1 is right, 0 is wrong; at most one reward of a run
    takes_environments: bool = False  # is called beside the environments, which it is given
    on_failure: str = "unknown"  # what a failed one is: `config.rewards.on_failure`
    by_step: bool = False  # its steps have advantages of their own: `config.rewards.by_step`

    @property
    def runs(self) -> str:
        """Where it is computed: one of `kinds.WORKERS`, `DEVICES`, `HOST` and `OTHERS`."""
        return kinds.EPISODES if self.takes_environments else kinds.runs(self.spec)

    @property
    def model(self) -> str:
        """The folder or hub id of the reward model that gives it; "": something else does."""
        prefix, after = kinds.split(self.spec)
        return after if prefix == "model:" else ""


def labelled(spec: str) -> tuple[str, str]:
    """An entry of `rewards.names` without its " as LABEL", and the label; "" if it has none."""
    match = _LABEL.fullmatch(spec)
    return (match[1], match[2]) if match else (spec, "")


def short_name(spec: str) -> str:
    """The name in metrics of an entry of `rewards.names`: its label, or by its kind.

    Of a reward model it is that of its folder, or of the run whose export it is.
    """
    entry, label = labelled(spec)
    prefix, after = kinds.split(entry)
    if label or prefix:
        return label or kinds.KINDS[prefix].name(after)
    return split_call(entry)[0].rpartition(":")[2]


def named(names: Sequence[str]) -> list[Reward]:
    """The rewards of entries that `load` has read before, with weight 0."""
    return [Reward(short_name(name), labelled(name)[0], 0.0) for name in names]


def load(
    names: Sequence[str],
    weights: Sequence[float],
    accuracy: str = "",
    *,
    start_limit_s: float = 120.0,
    on_failure: str = "unknown",
    by_step: Sequence[str] = (),
) -> list[Reward]:
    """The rewards of `names`, each a built-in name or "module:function", arguments in brackets.

    `accuracy` names the reward that measures accuracy (1 right, 0 wrong); "" takes the first
    function with a true attribute `right_or_wrong`, if there is one. `on_failure`: of each.
    `by_step`: names of those whose steps count.

    Raises ValueError, naming the option: `rewards.names` if there is no such function, or if two
    functions have the same short name; `rewards.weights` if a weight is not a finite number;
    `rewards.accuracy` or `rewards.by_step` if it is none of the rewards. If a module is not
    imported after `start_limit_s`, the process ends with a message.
    """
    if len(names) != len(weights):
        raise ValueError(
            f"rewards.names has {len(names)} entries and rewards.weights {len(weights)}; "
            "give one weight for each reward."
        )
    rewards: dict[str, Reward] = {}
    for spec, weight in zip(names, weights):
        if not isinstance(weight, numbers.Real) or not math.isfinite(weight):
            raise ValueError(f"rewards.weights: {weight!r} for {spec!r} is not a finite number.")
        with slow_import.limited(spec, start_limit_s):
            found = function(spec)
        _refuse_lacking(found, spec)
        short = short_name(spec)
        if short in rewards:
            raise ValueError(
                f"rewards.names = {tuple(names)!r} has two rewards called {short!r}, which metrics "
                'could not tell apart. Name each once, or call one otherwise: "... as OTHER".'
            )
        rewards[short] = Reward(short, labelled(spec)[0], float(weight), on_failure=on_failure)
    for name in map(short_name, by_step):
        _refuse_without_steps(rewards, name)
        rewards[name] = dataclasses.replace(rewards[name], by_step=True)
    chosen = _which_gives_accuracy(rewards, accuracy)
    return [dataclasses.replace(r, gives_accuracy=r.name == chosen) for r in rewards.values()]


def _refuse_without_steps(rewards: dict[str, Reward], name: str) -> None:
    """Raises ValueError if a reward of `rewards.by_step` is unknown, or tells of no steps."""
    if name not in rewards:
        raise ValueError(
            f"rewards.by_step: {name!r} is none of the rewards, which are {', '.join(rewards)}. "
            "Name one of them, or leave rewards.by_step ()."
        )
    if not reads([rewards[name]], "log_steps"):
        raise ValueError(
            f"rewards.by_step: {name!r} tells of no steps. Name a reward function with an argument "
            "`log_steps`, as right_steps has, or leave rewards.by_step ()."
        )


def _refuse_lacking(found: Callable, spec: str) -> None:
    """Raises ValueError if a library is missing, or an argument that only the config can give."""
    if lacks := extras.of_function(found):
        raise ValueError(f"rewards.names: {spec!r} {lacks}; or choose another reward.")
    own = getattr(getattr(found, "func", found), "options", ())
    for name in (n for n in _needed(found) if n in own):
        raise ValueError(
            f"rewards.names: {spec!r} needs the argument {name!r}. Write {short_name(spec)}"
            f"({name}=...); grpo-jax rewards says what it is."
        )


def _which_gives_accuracy(rewards: dict[str, Reward], chosen: str) -> str | None:
    if chosen:
        short = short_name(chosen)
        if short not in rewards:
            raise ValueError(
                f"rewards.accuracy = {chosen!r} is none of the rewards, which are "
                f"{', '.join(rewards)}. Name the one that gives 1 for right and 0 for wrong, or "
                'leave rewards.accuracy "".'
            )
        return short
    for reward in rewards.values():
        if flag(reward, "right_or_wrong"):
            return reward.name
    return None


# --- By name --------------------------------------------------------------------------------------


def function(spec: str) -> Callable:
    """The function of an entry of `rewards.names`.

    Arguments in brackets are literals. They are bound to a reward function. A function without
    `completions` is a factory: it is called with them and returns a reward function, as in
    "trl.rewards:get_soft_overlong_punishment(max_completion_len=1024, soft_punish_cache=128)".
    """
    spec, _ = labelled(spec)
    prefix, after = kinds.split(spec)
    if prefix:
        return kinds.KINDS[prefix].resolve(after)
    name, arguments = split_call(spec)
    return bound(_find(name), arguments, spec)


def given_function(after: str) -> Callable:
    """The function of an entry "python:NAME", as `function`."""
    name, arguments = split_call(after)
    return bound(_given(name), arguments, given.PREFIX + after)


def bound(found: Callable, arguments: dict[str, Any] | None, spec: str) -> Callable:
    """A reward function with its arguments, or what a factory makes of them; None: no brackets.

    A built-in function may refuse values by an attribute `refuse`, which takes the arguments and
    raises ValueError.
    """
    if arguments is None:
        return found
    try:
        if {"completions", "completion_ids"} & set(inspect.signature(found).parameters):
            inspect.signature(found).bind_partial(**arguments)
            getattr(found, "refuse", lambda **_: None)(**arguments)
            return functools.partial(found, **arguments)
        made = found(**arguments)
    except (Exception, SystemExit) as error:  # a user's factory may fail in any way
        raise ValueError(
            f"rewards.names: {spec!r} does not take these arguments "
            f"({type(error).__name__}: {error})."
        ) from error
    if not callable(made):
        raise ValueError(
            f"rewards.names: {spec!r} gives a {type(made).__name__}, not a function; it takes no "
            "`completions` itself."
        )
    return made


def split_call(spec: str, option: str = "rewards.names") -> tuple[str, dict[str, Any] | None]:
    """A name and the arguments in its brackets; None without brackets.

    Raises ValueError, naming the `option`, for what cannot be read.
    """
    name, bracket, _ = spec.partition("(")
    if not bracket:
        return spec.strip(), None
    try:
        call = ast.parse(f"f({spec.partition('(')[2]}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("arguments must be written name=value")
        arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"{option}: {shown(spec)} cannot be read ({error}). Write NAME, or "
            "NAME(name=value), with numbers, texts or lists as values."
        ) from error
    return name.strip(), arguments


def _find(name: str) -> Callable:
    module_name, colon, attribute = BUILT_IN.get(name, name).partition(":")
    if not colon:
        raise _unknown(name, "is not a built-in reward", list(BUILT_IN))
    if not module_name or not attribute:
        raise _unknown(name, "lacks the module or the function", [])
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way
        what = f"cannot be imported ({type(error).__name__}: {error})"
        if isinstance(error, SystemExit):
            what += ': what a script does belongs under `if __name__ == "__main__":`'
        raise _unknown(name, what, list(BUILT_IN)) from error
    if not hasattr(module, attribute):
        callables = [n for n, v in vars(module).items() if callable(v)]
        raise _unknown(name, f"names nothing: {module_name} has no {attribute!r}", callables)
    found = getattr(module, attribute)
    if not callable(found):
        raise _unknown(name, f"is a {type(found).__name__}, not a function", [])
    return found


def _given(name: str) -> Callable:
    found = given.find(name)
    if found is None:
        raise ValueError(
            f"rewards.names: {given.PREFIX + name!r} is a function that a Python program gave, and "
            f"this one gave {', '.join(given.names()) or 'none'}. Go on with that run from the "
            "program, or put the function into a module, and accept another rewards.names."
        )
    return found


def _unknown(name: str, what: str, candidates: list[str]) -> ValueError:
    close = difflib.get_close_matches(name.rpartition(":")[2], candidates, n=3)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return ValueError(
        f"rewards.names: {name!r} {what}.{hint} Give a built-in reward ({', '.join(BUILT_IN)}) or "
        '"module:function" with a module that is installed, or lies in the current folder or the '
        "config file's."
    )


# --- What a function takes ------------------------------------------------------------------------


def accepted(found: Callable, names: Iterable[str]) -> set[str]:
    """The names among `names` that the function takes as arguments.

    Arguments that the config has bound, and those that a built-in function names in its attribute
    `options`, are no columns: a column of that name is not given.
    """
    own = {*getattr(getattr(found, "func", found), "options", ())}
    names = {*names} - own - {*getattr(found, "keywords", ())}
    try:
        hash(found)
    except TypeError:  # not every callable object is hashable
        taken = _parameters.__wrapped__(found)
    else:
        taken = _parameters(found)
    return names if taken is None else taken & names


@functools.lru_cache(maxsize=64)  # its cost is a tenth of a worker's call
def _parameters(found: Callable) -> frozenset[str] | None:
    """The argument names of a function; None if it takes any."""
    parameters = inspect.signature(found).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters)


def _needed(found: Callable) -> list[str]:
    """Names of columns without which the function cannot be called.

    A built-in function may have an attribute `columns`, which takes the bound arguments and gives
    the columns that these name.
    """
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = getattr(getattr(found, "func", found), "columns", lambda **_: ())
    return [*named(**getattr(found, "keywords", {}))] + [
        p.name
        for p in inspect.signature(found).parameters.values()
        if p.kind in by_name and p.default is p.empty and p.name not in GIVEN
    ]


def flag(reward: Reward, name: str) -> bool:
    """Whether a reward's function has this attribute, and it is true."""
    found = function(reward.spec)
    return bool(getattr(getattr(found, "func", found), name, False))


def reads(rewards: Sequence[Reward], name: str) -> bool:
    """Whether a reward function names this argument."""
    return any(name in inspect.signature(function(r.spec)).parameters for r in rewards)


def columns_read(rewards: Sequence[Reward], columns: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a problem that some reward function names; all columns if none names any."""
    return {n: v for n, v in columns.items() if reads(rewards, n)} or dict(columns)


def refuse_columns(rewards: Sequence[Reward], problems: Sequence[Any]) -> None:
    """Raises ValueError, naming the file, if a reward needs a missing column."""
    by_episodes = any(reward.runs == kinds.EPISODES for reward in rewards)
    for reward in rewards:
        given = {"environments"} if reward.takes_environments else set()
        for name in _needed(function(reward.spec)):
            if problems and name not in problems[0].columns and name not in given:
                has = ", ".join(["prompt", *problems[0].columns])
                raise ValueError(
                    f"The reward {reward.name!r} needs a column `{name}`, and {problems[0].where} "
                    f'has {has}. Name it with data.columns = ("{name}=ITS_NAME_THERE",), or choose '
                    + ("another reward." if not by_episodes else _OTHERWISE)
                )


def faulty_rows(rewards: Sequence[Reward], problems: Sequence[Any]) -> dict[int, str]:
    """Problems that a reward could not score: messages with file, row and column, by number.

    A reward function declares checks in its attribute `column_faults`: a dict from a column's name
    to a function that returns the fault of a value, or None.
    """
    wrong: dict[int, str] = {}
    for reward in rewards:
        found = function(reward.spec)
        faults = getattr(getattr(found, "func", found), "column_faults", {})
        for name, fault_of in faults.items():
            if name in getattr(found, "keywords", {}):  # the config's value counts
                continue
            for i, problem in enumerate(problems):
                value = problem.columns.get(name)
                fault = fault_of(value) if name in problem.columns and i not in wrong else None
                if fault:
                    wrong[i] = (
                        f"{problem.where}: column `{name}` {fault}: {shown(value, 80)}. The "
                        f"reward {reward.name!r} reads it."
                    )
    return dict(sorted(wrong.items()))
