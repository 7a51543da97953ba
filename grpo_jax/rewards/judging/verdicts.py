"""Reads verdicts: the last line with the call's own token, after the judge's thinking.

A judge that thinks quotes what it judges, and verdicts that it considers. So the first match would
often be a quotation. The token is unique to the call, and nothing but the call contains it.
"""

from __future__ import annotations

import re

import numpy as np

from grpo_jax.rewards.completions import after_thinking
from grpo_jax.rewards.judging.messages import Request
from grpo_jax.rewards.judging.rubric import Rubric

Verdict = list[float]
"""Single: a number for each criterion, in their order. Otherwise a rank for each answer, the best
lowest; equal ones are equally good."""

_NUMBER = r"(-?\d{1,9}(?:\.\d{1,9})?)"
_TIES = {"tie", "equal", "draw", "both", "0"}


class NoVerdictError(ValueError):
    """A judge's text has no verdict, or one that cannot be read."""


def parse(rubric: Rubric, request: Request, text: str) -> Verdict:
    """The verdict in a judge's text; NoVerdictError, which quotes no more of it than a line."""
    rest = after_thinking(text)
    if rest is None:
        raise NoVerdictError("the judge did not end its thinking (sampling.max_tokens?)")
    found = re.findall(rf"VERDICT-{request.number}[ \t*`]*:?([^\n]*)", rest, re.IGNORECASE)
    if not found:
        raise NoVerdictError("the judge gave no verdict")
    line = found[-1].strip(" \t\r*`_.\"'")
    if rubric.mode == "single":
        verdict = _numbers(rubric, line)
    elif rubric.mode == "pairwise":
        verdict = _better(line)
    else:
        verdict = _ranks(line, request.answers)
    if verdict is None:
        raise NoVerdictError(f"the judge's verdict is not of the form asked for: {line[:80]!r}")
    return verdict


def _numbers(rubric: Rubric, line: str) -> Verdict | None:
    values = []
    for c in rubric.criteria:
        own = re.findall(rf"\b{c.name}\b[\"'*`]*\s*[:=]\s*[\"'*`]*{_NUMBER}", line, re.IGNORECASE)
        if not own and len(rubric.criteria) == 1:
            own = re.findall(rf"^{_NUMBER}(?:\s*/\s*\d+)?$", line)
        if len(set(own)) != 1 or not c.low <= float(own[0]) <= c.high:
            return None
        values.append(float(own[0]))
    return values


def _better(line: str) -> Verdict | None:
    word = line.lower().removeprefix("answer").strip(" :=*`\"'")
    if word in _TIES:
        return [1.0, 1.0]
    return {"1": [1.0, 2.0], "2": [2.0, 1.0]}.get(word)


def _ranks(line: str, answers: int) -> Verdict | None:
    if not re.fullmatch(r"\d+(?:\s*[>=]\s*\d+)*", line):
        return None
    ranks, place = {}, 0
    for group in line.split(">"):
        for number in group.split("="):
            if int(number) in ranks:
                return None
            ranks[int(number)] = float(place)
        place += 1
    if sorted(ranks) != list(range(1, answers + 1)):
        return None
    return [ranks[i] for i in range(1, answers + 1)]


# --- Preferences in a group -----------------------------------------------------------------------


def wins(verdict: Verdict) -> np.ndarray:
    """1 where answer i is better than j, 0 where it is worse, ½ where they tie, [G, G]."""
    rank_G = np.array(verdict)
    better_GG = rank_G[:, None] < rank_G[None, :]
    return np.where(rank_G[:, None] == rank_G[None, :], 0.5, better_GG.astype(np.float64))


def both_orders(first_GG: np.ndarray, second_GG: np.ndarray) -> tuple[np.ndarray, int, int]:
    """Wins from both orders of presentation, the number of flips, and of pairs.

    A pair that flips, for which each order prefers another answer, is a tie. Otherwise it is the
    mean: a win beside a tie is worth ¾.
    """
    upper = np.triu_indices(len(first_GG), 1)
    flips = np.abs(first_GG - second_GG)[upper] == 1.0
    return (first_GG + second_GG) / 2, int(flips.sum()), len(upper[0])


def borda(wins_GG: np.ndarray) -> np.ndarray:
    """Mean over the others of P(i is better) - P(j is better), from -1 to 1, [G].

    NaN in `wins_GG`: not compared, or not known. An answer of which fewer than half of the wanted
    comparisons are known has no number; `wins_GG` has infinity where none was wanted.
    """
    wanted_GG = ~np.isinf(wins_GG) & ~np.eye(len(wins_GG), dtype=bool)
    known_GG = wanted_GG & ~np.isnan(wins_GG)
    lead_GG = np.where(known_GG, 2 * np.where(known_GG, wins_GG, 0.0) - 1, 0.0)
    count_G, wanted_G = known_GG.sum(axis=1), wanted_GG.sum(axis=1)
    enough_G = (count_G > 0) & (2 * count_G >= wanted_G)
    return np.where(enough_G, lead_GG.sum(axis=1) / np.maximum(count_G, 1), np.nan)
