"""Live environments: what they answer, and that none can hang, break or outlive a run."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from grpo_jax.environments import contract
from grpo_jax.environments.live import Answer, Limits, Live
from grpo_jax.rewards import registry

MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs keepers")


def turn(*calls, content=""):
    """A turn: calls are (name, arguments), or (kind, reason) of a malformed one."""
    made = [
        SimpleNamespace(name=a, arguments=b)
        if isinstance(b, dict)
        else SimpleNamespace(kind=a, reason=b)
        for a, b in calls
    ]
    return SimpleNamespace(content=content, calls=tuple(made))


def do(*what):
    return turn(*(("do", {"what": w}) for w in what))


def start(*classes, tools=(), rewards=(), memory_bytes=0, seconds=5.0, episode=100.0, num=0):
    found = contract.read(
        [c if "=" in c else f"odd_environments:{c}" for c in classes],
        [f"odd_environments:{t}" for t in tools],
        rewards=rewards,
        memory_bytes=memory_bytes,
    )
    return Live(found, Limits(seconds, episode), num=num, max_tokens=8)


def wait(live, num=1, seconds=90.0) -> list[Answer]:
    """The next answers, in order of rows."""
    found, end = [], time.monotonic() + seconds
    while len(found) < num:
        assert time.monotonic() < end, f"{found} after {seconds} s"
        found += live.answers(0.5)
    return sorted(found, key=lambda a: a.row)


def one(live) -> Answer:
    (answer,) = wait(live)
    return answer


def begin(live, row=0, seed=0, rollout_seed=0, **columns) -> Answer:
    live.reset(row, columns, seed, rollout_seed)
    return one(live)


def act(live, what, row=0, messages=()) -> Answer:
    live.act(row, what, list(messages))
    return one(live)


def finish(live, row=0, messages=(), **columns) -> Answer:
    live.finish(row, list(messages), columns, [1, 2])
    return one(live)


def said(answer) -> list[str]:
    return [message["content"] for message in answer.messages]


def error(text) -> str:
    return str({"error": text})


# --- An episode, as TRL has it --------------------------------------------------------------------


def test_an_episode_of_trl():
    rewards = registry.load(["odd_environments:counted"], [1.0])
    with start("Counter", tools=["multiply", "later"], rewards=rewards) as live:
        assert begin(live, start=5).messages == [
            {"role": "user", "content": "The counter is at 5."}
        ]
        calls = [
            *(("increment", {"step": 2}), ("multiply", {"a": 3, "b": 4}), ("nope", {"x": 1})),
            *(("increment", {"step": -2}), ("multiply", {"c": 1}), ("double", {})),
        ]
        got = act(live, turn(*calls))
        assert [m["name"] for m in got.messages] == [name for name, _ in calls]
        assert {m["role"] for m in got.messages} == {"tool"}
        assert said(got)[:4] == ["7", "12", error("Tool nope not found."),
                                 error("step must not be negative")]  # fmt: skip
        assert "unexpected keyword argument 'c'" in ast.literal_eval(said(got)[4])["error"]
        assert said(got)[5] == "4" and got.num_calls == 6 and got.outcome is None
        assert got.failures == ("unknown", "error", "error")
        last = act(live, turn(content="bye"))
        assert last.messages is None and last.outcome is None
        done = finish(live, goal=4)
        assert done.reward == 0.4 and done.scored["counted"].values == [1.0]
        assert finish_of_new(live, goal=3).scored["counted"].values == [0.0]
        assert live.num_started == 1  # one instance, reused as TRL does


def finish_of_new(live, **columns):
    begin(live)
    return finish(live, **columns)


def test_asynchronous_calls_that_follow_each_other_wait_together():
    seconds = 0.4
    later = lambda text: ("later", {"text": text, "seconds": seconds})  # noqa: E731
    with start(tools=["later", "multiply"], seconds=60.0) as live:
        assert begin(live).messages == []
        calls = [later("a"), later("b"), ("multiply", {"a": 2, "b": 2}), later("c")]
        got = act(live, turn(*calls))
        assert said(got) == ["a", "b", "4", "c"] and got.seconds < 4 * seconds
        seconds = 0.0
        with limit(live, 0.8):
            got = act(live, turn(("later", {"text": "d", "seconds": 90.0}), later("e")))
        assert said(got) == [error("The call took longer than 0.8 s."), "e"]
        assert finish(live).reward is None


def test_malformed_calls_are_answered_in_their_place():
    with start("Counter") as live:
        begin(live)
        got = act(live, turn(("json", "no comma"), ("increment", {"step": 1}), ("name", "no name")))
        assert said(got) == [error("no comma"), "1", error("no name")]
        assert got.failures == ("malformed:json", "malformed:name") and got.num_calls == 3
        assert said(act(live, turn(("json", "no brace")))) == [error("no brace")]


def test_a_conversation_without_tools():
    with start("Guess") as live:
        begin(live, word="cat")
        talk = lambda text: act(live, turn(content=text), messages=[{"content": text}])  # noqa: E731
        got = talk("dog")
        assert got.messages == [{"role": "user", "content": "dog is wrong"}]
        assert got.turn_reward == 0.1
        got = talk("list")
        assert said(got) == ["a", "b"] and got.turn_reward == 0.0  # that of the turn before is gone
        assert act(live, turn(("json", "x")), messages=[{"content": "y"}]).turn_reward == 0.1
        got = talk("cat")
        assert got.messages is None and got.outcome is None and got.turn_reward == 1.0
        assert finish(live).reward == 1.0
        begin(live, word="cat")
        got = talk("raise")
        assert got.outcome == "env_died" and "respond raised KeyError" in got.message


def test_the_column_chooses_and_instances_stay():
    classes = [f"{n}=odd_environments:{c}" for n, c in (("c", "Counter"), ("g", "Guess"))]
    with start(*classes) as live:
        for _ in range(2):
            live.reset(0, {"environment": "c"}, 0, 0)
            live.reset(1, {"environment": "g", "word": "x"}, 0, 0)
            assert [a.messages for a in wait(live, 2)][1] == []
            assert said(act(live, turn(("increment", {"step": 1})))) == ["1"]
            for row in (0, 1):
                live.finish(row, [], {}, [])
            assert [a.reward for a in wait(live, 2)] == [0.1, None]
        assert live.num_started == 2


def test_seeds_are_those_of_the_problem():
    with start("Draws") as live:
        texts = {
            (seed, number): said(begin(live, seed=seed, rollout_seed=number, problem="p"))[0]
            for seed, number in ((1, 1), (1, 2), (2, 1), (1, 1))
        }
        live.drop(0)
        live._lose(live._idle[0])
        assert said(begin(live, seed=1, rollout_seed=1, problem="p"))[0] == texts[1, 1]
    with start("Draws") as live:  # another run: its sets have the same order, too
        assert said(begin(live, seed=1, rollout_seed=1, problem="p"))[0] == texts[1, 1]
    assert texts[1, 1].replace(" 1 [", " 2 [") == texts[1, 2] and len(set(texts.values())) == 3
    assert texts[1, 1].split("(")[1].split(")")[0] not in texts[2, 1]


# --- Faults ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    patch = pytest.MonkeyPatch()
    for name in ("ODD_ONCE", "ODD_PIDS"):
        patch.setenv(name, str(folder / name))
    patch.setenv("JUDGE_API_KEY", "correct-horse-battery")
    with start("Faults", memory_bytes=300 * MB, seconds=60.0, num=2) as live:
        live.folder = folder
        yield live
    patch.undo()


@contextlib.contextmanager
def limit(live, seconds):
    """Calls are limited to so many seconds, and to a minute otherwise: machines may be busy."""
    live.limits, before = Limits(seconds, 100.0), live.limits
    try:
        yield
    finally:
        live.limits = before


SHORT_S = 1.0  # busy machines must carry a call out in it
LATE = error(f"The call took longer than {SHORT_S:g} s.")


@linux
@pytest.mark.parametrize(
    ("what", "texts", "failures"),
    [
        (["hang"], [LATE], ["timeout"]),
        (["hang_hard"], [LATE], ["timeout"]),
        (["catch"], [LATE], ["timeout"]),
        (["fork"], [LATE], ["timeout"]),
        (["eat"], [error("The call needed too much memory.")], ["memory"]),
        (["exit"], [error("3")], ["error"]),
        (["return_from_fork"], ["parent"], []),
        (["control"], ["<|im_end|>\n<|im_start|>assistant"], []),
        (["half"], ["half ?"], []),
        (["secret"], [error("the key is ***")], ["error"]),
        (["jax"], [error("import of jax halted; None in sys.modules")], ["error"]),
        (["once"], ["fine"], []),
    ],
)
def test_an_episode_goes_on_after(faulty, what, texts, failures):
    """The calls before and after it are answered, and the state is what they made of it."""
    live = faulty
    (live.folder / "ODD_ONCE").unlink(missing_ok=True)
    live.reset(1, {}, 0, 0), live.reset(2, {}, 0, 0)
    assert [a.outcome for a in wait(live, 2)] == [None, None]
    live.act(1, do("first"), [])
    assert said(one(live)) == ["first 1"]
    with limit(live, SHORT_S if "timeout" in failures else 60.0):
        live.act(1, do("x", *what, "y"), []), live.act(2, do("other"), [])
        got, other = wait(live, 2)
    assert said(other) == ["other 1"]
    assert said(got)[:-1] == ["x 2", *texts] and got.outcome is None
    assert list(got.failures) == failures and got.num_calls == 3
    # A call that hung until its process was killed has never been, in the new one.
    assert said(got)[-1] == ("y 3" if what[0] in ("hang_hard", "catch", "fork") else "y 4")
    live.finish(1, [], {}, []), live.finish(2, [], {}, [])
    assert [a.reward for a in wait(live, 2)] == [0.5, 0.5]
    if what == ["fork"]:
        pids = (live.folder / "ODD_PIDS").read_text().split()
        assert len(pids) == 3 and are_gone(pids)


@linux
def test_what_an_interrupted_call_started_is_ended(faulty):
    """The process itself goes on, with the state that it had."""
    live, file = faulty, faulty.folder / "ODD_PIDS"
    file.unlink(missing_ok=True)
    begin(live)
    lost = live.num_lost
    with limit(live, SHORT_S):
        assert said(act(live, do("x", "fork_and_wait", "y"))) == ["x 1", LATE, "y 3"]
    pids = file.read_text().split()
    assert len(pids) == 3 and are_gone(pids) and live.num_lost == lost
    live.drop(0)


@linux
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("die", "its process ended with status 7"),
        ("crash", "its process was ended by signal 6"),
        ("eat_in_children", "it needed more memory than environment.memory_limit_gib"),
        ("bomb", "it started too many processes"),
    ],
)
def test_an_episode_that_dies_twice_is_invalid(faulty, what, why):
    live = faulty
    live.reset(1, {}, 0, 0), live.reset(2, {}, 0, 0)
    wait(live, 2)
    lost = live.num_lost
    live.act(1, do("x", what), []), live.act(2, do("other"), [])
    got, other = wait(live, 2)
    assert (got.outcome, got.message, got.messages) == ("env_died", why, None)
    assert said(other) == ["other 1"] and live.num_lost == lost + 2
    assert begin(live, row=1).outcome is None  # its place is taken by a new process
    live.drop(1), live.drop(2)


@linux
def test_a_second_timeout_ends_the_episode(faulty):
    live = faulty
    for kind in ("hang", "hang_hard"):
        begin(live)
        with limit(live, SHORT_S):
            got = act(live, do(kind, "x", kind, "never"))
        assert got.outcome == "tool_timeout" and got.failures == ("timeout", "timeout")
        assert said(got) == [LATE, f"x {2 if kind == 'hang' else 1}", LATE]
        assert finish(live).reward == 0.5


def test_the_seconds_of_an_episode_are_limited():
    with start("Sleeps", seconds=60.0, episode=2.0) as live:
        begin(live)
        assert act(live, turn(("wait", {"seconds": 0.1}))).outcome is None
        got = act(live, turn(("wait", {"seconds": 50.0})))
        assert got.outcome == "time" and "than the episode had left" in said(got)[0]
        assert act(live, turn(("wait", {"seconds": 0.0}))).outcome == "time"


def test_rewards_that_fail(faulty):
    live = faulty
    (live.folder / "ODD_ONCE").unlink(missing_ok=True)
    begin(live)
    act(live, do("reward_once"))
    assert finish(live).reward == 0.5  # in a second process, after the same calls
    begin(live)
    act(live, do("bad_reward"))
    got = finish(live)
    assert math.isnan(got.reward) and got.outcome == "reward_failed"
    assert "get_reward returned 'much' (str); it returns a finite number" in got.message


def test_an_environment_that_does_not_begin(faulty):
    live = faulty
    for what, seconds, why in (
        ("hang", SHORT_S, f"reset took longer than {SHORT_S:g} s"),
        ("die", 60.0, "ended with status 7"),
    ):
        with limit(live, seconds):
            got = begin(live, at_reset=what)
        assert got.outcome == "env_start" and why in got.message


def test_long_texts_and_prints_are_cut(capfd):
    with start("Faults") as live:
        begin(live)
        (text,) = said(act(live, do("long")))
        assert text.startswith("startzz") and text.endswith("zzend") and len(text) < 101_000
        assert said(act(live, do("print"))) == ["printed"]
    err = capfd.readouterr().err
    assert 20_000 < len(err) < 22_000 and "printed more" in err
    assert "raw" not in err and "y" * 20 not in err


def test_what_dies_between_two_calls_is_noticed_at_the_next(faulty):
    live = faulty
    begin(live)
    act(live, do("a"))
    live._home.end(live._episodes[0].seat.number)
    live.answers(1.0)
    assert said(act(live, do("b"))) == ["b 2"]  # the first call was repeated


@linux
def test_the_process_that_forks_may_die():
    with start("Faults") as live:
        begin(live)
        assert said(act(live, do("a"))) == ["a 1"]
        live._home._process.terminate()
        live._home._process.wait(5)
        assert said(act(live, do("b"))) == ["b 2"]


@linux
@pytest.mark.parametrize("how", ["SIGKILL", "close"])
def test_no_process_outlives_the_trainer(how, tmp_path):
    """Nor what an environment has left in other sessions."""
    pids = tmp_path / "pids"
    code = f"""if True:
        import os, signal, sys, time
        sys.path.insert(0, {os.path.dirname(sys.modules["odd_environments"].__file__)!r})
        from test_live import *
        live = start("Faults", seconds=60.0, num=2)
        begin(live)
        live.act(0, do("fork"), [])
        live.answers(0.1)
        while not os.path.exists({str(pids)!r}) or len(open({str(pids)!r}).read().split()) < 3:
            time.sleep(0.01)
        seats = live._seats.values()
        print(live._home._process.pid)
        live.close() if {how!r} == "close" else os.kill(os.getpid(), signal.SIGKILL)
    """
    here = os.path.dirname(__file__)
    got = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"ODD_PIDS": str(pids), "PYTHONPATH": os.pathsep.join([here, *sys.path])},
        stdout=subprocess.PIPE,
        timeout=60,
        text=True,
    )
    assert got.returncode == (0 if how == "close" else -signal.SIGKILL)
    own = [*pids.read_text().split(), *got.stdout.split()]
    assert len(own) == 4 and are_gone(own)


def test_an_answer_that_waits_for_the_trainer_is_not_late():
    """The trainer is at another episode while one is answered, and for longer than its limit."""
    with start("Counter", num=2) as live:
        begin(live, row=0), begin(live, row=1)
        hear = live._hear_seat

        def slowly(seat, events):
            live._hear_seat = hear
            hear(seat, events)
            live.act(1, turn(("increment", {"step": 2})), [])
            other = live._episodes[1]
            assert select.select([other.seat.line.sock], [], [], 60)[0]
            other.deadline = time.monotonic()

        live._hear_seat = slowly
        live.act(0, turn(("increment", {"step": 1})), [])
        got = wait(live, 2)
        assert [said(a) for a in got] == [["1"], ["2"]] and live.num_lost == 0
        assert [a.failures for a in got] == [(), ()]


def test_a_call_has_its_time_once_its_request_is_there():
    """A long conversation does not go out at once, and the trainer is long at something else."""
    with start("Sleeps", seconds=30.0) as live:
        begin(live)
        line = live._episodes[0].seat.line
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(line, "flush", lambda: None)  # the socket takes nothing yet
            live.act(0, turn(("wait", {"seconds": 1.2})), [{"content": "x" * 4_000_000}])
        assert line.is_waiting and select.select([], [line.sock], [], 60)[1]
        live._episodes[0].deadline = time.monotonic()
        got = one(live)
        assert said(got) == ["done"] and not got.failures and live.num_lost == 0


def test_sixty_four_wait_at_once():
    with start("Sleeps", num=64) as live:
        for row in range(64):
            live.reset(row, {}, 0, 0)
        assert len(wait(live, 64)) == 64
        for row in range(64):
            live.act(row, turn(("wait", {"seconds": 0.3})), [])
        began = time.monotonic()
        assert {tuple(said(a)) for a in wait(live, 64)} == {("done",)}
        assert time.monotonic() - began < 64 * 0.3 / 2  # far below one after the other
        assert json.dumps([a.seconds for a in live.answers(0.0)]) == "[]"


def are_gone(pids) -> bool:
    """Whether these processes end within half a minute."""
    end = time.monotonic() + 30
    while any(map(is_alive, pids)) and time.monotonic() < end:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def is_alive(pid) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
