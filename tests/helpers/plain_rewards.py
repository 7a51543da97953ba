"""Rewards of a module that is imported in no time, as the processes of rewards do it."""

from __future__ import annotations


def worth(completions, **columns):
    """Another number for about every completion."""
    return [sum(map(ord, c)) % 97 / 10 for c in completions]


def short(completions, **columns):
    return [-float(len(c)) for c in completions]


def right(completions, answer, **columns):
    return [float(a in c) for c, a in zip(completions, answer)]


def digits(completions, log_steps, **columns):
    """The share of digits; each character is a step."""
    log_steps([[(n, float(x.isdigit())) for n, x in enumerate(c, 1)] for c in completions])
    return [sum(map(str.isdigit, c)) / max(len(c), 1) for c in completions]
