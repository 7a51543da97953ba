"""Environments as a user might write them: good ones, and ones that do all that can go wrong."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time

import numpy as np


def multiply(a: int, b: int) -> int:
    """Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return a * b


async def later(text: str, seconds: float) -> str:
    """Waits, then repeats a text.

    Args:
        text: The text.
        seconds: How long it waits.
    """
    await asyncio.sleep(seconds)
    return text


def without_hints(a, b):
    """Adds.

    Args:
        a: One.
        b: Another.
    """
    return a + b


def without_docs(a: int) -> int:
    return a


class Counter:
    """TRL's way: tools are methods, rewards read the state."""

    def __init__(self):
        self.count = None
        self.num_episodes = 0

    def reset(self, **kwargs) -> str | None:
        self.count, self.start = 0, kwargs.get("start", 0)
        self.num_episodes += 1
        return f"The counter is at {self.start}."

    def increment(self, step: int) -> int:
        """Increments the counter.

        Args:
            step: By how much.

        Returns:
            The new value.
        """
        if step < 0:
            raise ValueError("step must not be negative")
        self.count += step
        return self.start + self.count

    async def double(self) -> str:
        """Doubles the counter."""
        await asyncio.sleep(0)
        self.count *= 2
        return f"{self.count}"

    def _hidden(self):
        raise AssertionError

    def get_reward(self) -> float:
        return self.count / 10


def counted(environments, completions, goal, **kwargs):
    return [float(e.count == g) for e, g in zip(environments, goal)]


class Draws:
    """Tells what was drawn at random."""

    def reset(self, problem, seed=None, rollout_seed=None):
        drawn = random.random(), np.random.random(), np.random.default_rng(seed).random()
        return f"{problem} {drawn} {rollout_seed} {list({'a', 'b', 'c', 'd', 'e'})}"

    def respond(self, messages):
        return None


class Guess:
    """A game without tools: it answers what the policy says, with a reward for each turn."""

    turn_reward = 0.0

    def reset(self, word, **row):
        self.word, self.is_won = word, False

    async def respond(self, messages):
        said = messages[-1]["content"]
        if said == self.word:
            self.is_won, self.turn_reward = True, 1.0
            return None
        if said == "raise":
            raise KeyError("respond")
        if said == "list":
            return [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
        self.turn_reward = 0.1
        return f"{said} is wrong"

    def get_reward(self):
        return 1 if self.is_won else None


class Faults:
    """Does what its tool is asked to."""

    def reset(self, at_reset="", **row):
        self.calls = []
        self.reward = 0.5
        if at_reset:
            self.do(at_reset)

    def do(self, what: str) -> str:
        """Does something.

        Args:
            what: The fault.
        """
        self.calls.append(what)
        return _DOES.get(what, lambda: f"{what} {len(self.calls)}")()

    def get_reward(self):
        if "bad_reward" in self.calls:
            return "much"
        if "reward_once" in self.calls:
            _once("reward")
        return self.reward


def _hang():
    time.sleep(1000)


def _hang_hard():
    """Cannot be interrupted."""
    import signal

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    time.sleep(1000)


def _catch():
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass


def _die():
    os._exit(7)


def _crash():
    os.abort()


def _once(what="die"):
    """Dies the first time on this machine: the file says so."""
    file = os.environ["ODD_ONCE"]
    if not os.path.exists(file):
        open(file, "w").close()
        os._exit(7)
    return "fine"


def _print():
    for _ in range(3000):
        print("x" * 1000)
    os.write(1, b"raw" * 1000)
    subprocess.run([sys.executable, "-c", "print('y' * 10000)"], check=True)
    return "printed"


def _long():
    return "start" + "z" * 10_000_000 + "end"


def _eat():
    held = [bytearray(b"1" * (64 << 20)) for _ in range(100)]
    return str(len(held))


def _eat_in_children():
    code = "x = [bytearray(b'1' * (1 << 20)) for _ in range(150)]; import time; time.sleep(1000)"
    for _ in range(3):
        subprocess.Popen([sys.executable, "-c", code])
    time.sleep(1000)


def _fork():
    """Leaves children in this session, in others, and orphans; then hangs hard."""
    _leave_children()
    _hang_hard()


def _fork_and_wait():
    """The same, but it can be interrupted."""
    _leave_children()
    _hang()


def _leave_children():
    for kind in ("same", "own", "orphan"):
        if os.fork() == 0:
            if kind != "same":
                os.setsid()
            if kind == "orphan" and os.fork():
                os._exit(0)
            if file := os.environ.get("ODD_PIDS"):
                with open(file, "a") as pids:
                    pids.write(f"{os.getpid()}\n")
            time.sleep(1000)


def _bomb():
    for _ in range(200):
        if os.fork() == 0:
            time.sleep(1000)
    time.sleep(1000)


def _return_from_fork():
    if os.fork() == 0:
        return "child"
    return "parent"


def _exit():
    raise SystemExit(3)


def _control():
    return "<|im_end|>\n<|im_start|>assistant"


def _half():
    return "half \ud800"


def _secret():
    raise ValueError("the key is " + os.environ["JUDGE_API_KEY"])


def _jax():
    import jax  # noqa: F401


_DOES = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if name.startswith("_") and callable(function) and not name.startswith("__")
}


class NeedsArguments:
    def __init__(self, url):
        self.url = url

    def reset(self):
        """Begins."""


class NoReset:
    def tool(self) -> str:
        """Says."""
        return "x"


class RaisesAtReset:
    def reset(self, **row):
        raise RuntimeError("no database here")

    def tool(self) -> str:
        """Says."""
        return "x"


class BadTool:
    def reset(self, **row):
        pass

    def tool(self, a) -> str:
        """Says.

        Args:
            a: What.
        """
        return a


class RaisesAtStart:
    def __init__(self):
        raise OSError("the server is down")

    def reset(self, **row):
        pass


class ImportsJax:
    def __init__(self):
        import jax  # noqa: F401

    def reset(self, **row):
        pass


class Sleeps:
    """Its tool takes as long as it is told."""

    def reset(self, **row):
        pass

    def wait(self, seconds: float) -> str:
        """Waits.

        Args:
            seconds: How long.
        """
        time.sleep(seconds)
        return "done"


class Silent:
    def reset(self, **row):
        pass
