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

from grpo_jax.rewards import keeper
from grpo_jax.rewards.pool import Limits, Pool
from grpo_jax.rewards.registry import load
from grpo_jax.rewards.scores import RewardError

NAN = float("nan")
BAD = ["x", "bad", "y", "z"]


def pool(
    *names, seconds=5.0, memory_bytes=2 << 30, num_workers=1, max_tokens=8, start_seconds=120.0
):
    rewards = load([n if ":" not in n else f"odd_rewards{n}" for n in names], [1.0] * len(names))
    return Pool(
        rewards,
        max_completion_tokens=max_tokens,
        num_workers=num_workers,
        limits=Limits(seconds, memory_bytes, start_seconds),
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
    with pool(":alone", ":in_call") as p:
        np.testing.assert_array_equal(score(p, ["a"] * 3, group=3).reward_B, [4] * 3)


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
        (":sleeps", "timeout", ["longer than rewards.timeout_s = 1 s"]),
        (":computes", "timeout", ["longer than"]),
        (":raises", "error", ["KeyError: 'gold'"]),
        (":exits", "error", ["SystemExit"]),
        (":not_numbers", "values", ["'1' (str)"]),
        (":eats", "memory", ["rewards.memory_limit_gib"]),
        (":dies", "died", ["status 7"]),
    ],
)
def test_one_bad_completion_costs_no_other_its_reward(name, kind, words):
    with pool(name, ":half", seconds=1.0) as p:
        score(p, ["x"])  # what hangs in its first call may be loading a model
        got = score(p, BAD, group=4)
        np.testing.assert_array_equal(got.by_name[name[1:]], [1, NAN, 1, 1])
        np.testing.assert_array_equal(got.failed[name[1:]], [False, True, False, False])
        np.testing.assert_array_equal(got.reward_B, [1.5, NAN, 1.5, 1.5])  # unknown
        (failure,) = got.failures
        assert (failure.reward, failure.row, failure.kind) == (name[1:], 1, kind)
        for word in [repr(name[1:]), *words]:
            assert word in failure.message
        again = score(p, ["x", "y"], group=2)  # a new worker is in its place
        np.testing.assert_array_equal(again.reward_B, [1.5, 1.5])


def test_all_of_them_in_one_batch():
    names = ("sleeps", "computes", "raises", "too_few", "not_numbers", "eats", "dies")
    with pool(*(f":{n}" for n in names), seconds=1.0, num_workers=2) as p:
        score(p, ["x"] * 8)
        got = score(p, BAD * 2, group=4)
    for name in names:
        bad = [name == "too_few", True] + [name == "too_few"] * 2
        np.testing.assert_array_equal(got.failed[name], bad * 2)
    assert [got.num_failed(k) for k in ("timeout", "error", "values", "memory", "died")] == [
        4, 2, 10, 2, 2
    ]  # fmt: skip


def test_a_wrong_number_of_values_is_not_healed():
    """One by one, the function would return one value, which is right by chance."""
    with pool(":too_few") as p:
        got = score(p, ["x", "y", *BAD], group=3)  # x, y, x; bad, y, z
    np.testing.assert_array_equal(got.by_name["too_few"], [1, 1, 1, NAN, NAN, NAN])
    assert {f.kind for f in got.failures} == {"values"} and not got.retried


def test_what_fails_for_a_group_alone_is_told():
    with pool(":only_alone") as p:
        got = score(p, ["a", "bb", "ccc"], group=2)
    np.testing.assert_array_equal(got.reward_B, [1, 2, 3])
    ((count, message),) = got.retried.values()
    assert count == 1 and "ValueError: too many values to unpack" in message


def test_a_slow_function_is_not_a_hanging_one():
    """16 completions take longer together than one may take alone."""
    with pool(":slow", seconds=0.5) as p:
        assert not score(p, ["a"] * 4, group=1).failures
        got = score(p, ["a"] * 16, group=16)
    assert not got.failures and (got.reward_B == 1).all()


def test_what_a_killed_worker_started_is_killed_too(tmp_path):
    """In its session, in another, and orphaned; at once, not in time."""
    file = tmp_path / "pids"
    with pool(":leaves_children", seconds=2.0) as p:
        score(p, ["a"], {"child_file": [""]})
        got = score(p, ["a"], {"child_file": [str(file)]})
        assert got.num_failed("timeout") == 1
        pids = file.read_text().split()
        assert len(pids) == 4 and not any(_is_alive(int(pid)) for pid in pids)


# --- Answers, memory and output that are not as they should be ------------------------------------


def test_an_answer_belongs_to_its_call():
    texts = ["x" * (i % 7) for i in range(20)]
    texts[5] = "bad"
    with pool(":forks", ":half") as p:
        got = score(p, texts, group=2)
    np.testing.assert_array_equal(got.by_name["forks"], [len(t) for t in texts])
    np.testing.assert_array_equal(got.by_name["half"], [0.5] * 20)
    assert not got.failures


def test_an_answer_to_no_call_costs_the_worker_alone():
    with pool(":speaks_out_of_turn", ":letters", num_workers=2) as p:
        got = score(p, ["a", "bad", "ccc", "dd"])
    np.testing.assert_array_equal(got.failed["speaks_out_of_turn"], [False, True, False, False])
    np.testing.assert_array_equal(got.by_name["letters"], [1, 3, 3, 2])


def test_a_worker_whose_memory_is_used_up_is_replaced():
    """Three calls fill it; the one that finds no more is made again in the next."""
    with pool(":leaks", ":half", memory_bytes=600 << 20) as p:
        got = score(p, ["a"] * 8)
    assert not got.failures
    counted = got.by_name["leaks"]
    assert counted.min() == 1 and (counted == 1).sum() > 1 and counted.max() < 5


def test_a_worker_whose_output_was_closed_is_replaced(capfd):
    with pool(":closes_output") as p:
        got = score(p, ["a", "bad", "b", "c"])
    np.testing.assert_array_equal(got.failed["closes_output"], [False, True, False, False])
    assert capfd.readouterr().err.count("still heard") == 3


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("name", ["shares_memory", "children_hold_memory"])
def test_the_memory_limit_holds_for_all_that_a_worker_uses(name):
    with pool(f":{name}", memory_bytes=350 << 20, seconds=100.0) as p:
        got = score(p, ["a", "bad", "b"], group=1)
    np.testing.assert_array_equal(got.failed[name], [False, True, False])
    (failure,) = got.failures
    assert failure.kind == "memory" and "with all that it started, held more" in failure.message


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_mapped_files_and_shared_pages_are_not_counted_as_memory(tmp_path):
    """A file of 64 MiB that a process maps and reads counts nothing, 96 MiB of its own do."""
    (tmp_path / "weights").write_bytes(b"1" * (64 << 20))
    code = f"""if True:
        import os, numpy as np
        from grpo_jax.rewards import keeper
        mapped = np.memmap({str(tmp_path / "weights")!r}, mode="r")
        mapped.sum()
        held = keeper.held_bytes(os.getpid())
        assert keeper._resident_bytes(os.getpid()) > held + (64 << 20)
        memory = keeper.Memory(held + (32 << 20))
        assert not memory.is_beyond([os.getpid()])
        block = bytearray(b"1" * (96 << 20))
        assert memory.is_beyond([os.getpid()]) and len(block)
    """
    subprocess.run(
        [sys.executable, "-c", code], check=True
    )  # what this process has freed is its own


@pytest.mark.skipif(sys.platform != "linux", reason="needs keepers")
def test_a_worker_that_was_ending_when_its_end_was_asked_for_has_its_own_status():
    """The trainer sees a closed pipe, and asks for the end, before the worker has ended."""
    code = """if True:
        import os, signal
        from grpo_jax.rewards import keeper
        trainer = os.getpid()
        for status in (7, -signal.SIGABRT) * 20:
            hears, tells = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(hears)
                keeper.main(tells, trainer, 0, 64, 1.0)
                for _ in range(400):  # the system takes its time to close them
                    os.pipe()
                os._exit(status) if status > 0 else os.kill(os.getpid(), -status)
            os.close(tells)
            os.read(hears, 1)
            os.kill(pid, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
            os.close(hears)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_may_be_loaded_in_a_first_call():
    """In the worker that takes the place of another as well."""
    with pool(":loads", seconds=0.5) as p:
        got = score(p, ["a", "bad", "b", "c"], group=1)
    np.testing.assert_array_equal(got.failed["loads"], [False, True, False, False])


def test_a_function_that_hangs_from_the_first_call_is_told_of():
    with pool(":sleeps", seconds=0.5, start_seconds=4.0) as p:
        got = score(p, ["bad", "bad", "a"], group=1)
    np.testing.assert_array_equal(got.failed["sleeps"], [True, True, False])
    first, second = (f.message for f in got.failures)
    assert "rewards.start_timeout_s = 4 s to answer for the first time" in first
    assert "rewards.timeout_s = 0.5 s" in second


def test_asynchronous_functions_share_an_event_loop():
    with pool(":keeps_a_client", ":later", ":exits_later") as p:
        got = score(p, ["a", "bb", "ccc", "dddd"], group=2)
    np.testing.assert_array_equal(got.by_name["keeps_a_client"], [1, 2, 3, 4])
    assert got.failed["exits_later"].all() and not got.failed["later"].any()


def test_a_worker_imports_no_large_library():
    with pool(":knows_libraries") as p:
        assert score(p, ["a"]).reward_B == [0]


def test_keys_are_hidden_in_what_a_worker_says(capfd, monkeypatch):
    key = "correct-horse-battery"
    monkeypatch.setenv("JUDGE_API_KEY", key)
    with pool(":raises_without_text") as p:
        (failure,) = score(p, ["a"]).failures
    assert failure.kind == "error" and "raised NoText: (its text cannot be read" in failure.message
    err = capfd.readouterr().err
    assert "KeyError: '***'" in err and key not in err


def test_the_sources_of_the_start_hold(monkeypatch, tmp_path):
    """A module and what it imports; a worker that starts later imports what is there no more."""
    part = tmp_path / "held_part.py"
    part.write_text("ONE = 1.0\n")
    file = tmp_path / "held_rewards.py"
    file.write_text(
        "import os\nfrom held_part import ONE\ndef f(completions, **columns):\n"
        "    if 'bad' in completions:\n        os._exit(1)\n    return [ONE for c in completions]\n"
        "def g(completions, **columns):\n    raise KeyError('here')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with Pool(load(["held_rewards:f", "held_rewards:g"], [1.0, 1.0])) as p:
        file.write_text("def f(completions, **columns):\n    return [-7.0] * len(completions)\n")
        part.unlink()
        got = score(p, ["a", "bad", "b"])
    np.testing.assert_array_equal(got.by_name["f"], [1, NAN, 1])
    last = [f.message for f in got.failures if f.reward == "g"][-1]
    assert "held_rewards.py, line 8, in g: raise KeyError('here')" in last


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
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
    """With all that they started; even one that holds its interpreter in one long computation."""
    file = tmp_path / "pids"
    code = f"""
import sys; sys.path[:] = {sys.path!r}
from test_pool import pool
p = pool(":leaves_children", seconds=1000.0)
p.submit(["p"], ["a"], {{"child_file": [{str(file)!r}]}})
print(p._thread.join())
"""
    trainer = subprocess.Popen([sys.executable, "-c", code])
    while not file.exists() or len(file.read_text().split()) < 4:
        assert trainer.poll() is None
        time.sleep(0.05)
    pids = [int(pid) for pid in file.read_text().split()]
    assert all(map(_is_alive, pids))
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    for _ in range(200):
        if not any(map(_is_alive, pids)):
            break
        time.sleep(0.05)
    assert not any(map(_is_alive, pids))


def test_a_worker_that_cannot_start_is_an_error_not_a_hang(monkeypatch, tmp_path):
    """A module that this process can import, and a new one cannot."""
    file = tmp_path / "fleeting.py"
    file.write_text(
        "import os\nassert os.environ['HERE'] == str(os.getpid())\n"
        "def f(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HERE", str(os.getpid()))
    rewards = load(["fleeting:f"], [1.0])
    with Pool(rewards) as p:
        with pytest.raises(RewardError, match=r"^A reward worker could not start.*AssertionError"):
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
def test_adversarial_completions_of_every_kind(capsys):
    """None hangs, none crashes, all get what they are owed, in bounded memory."""
    cases = adversarial.of_each_kind()[:440]  # groups of 8
    rewards = load(("math_answer", "exact_answer", "token_f1", "think_format"), (1.0,) * 4)
    with Pool(rewards, num_workers=2, limits=Limits(10.0, 1 << 30)) as p:
        p.wait_ready()
        began = time.monotonic()
        got = score(p, [c.completion for c in cases], {"answer": ["72"] * len(cases)}, group=8)
        seconds = time.monotonic() - began
        peaks = [_peak_bytes(pid) for w in p._workers for pid in keeper.below(w.process.pid)]
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
