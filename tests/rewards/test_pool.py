"""Rewards in worker processes: what hangs, breaks or eats memory costs its own completion alone."""

import os
import signal
import subprocess
import sys
import threading
import time

import adversarial
import numpy as np
import pytest

from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.rewards.reward import load
from grpo_jax.rewards.score import RewardError

NAN = float("nan")
BAD = ["x", "bad", "y", "z"]


def pool(*names, seconds=5.0, memory_bytes=2 << 30, num_workers=1, max_tokens=8):
    rewards = load([n if ":" not in n else f"odd_rewards{n}" for n in names], [1.0] * len(names))
    return Pool(
        rewards,
        max_completion_tokens=max_tokens,
        num_workers=num_workers,
        limits=Limits(seconds, memory_bytes),
    )


def score(p, completions, columns=None, **more):
    return p.score(["p"] * len(completions), completions, columns or {}, **more)


def test_scores_are_those_of_the_functions():
    with pool(":letters", ":half", num_workers=2) as p:
        got = score(p, ["abc", "?", ""], group=2)
        np.testing.assert_array_equal(got.by_name["letters"], [3, NAN, 0])
        np.testing.assert_array_equal(got.by_name["half"], [0.5, 0.5, 0.5])
        np.testing.assert_array_equal(got.reward_B, [3.5, 0.5, 0.5])
        assert not got.failures and all(s > 0 for s in got.seconds["letters"])
        assert len(score(p, []).reward_B) == 0


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_keep_their_order(workers):
    texts = ["x" * (i % 7) for i in range(200)]
    with pool(":letters", num_workers=workers) as p:
        got = score(p, texts, group=8)
    np.testing.assert_array_equal(got.by_name["letters"], [len(t) for t in texts])


def test_functions_are_called_with_whole_groups():
    with pool(":in_call") as p:
        np.testing.assert_array_equal(score(p, ["a"] * 7, group=4).reward_B, [4] * 4 + [3] * 3)
        np.testing.assert_array_equal(score(p, ["a"] * 3).reward_B, [1] * 3)


def test_everything_reaches_the_functions():
    with pool(":num_tokens", ":only_named", ":logs", ":replies") as p:
        got = p.score(
            [[{"role": "user", "content": "q"}]] * 2,
            [[{"role": "assistant", "content": "abc"}], [{"role": "assistant", "content": ""}]],
            {"answer": ["u", "v"]},
            completion_ids=[[1, 2], [3]],
            group=2,
            trainer_state={"global_step": 4, "max_steps": 5, "epoch": 1.0},
        )
    np.testing.assert_array_equal(got.by_name["num_tokens"], [0.25, 0.125])
    np.testing.assert_array_equal(got.by_name["only_named"], [4, 4])
    np.testing.assert_array_equal(got.by_name["replies"], [4, 1])
    assert got.failed["logs"].all()  # its completions have no length of text


def test_metrics_and_extras_come_back():
    with pool(":logs") as p:
        got = score(p, ["a", "bcd", "e"], group=2)
    assert got.metrics == {"letters": (5.0, 2)}
    assert got.extras == {"upper": ["A", "BCD", "E"]}


def test_a_reward_does_not_spoil_the_others():
    columns = {"answer": ["x", "y"], "level": [1, 2]}
    with pool(":spoil", ":letters") as p:
        got = score(p, ["a", "bb"], columns, group=2)
    np.testing.assert_array_equal(got.reward_B, [2, 4])
    assert columns == {"answer": ["x", "y"], "level": [1, 2]}


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        (":sleeps", "timeout", ["longer than rewards.time_limit_s = 1 s"]),
        (":computes", "timeout", ["longer than"]),
        (":raises", "error", ["KeyError: 'gold'"]),
        (":exits", "error", ["SystemExit"]),
        (":too_few", "values", ["returned 0 values for 1 completions"]),
        (":not_numbers", "values", ["'1' (str)"]),
        (":eats", "memory", ["rewards.memory_gb"]),
        (":dies", "died", ["status 7"]),
    ],
)
def test_one_bad_completion_costs_no_other_its_reward(name, kind, words):
    with pool(name, ":half", seconds=1.0) as p:
        got = score(p, BAD, group=4)
        np.testing.assert_array_equal(got.by_name[name[1:]], [1, NAN, 1, 1])
        np.testing.assert_array_equal(got.failed[name[1:]], [False, True, False, False])
        np.testing.assert_array_equal(got.reward_B, [1.5, 0.5, 1.5, 1.5])
        (failure,) = got.failures
        assert (failure.reward, failure.row, failure.kind) == (name[1:], 1, kind)
        for word in [repr(name[1:]), *words]:
            assert word in failure.message
        again = score(p, ["x", "y"], group=2)  # a new worker is in its place
        np.testing.assert_array_equal(again.reward_B, [1.5, 1.5])


def test_all_of_them_in_one_batch():
    names = ("sleeps", "computes", "raises", "too_few", "not_numbers", "eats", "dies")
    with pool(*(f":{n}" for n in names), seconds=1.0, num_workers=2) as p:
        got = score(p, BAD * 3, group=4)
    for name in names:
        np.testing.assert_array_equal(got.failed[name], [False, True, False, False] * 3)
    assert [got.num_failed(k) for k in ("timeout", "error", "values", "memory", "died")] == [
        6, 3, 6, 3, 3
    ]  # fmt: skip


def test_a_slow_function_is_not_a_hanging_one():
    """16 completions take longer together than one may take alone."""
    with pool(":slow", seconds=0.5) as p:
        assert not score(p, ["a"] * 4, group=1).failures
        got = score(p, ["a"] * 16, group=16)
    assert not got.failures and (got.reward_B == 1).all()


def test_what_a_killed_worker_started_is_killed_too(tmp_path):
    file = tmp_path / "pids"
    with pool(":leaves_a_child", seconds=2.0) as p:
        got = score(p, ["a"], {"child_file": [str(file)]})
        assert got.num_failed("timeout") == 1
        for pid in map(int, file.read_text().split()):
            for _ in range(100):
                if not _is_alive(pid):
                    break
                time.sleep(0.05)
            assert not _is_alive(pid)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] not in "ZX"
    except FileNotFoundError:
        return False


def test_the_end_of_the_pool_ends_its_workers_and_its_waiters():
    p = pool(":sleeps", seconds=1000.0)
    p.wait_ready()
    (pid,) = [w.process.pid for w in p._workers]
    ticket = p.submit(["p"], ["bad"], {})
    threading.Timer(0.3, p.close).start()
    with pytest.raises(RewardError, match="were ended"):
        ticket.result()
    p.close()
    assert not _is_alive(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's parent-death signal")
def test_workers_die_with_a_trainer_that_was_killed(tmp_path):
    """Even one that holds its interpreter in one long computation."""
    code = f"""
import sys; sys.path[:] = {sys.path!r}
from test_pool import pool
p = pool(":computes", seconds=1000.0)
p.wait_ready()
p.submit(["p"], ["bad"], {{}})
print(p._workers[0].process.pid, flush=True)
p._thread.join()
"""
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    worker = int(trainer.stdout.readline())
    assert _is_alive(worker)
    time.sleep(0.5)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    for _ in range(100):
        if not _is_alive(worker):
            break
        time.sleep(0.05)
    assert not _is_alive(worker)


def test_a_worker_that_cannot_start_is_an_error_not_a_hang(monkeypatch, tmp_path):
    """A module that this process has, and a new one cannot import."""
    file = tmp_path / "fleeting.py"
    file.write_text("def f(completions, **columns):\n    return [1.0] * len(completions)\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = load(["fleeting:f"], [1.0])
    file.unlink()
    with Pool(rewards) as p:
        with pytest.raises(RewardError, match=r"could not start.*fleeting"):
            score(p, ["a"])
        with pytest.raises(RewardError):  # later ones, too
            score(p, ["a"])


def test_workers_that_die_at_once_are_an_error_not_a_loop(monkeypatch, tmp_path):
    (tmp_path / "fatal.py").write_text(
        "import os\nif os.environ['HERE'] != str(os.getpid()):\n    os._exit(3)\n"
        "def f(completions, **columns):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HERE", str(os.getpid()))
    rewards = load(["fatal:f"], [1.0])
    with Pool(rewards) as p:
        with pytest.raises(RewardError, match=r"status 3 before they answered.*3 in a row"):
            score(p, ["a"])


def test_the_programs_own_output_stays_clean(capfd):
    with pool(":prints") as p:
        score(p, ["a"])
    out, err = capfd.readouterr()
    assert "a reward talks" not in out and "a reward talks" in err


def test_invalid_unicode_passes():
    with pool(":letters") as p:
        got = score(p, ["\ud800\x00", "a" * 2_000_000])
    np.testing.assert_array_equal(got.reward_B, [2, 2_000_000])


@pytest.mark.slow
def test_a_thousand_adversarial_completions(capsys):
    """None hangs, none crashes, all get what they are owed, in bounded memory."""
    cases = adversarial.make(1000)
    rewards = load(("math_answer", "exact_answer", "token_f1", "think_format"), (1.0,) * 4)
    with Pool(rewards, num_workers=2, limits=Limits(10.0, 1 << 30)) as p:
        p.wait_ready()
        began = time.monotonic()
        got = score(p, [c.completion for c in cases], {"answer": ["72"] * len(cases)}, group=8)
        seconds = time.monotonic() - began
        peaks = [_peak_bytes(w.process.pid) for w in p._workers]
    with capsys.disabled():
        print(f"\n{len(cases) / seconds:,.0f} adversarial completions per second, four rewards")
    assert not got.failures
    assert max(peaks) < 1 << 30
    for case, value in zip(cases, got.by_name["math_answer"]):
        assert case.expected is None or value == case.expected, case.kind


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has held so far."""
    with open(f"/proc/{pid}/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
