"""Reward functions for tests, correct and faulty ones; workers import them by name."""

from __future__ import annotations

import ast
import asyncio
import gc
import mmap
import os
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

not_callable = 3


def half(prompts, completions, **columns):
    return [0.5 for _ in completions]


def letters(completions, **kwargs):  # TRL's users leave out arguments that they do not read
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


def alone(completions, **columns):
    return [float(len(completions))] * len(completions)


alone.one_by_one = True


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


# Each does what its name says for a completion "bad", and gives 1 for others.


def sleeps(completions, **columns):
    if "bad" in completions:
        time.sleep(1e6)
    return [1.0] * len(completions)


def computes(completions, **columns):
    if "bad" in completions:
        exec("9**9**9**9")  # the interpreter is blocked: no signal and no thread can end it
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


def leaves_children(completions, child_file, **columns):
    """Starts processes that outlive the call, in three ways, and blocks the interpreter forever."""
    if child_file[0]:
        child = subprocess.Popen(["sleep", "1000"])
        apart = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        orphan = subprocess.run(
            ["sh", "-c", "setsid sleep 1000 >&2 & echo $!"], stdout=subprocess.PIPE, text=True
        ).stdout
        with open(child_file[0], "w") as file:
            file.write(f"{os.getpid()} {child.pid} {apart.pid} {orphan}")
        exec("9**9**9**9")
    return [1.0] * len(completions)


def forks(completions, **columns):
    """A fork of the process returns from the call, too."""
    if "bad" in completions:
        os.fork()
    return [float(len(c)) for c in completions]


def speaks_out_of_turn(completions, **columns):
    """Sends an answer for a call that nobody made."""
    if "bad" in completions:
        pipe = next(o for o in gc.get_objects() if isinstance(o, Connection) and not o.closed)
        pipe.send((10**6, None))
    return [1.0] * len(completions)


_leaked = []


def leaks(completions, **columns):
    _leaked.append(bytearray(150 << 20))
    return [float(len(_leaked))] * len(completions)


def closes_output(completions, **columns):
    if "bad" in completions:
        sys.stdout.close()
    print("still heard")
    return [1.0] * len(completions)


def shares_memory(completions, **columns):
    """Uses memory that a limit of the process's own data does not count."""
    if "bad" in completions:
        block = mmap.mmap(-1, 512 << 20)
        for _ in range(16):
            block.write(b"1" * (32 << 20))
        time.sleep(1000)
    return [1.0] * len(completions)


def children_hold_memory(completions, **columns):
    """Children that each hold less than the limit, and together more."""
    if "bad" in completions:
        code = "import time; block = bytearray(150 << 20); time.sleep(1000)"
        for _ in range(3):
            subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
        time.sleep(1000)
    return [1.0] * len(completions)


_loaded = []


def loads(completions, **columns):
    """Is slow in the first call of a process."""
    if "bad" in completions:
        os._exit(1)
    if not _loaded:
        time.sleep(1.0)
        _loaded.append("a model")
    return [1.0] * len(completions)


def only_alone(completions, **columns):
    (completion,) = completions
    return [float(len(completion))]


_client = {}


async def keeps_a_client(completions, **columns):
    """Uses a client that the first call made, like a client of an API."""

    async def serve(requests):
        while True:
            text, answered = await requests.get()
            answered.set_result(float(len(text)))

    if not _client:
        _client["requests"] = asyncio.Queue()
        _client["server"] = asyncio.create_task(serve(_client["requests"]))
    values = []
    for completion in completions:
        answered = asyncio.get_running_loop().create_future()
        await _client["requests"].put((completion, answered))
        values.append(await asyncio.wait_for(answered, 5))
    return values


async def exits_later(completions, **columns):
    await asyncio.sleep(0)
    sys.exit("no")


def knows_libraries(completions, **columns):
    """The number of large libraries that a worker has imported by itself."""
    return [float(len({"jax", "torch", "pandas", "numpy"} & set(sys.modules)))] * len(completions)


class NoText(Exception):  # noqa: N818
    def __str__(self):
        raise RuntimeError(os.environ["JUDGE_API_KEY"])


def raises_without_text(completions, log_extra, **columns):
    """Its logs and its error cannot be pickled or printed, and one of its threads prints a key."""
    thread = threading.Thread(target=lambda: exec("raise KeyError(os.environ['JUDGE_API_KEY'])"))
    thread.start()
    thread.join()
    log_extra("judge", [NoText for _ in completions])
    raise NoText


def slow(completions, **columns):
    time.sleep(0.05 * len(completions))
    return [1.0] * len(completions)


def odd_steps(completions, log_steps, **columns):
    """Logs steps as the first completion says."""
    log_steps(ast.literal_eval(completions[0]))
    return [1.0] * len(completions)
