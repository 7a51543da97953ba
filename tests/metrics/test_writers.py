import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from grpo_jax.evaluation.compare import Counter
from grpo_jax.messages import console, progress
from grpo_jax.messages.console import print_title, say
from grpo_jax.messages.progress import Progress
from grpo_jax.metrics import names
from grpo_jax.metrics import writers as writers_lib
from grpo_jax.metrics.names import METRICS, is_known
from grpo_jax.metrics.samples import print_samples
from grpo_jax.metrics.trackers import Asked
from grpo_jax.metrics.writers import Writers

SAMPLE = {
    "prompt": "1+1?",
    "completion": "[bold]2[/bold]\x1b[31m\u202e\n#### 2",
    "rewards": {"exact_answer": 1.0, "answer_format": None},
    "advantage": -0.70711,
    "length": 12,
}


def writers(workdir, first_step=0, **options):
    options = {"tensorboard": False, "trackers": Asked(), "config": {"seed": 0}} | options
    return Writers(workdir, first_step=first_step, **options)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(workdir):
    """Events of the TensorBoard files, oldest file first: each record is framed by checksums."""
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event()
            event.ParseFromString(data[12 : 12 + size])
            yield event
            data = data[16 + size :]


# --- Names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["reward", "reward/exact_answer", "reward/f_std", "eval/pass@16", "policy/kl"]
)
def test_known_names(name):
    assert is_known(name)


@pytest.mark.parametrize(
    "name", ["rewards", "reward/", "reward/a/b", "eval/pass@", "eval/pass@K ", "policy/klx", ""]
)
def test_unknown_names(name, tmp_path):
    assert not is_known(name)
    w = writers(tmp_path)
    with pytest.raises(AssertionError, match="METRICS"):
        w.scalars(0, {name: 1.0})
    w.close()


@pytest.mark.parametrize(
    ("name", "metric", "unit"),
    [
        ("time/step_s", "time/step_s", " [s]"),
        ("reward/exact_std", "reward/NAME_std", ""),
        ("eval/pass@8", "eval/pass@K", " [share]"),
    ],
)
def test_what_a_card_says(name, metric, unit):
    assert names.describe(name) == METRICS[metric].meaning + unit
    assert names.describe(f"no {name}") == ""


def test_every_metric_has_a_meaning():
    for name, metric in METRICS.items():
        assert metric.meaning, name
        assert metric.unit in ("s", "tokens/s") or not name.endswith("_s"), name


def test_the_docs_have_every_metric():
    file = Path(names.__file__).parents[2] / "docs" / "metrics.md"
    rows = [line for line in file.read_text().splitlines() if line.startswith("| `")]
    assert rows == [f"| `{n}` | {m.unit} | {m.meaning} |" for n, m in METRICS.items()]


# --- Files ----------------------------------------------------------------------------------------


def test_scalars_and_samples_are_there_at_once(tmp_path):
    w = writers(tmp_path / "new" / "run")
    w.scalars(0, {"reward": 0.5, "policy/kl": math.nan, "policy/loss": math.inf})
    w.samples(0, [SAMPLE, SAMPLE])
    folder = tmp_path / "new" / "run"
    row = {"step": 0, "reward": 0.5, "policy/kl": None, "policy/loss": None}
    assert lines(folder / "metrics.jsonl") == [row]
    assert lines(folder / "samples.jsonl") == [{"step": 0} | SAMPLE] * 2
    w.close()
    assert not list(folder.glob("events.*"))


def test_a_resumed_run_has_no_step_twice(tmp_path):
    w = writers(tmp_path)
    for step in range(5):
        w.scalars(step, {"reward": step})
        w.samples(step, [SAMPLE])
    w.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # killed while it wrote
    w = writers(tmp_path, first_step=3)
    assert [row["step"] for row in lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    w.scalars(3, {"reward": 30})
    w.samples(3, [SAMPLE])
    w.close()
    rows = lines(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3] and rows[3]["reward"] == 30
    assert [row["step"] for row in lines(tmp_path / "samples.jsonl")] == [0, 1, 2, 3]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl"}


def test_a_process_that_does_not_write(tmp_path):
    w = writers(tmp_path / "run", tensorboard=True, trackers=Asked("p"), enabled=False)
    w.scalars(0, {"reward": 1.0})
    w.samples(0, [SAMPLE])
    w.close()
    assert not (tmp_path / "run").exists()


def test_tensorboard(tmp_path):
    for first_step in (0, 1):
        config = {"seed": 0, "loop.num_steps": 2}
        w = writers(tmp_path, first_step, tensorboard=True, config=config)
        for step in (first_step, first_step + 1):
            w.scalars(step, {"reward": 10 * first_step + step})
        w.samples(first_step, [SAMPLE])
        w.close()
    seen, told, texts = {}, [], {}
    for event in events(tmp_path):
        if event.HasField("session_log"):  # TensorBoard hides this step and what came after it
            seen = {step: value for step, value in seen.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == "reward":
                assert event.step not in seen
                seen[event.step] = value.simple_value
                told.append(value.metadata.summary_description)
            else:
                texts[value.tag.partition("/")[0]] = value.tensor.string_val[0].decode()
    assert seen == {0: 0.0, 1: 11.0, 2: 12.0}
    assert "    [bold]2[/bold]\\x1b[31m\\u202e\n    #### 2" in texts["samples"]
    assert "exact_answer 1 · answer_format - · advantage -0.707 · 12 tokens" in texts["samples"]
    assert texts["run"] == f"{tmp_path.name}:\n\n    seed = 0\n    loop.num_steps = 2"
    meaning = METRICS["reward"].meaning
    assert told == [meaning, "", meaning, ""]  # on the first of each file


# --- Terminal -------------------------------------------------------------------------------------


def terminal(monkeypatch, *, encoding="utf-8", **options):
    """The bytes that the terminal will get."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    options = {"width": 100, "highlight": False} | options
    monkeypatch.setattr(console, "console", Console(file=file, **options))
    return raw


def test_samples_show_texts_as_they_are(monkeypatch):
    raw = terminal(monkeypatch)
    long = SAMPLE | {"completion": "start " + "x" * 5000 + "\n#### 7"}
    print_samples("Completions of step 3", [SAMPLE, long])
    text = raw.getvalue().decode()
    for word in ("step 3", "[bold]2[/bold]\\x1b[31m\\u202e", "#### 2", "start", "[... ", "#### 7"):
        assert word in text
    for word in ("exact_answer 1", "answer_format -", "advantage -0.707", "12 tokens"):
        assert word in text
    assert "\x1b" not in text and "\u202e" not in text and text.count("x") < 1000


def test_what_reward_functions_add_to_samples(monkeypatch, tmp_path):
    """Control characters are spelled out, and long texts leave the others their width."""
    extras = {"judge\x1b[2J": "\x1b[31mRED\u202e " + "word " * 400, "n": None}
    raw = terminal(monkeypatch)
    print_samples("Completions of step 3", [SAMPLE | {"extras": extras}])
    text = raw.getvalue().decode()
    assert "\x1b" not in text and "\u202e" not in text
    assert "judge\\x1b[2J \\x1b[31mRED\\u202e word" in text and text.count("word") < 10
    assert "#### 2" in text and "n None" in text
    board = writers_lib._markdown([SAMPLE | {"extras": {"a*b": "<b>x\n* y</b>"}}])
    assert board.endswith("a?b:\n\n    <b>x\n    * y</b>")


def test_a_prompt_stands_once_before_its_completions(monkeypatch):
    """With the columns beside it, by their names; so in TensorBoard."""
    raw = terminal(monkeypatch)
    rows = [SAMPLE | {"columns": {"answer": 2}, "completion": f"it is {n}"} for n in (1, 2)]
    rows.append(SAMPLE | {"prompt": "0+0?", "columns": {"answer": 0}, "completion": "nothing"})
    print_samples("Completions of step 3", rows)
    board = writers_lib._markdown(rows)
    for text in (raw.getvalue().decode(), board):
        assert text.count("1+1?") == text.count("0+0?") == 1
        assert text.count("prompt") == 2
        assert text.count("answer") == 2 + 3 * 2  # of each sample, exact_answer and answer_format
        order = ["1+1?", "it is 1", "it is 2", "0+0?", "nothing"]
        assert sorted(order, key=text.index) == order
    assert "answer:\n\n    2" in board
    heads = raw.getvalue().decode().splitlines()[2]
    assert [head.strip() for head in heads.strip("\u2503").split("\u2503")] == [
        "text",
        "what it is or earned",
    ]


def test_a_terminal_without_unicode(monkeypatch):
    raw = terminal(monkeypatch, encoding="ascii")
    print_samples("Completions of step 0", [SAMPLE | {"completion": "naïve \ud800 ∑"}])
    print_title("∑ [red]")
    say("∑ [red]")
    text = raw.getvalue().decode("ascii")
    assert "na\\xefve \\ud800 \\u2211" in text and text.count("\\u2211 [red]") == 2


def test_progress_in_a_log_is_one_line_now_and_then(monkeypatch):
    raw = terminal(monkeypatch, width=40)
    clock = iter([0.0, 60.0] + [60.0 + 2 * i for i in range(1, 25)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    values = {"reward": 0.25, "accuracy": 0.5, "throughput/generated_tokens_per_s": 1234.5}
    with Progress(25, every_steps=10) as shown:
        for done in range(1, 26):
            shown.update(done, values)
    facts = "reward 0.250  accuracy 0.500  1,234 tokens/s  elapsed"
    assert raw.getvalue().decode().splitlines() == [
        f"step 1/25  {facts} 1:00",
        f"step 10/25  {facts} 1:18  left 0:30",  # 15 steps of 2 s: the first step does not count
        f"step 20/25  {facts} 1:38  left 0:10",
        f"step 25/25  {facts} 1:48  left 0:00",
    ]


def test_progress_of_an_evaluation_in_a_log_is_a_line_every_ten_seconds(monkeypatch):
    """And names the pass, however many problems there are."""
    raw = terminal(monkeypatch)
    clock = iter([0.0, *(0.25 * n for n in range(1, 101)), 0.0, 1.0, 2.0])  # 25 s, then 2 s
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    for total, num_samples in ((100, 0), (2, 8)):
        with Counter(total, num_samples) as counter:
            for _ in range(total):
                counter.add()
    assert [line.partition("  ")[0] for line in raw.getvalue().decode().splitlines()] == [
        "greedy: problem 40/100",
        "greedy: problem 80/100",
        "greedy: problem 100/100",
        "8 samples each: problem 2/2",
    ]


def test_slow_steps_have_a_line_a_minute(monkeypatch):
    raw = terminal(monkeypatch)
    clock = iter([0.0] + [25.0 * i for i in range(1, 10)])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with Progress(9, every_steps=100) as shown:
        for done in range(1, 10):
            shown.update(done, {})
    said = [line.split()[1] for line in raw.getvalue().decode().splitlines()]
    # The 1st at 25 s; from there the first after a minute each time, and the last.
    assert said == ["1/9", "4/9", "7/9", "9/9"]


def test_progress_of_a_resumed_run_on_a_terminal(monkeypatch):
    raw = terminal(monkeypatch, force_terminal=True, width=120, color_system=None)
    with Progress(8, first_step=4) as shown:
        for done in range(5, 9):
            shown.update(done, {"reward": 0.25})
    text = raw.getvalue().decode()
    assert "4/8" in text and "8/8" in text and "reward 0.250" in text and "left" in text


@pytest.mark.parametrize("width", [40, 80, 100, 120])
def test_the_step_is_never_cut(width, monkeypatch):
    raw = terminal(monkeypatch, force_terminal=True, width=width, color_system=None)
    values = {"reward": 0.25, "accuracy": 0.5, "throughput/generated_tokens_per_s": 19_966.0}
    with Progress(1000) as shown:
        for done in (998, 999, 1000):
            shown.update(done, values)
    shown = raw.getvalue().decode().replace("\r", "\n").split("\n")
    last = [line for line in shown if "step" in line][-1]
    assert "step 1000/1000 " in last and "reward 0.250" in last
    assert width < 80 or "elapsed 0:00  left 0:00" in last
    assert ("19,966 tokens/s" in last) == (width >= 100) and "\u2026" not in last
    assert ("\u2501" in last) == (width == 120)
    assert len(last.removeprefix("\x1b[2K")) <= width


def test_a_step_that_is_not_done_has_a_clock(monkeypatch):
    """And the first one, in which programs are compiled, the name of its phase."""
    raw, now = terminal(monkeypatch, force_terminal=True, width=80, color_system=None), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(9) as shown:
        shown.begin("update")
        now[0] = 21.0
        shown._bar.refresh()
        assert "step 0/9  compiling update  elapsed 0:21" in raw.getvalue().decode()
        for done in (1, 2):
            now[0] += 4.0
            shown.update(done, {"reward": 0.25})
        now[0] += 3.0
        shown._bar.refresh()
    assert "step 2/9  reward 0.250  elapsed 0:32  left 0:28" in raw.getvalue().decode()


def test_lines_on_a_terminal_end_between_words(monkeypatch):
    text = "Advantage A: (reward - mean of its group) / the group's deviation,  0 where"
    path = "/a/path-that-is/longer-than/the-terminal-is/wide"
    raw = terminal(monkeypatch, force_terminal=True, width=40, color_system=None)
    say(f"{text} {path}")
    say(f"grpo-jax {path}\n{text}", whole=True)
    lines = raw.getvalue().decode().splitlines()
    first = ["Advantage A: (reward - mean of its", "group) / the group's deviation,  0 where"]
    assert lines == [*first, path, f"grpo-jax {path}", text]
    raw = terminal(monkeypatch, width=40)
    say(text)
    assert raw.getvalue().decode() == f"{text}\n"


def test_durations():
    assert [progress._duration(s) for s in (0.4, 59.7, 3600, 90061)] == [
        "0:00",
        "1:00",
        "1:00:00",
        "25:01:01",
    ]
