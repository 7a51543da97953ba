"""Reward functions that behave and misbehave, for the tests; workers import them by name."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

not_callable = 3


def half(prompts, completions, **columns):
    return [0.5 for _ in completions]


def letters(completions, **kwargs):  # TRL's users leave out what they do not read
    return [None if c == "?" else len(c) for c in completions]


def only_named(completions, answer, trainer_state):  # no **columns at all
    return [float(c == a) + trainer_state.global_step for c, a in zip(completions, answer)]


async def later(completions, **columns):
    await asyncio.sleep(0.01)
    return [1.0] * len(completions)


def replies(prompts, completions, **columns):
    return [float(c[0]["role"] == "assistant") + len(c[0]["content"]) for c in completions]


def num_tokens(completion_ids, max_completion_tokens, **columns):
    return [len(ids) / max_completion_tokens for ids in completion_ids]


def in_call(completions, **columns):
    return [float(len(completions))] * len(completions)


def logs(completions, log_metric, log_extra, **columns):
    log_metric("letters", sum(map(len, completions)))
    log_extra("upper", [c.upper() for c in completions])
    return [0.0] * len(completions)


def at_least(low, high=10):
    def between(completions, **columns):
        return [float(low <= len(c) <= high) for c in completions]

    return between


def times(completions, factor=1.0, **columns):
    return [factor * len(c) for c in completions]


def spoil(prompts, completions, answer, **columns):
    answer.clear(), completions.clear(), prompts.clear()
    return [float(v) for v in columns["level"]]


# Each does what it says for a completion "bad", and gives 1 for others.


def sleeps(completions, **columns):
    if "bad" in completions:
        time.sleep(1e6)
    return [1.0] * len(completions)


def computes(completions, **columns):
    if "bad" in completions:
        exec("9**9**9**9")  # the interpreter is held: no signal, no thread could end it
    return [1.0] * len(completions)


def raises(completions, **columns):
    if "bad" in completions:
        raise KeyError("gold")
    return [1.0] * len(completions)


def too_few(completions, **columns):
    return [1.0] * (len(completions) - ("bad" in completions))


def not_numbers(completions, **columns):
    return ["1" if c == "bad" else 1.0 for c in completions]


def eats(completions, **columns):
    if "bad" in completions:
        bytearray(1 << 40)
    return [1.0] * len(completions)


def dies(completions, **columns):
    if "bad" in completions:
        os._exit(7)
    return [1.0] * len(completions)


def exits(completions, **columns):
    if "bad" in completions:
        sys.exit("no")
    return [1.0] * len(completions)


def prints(completions, **columns):
    print("a reward talks")
    return [1.0] * len(completions)


def leaves_a_child(completions, child_file, **columns):
    """Starts a process that outlives the call and hangs with it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(child_file[0], "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    child.wait()


def slow(completions, **columns):
    time.sleep(0.05 * len(completions))
    return [1.0] * len(completions)
