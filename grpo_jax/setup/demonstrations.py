"""The demonstrations of a config's problems, as tokens."""

from __future__ import annotations

from ml_collections import ConfigDict

from grpo_jax.config import derived
from grpo_jax.data import streams, tasks
from grpo_jax.data.problems import Problem
from grpo_jax.environments.demonstrations import NOTHING, Demonstrations, Nothing
from grpo_jax.messages.console import say
from grpo_jax.messages.values import cut, shown
from grpo_jax.models.policy import Policy
from grpo_jax.setup.learner import hybrid_of


def load(config: ConfigDict, policy: Policy, problems: list[Problem]) -> Nothing:
    """The demonstrations that the config's hybrid takes for the problems, or NOTHING.

    They are the columns `completion`; for a task without that column, its worked solutions, one of
    each problem for the whole run. The stop token ends each. Raises ValueError, naming the row, if
    a demonstration is no text, is missing and `hybrid.missing` refuses that, or is longer than a
    completion may be.
    """
    hybrid = hybrid_of(config)
    if hybrid is None or not hybrid.method.given:
        return NOTHING
    texts = _texts(config, problems)
    _refuse_missing(config, problems, texts)
    stop = policy.tokenizer.eos_token_id
    stop = policy.stop_ids[0] if stop is None else stop
    index = [i for i, text in enumerate(texts) if text]
    rows = policy.tokenizer([texts[i] for i in index], add_special_tokens=False)["input_ids"]
    ids: list[list[int]] = [[] for _ in problems]
    limit = config.rollout.max_tokens
    for i, row in zip(index, rows):
        policy.refuse_unknown(row, f"The demonstration of {problems[i].where}")
        if len(row) >= limit:
            raise ValueError(
                f"rollout.max_tokens = {limit}, but the demonstration of {problems[i].where} has "
                f"{len(row) + 1} tokens with its stop token. Raise the limit, or leave the problem "
                "out."
            )
        ids[i] = [*row, stop]
    share = None if hybrid.hint is None else hybrid.hint.at
    return Demonstrations(ids, config.seed, limit, share)


def _texts(config: ConfigDict, problems: list[Problem]) -> list[str]:
    """The demonstration of each problem; "" where there is none."""
    if all("completion" in problem.columns for problem in problems):
        return [_completion(problem) for problem in problems]
    task = tasks.load(config.data.task) if config.data.task else None
    solve = getattr(task, "worked_solution", None)
    if solve is None:
        return [""] * len(problems)
    rng = streams.stream(config.seed, "demonstrations")
    return [tasks.whole(solve(problem, rng)) for problem in problems]


def _completion(problem: Problem) -> str:
    """The text of a problem's column `completion`, which may be one message of an assistant."""
    found = problem.columns["completion"]
    if isinstance(found, list) and len(found) == 1 and isinstance(found[0], dict):
        found = found[0].get("content") if found[0].get("role") == "assistant" else found
    if found is None or isinstance(found, str):
        return (found or "").strip() and found
    raise ValueError(
        f"{problem.where}: `completion`, the demonstration, is {cut(shown(found))}. It must be a "
        "text, or one message of an assistant."
    )


def _refuse_missing(config: ConfigDict, problems: list[Problem], texts: list[str]) -> None:
    lacking = [problem for problem, text in zip(problems, texts) if not text]
    if not lacking:
        return
    named, first = f"hybrid.method = {shown(config.hybrid.method)}", lacking[0]
    if config.hybrid.missing == "refuse" or len(lacking) == len(problems):
        has = ", ".join(["prompt", *first.columns])
        mend = (
            'or set hybrid.missing = "policy", which trains such problems by their rewards alone'
            if len(lacking) < len(problems)
            else 'or set hybrid.method = ""'
        )
        raise ValueError(
            f"{named} takes a demonstration of each problem, and {first.where} has no text as "
            f"column `completion`; it has {has}. {len(lacking)} of {len(problems)} problems lack "
            "one. Name the column in data.columns, such as completion=solution, or leave these "
            f"problems out, {mend}."
        )
    say(
        f"{len(lacking)} of {len(problems)} problems have no demonstration, and are trained by "
        f"their rewards alone. The first is {first.where}."
    )


def told(config: ConfigDict) -> list[str]:
    """A description of the hybrid, in a line."""
    method = derived.hybrid_method(config)
    if method is None:
        return []
    what = {
        "completion": "one demonstration more in each group",
        "prefix": "completions begin with a part of a demonstration",
        "": "nll of passed completions",
    }
    return [f"Hybrid: {config.hybrid.method}, {what[method.given]}"]
