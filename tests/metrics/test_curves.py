import io
import json
import struct
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from grpo_jax import report
from grpo_jax.metrics import curves, history, panels
from grpo_jax.metrics import summary as summary_lib
from grpo_jax.metrics.summary import summary_table


def write(folder, rows, tail=""):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines + tail)
    return folder


def row(step):
    phases = {f"time/{phase}_s": 0.5 for phase in ("rollout", "reward", "update")}
    return phases | {
        "step": step,
        "reward": step / 10,
        "accuracy": step / 20,
        "reward/exact": step / 20,
        "reward/exact_std": 0.3,
        "groups/equal_share": 0.1,
        "completion/length": 40.0 + step,
        "completion/truncated_share": 0.0,
        "policy/entropy": 0.5,
        "policy/kl": None if step == 2 else 0.01,
        "policy/grad_norm": 1.0,
        "policy/clip_high_share": 0.002,
    }


def config(folder, **options):
    record = {"date": "2026-11-29T05:56:32", "options": {"seed": 3, "model.path": "o/m"} | options}
    (folder / "config.json").write_text(json.dumps(record))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, the last one first of all."""
    figures, save = [], Figure.savefig

    def spy(figure, *args, **options):
        save(figure, *args, **options)
        figures.insert(0, figure)

    monkeypatch.setattr(Figure, "savefig", spy)
    return figures


def panel(figure, title):
    return next(ax for ax in figure.axes if ax.get_title(loc="left") == title)


def labels(ax):
    return ax.get_legend_handles_labels()[1]


def line(ax, label):
    return next(found for found in ax.lines if found.get_label().startswith(label))


def texts(figure):
    return [t.get_text() for t in [*figure.texts, *(t for ax in figure.axes for t in ax.texts)]]


# --- The picture of a run -------------------------------------------------------------------------


def test_curves_of_a_run(tmp_path, drawn):
    evaluated = {"step": 4, "eval/accuracy": 0.75}  # a line of its own joins its step
    folder = write(tmp_path, [*map(row, range(5)), {"step": 0, "eval/accuracy": 0.5}, evaluated])
    path = curves.curves(folder)
    assert path == tmp_path / "curves.png"
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and struct.unpack(">II", header[16:]) == (1500, 900)
    assert ElementTree.parse(tmp_path / "curves.svg").getroot().tag.endswith("svg")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png", "curves.svg"}
    titles = [ax.get_title(loc="left") for ax in drawn[0].axes]
    assert titles == [
        *("Reward", "Held-out problems", "Completion length", "Shares"),
        *("KL to the reference", "Entropy", "Gradient norm", "Time"),
    ]  # one axis each: no further ones lie over them
    held_out = line(panel(drawn[0], "Held-out problems"), "accuracy 50.0 \u2192 75.0%")
    np.testing.assert_array_equal(held_out.get_xydata(), [[0, 0.5], [4, 0.75]])
    assert labels(panel(drawn[0], "Reward")) == ["reward", "exact = accuracy"]
    assert labels(panel(drawn[0], "Shares")) == [
        "equal groups", "cut at the limit", "ratio clipped high",
    ]  # fmt: skip
    assert panel(drawn[0], "Shares").get_ylim() == (-0.02, 1.02)
    assert panel(drawn[0], "Completion length").get_ylim()[0] == 0
    assert "not measured" not in texts(drawn[0])


def test_no_line_crosses_steps_without_data(tmp_path, drawn):
    """Step 2 has no KL; steps 5 and 6 have no line at all; step 8 has no neighbour with a KL."""
    rows = [row(n) for n in (0, 1, 2, 3, 4, 7, 8, 9)]
    for n in (5, 7):
        rows[n]["policy/kl"] = None
    curves.curves(write(tmp_path, rows))
    ax = panel(drawn[0], "KL to the reference")
    step, value = line(ax, "KL").get_xydata().T
    np.testing.assert_array_equal(step, [0, 1, 2, 3, 4, 5.5, 7, 8])
    np.testing.assert_array_equal(np.isfinite(value), [1, 1, 0, 1, 1, 0, 0, 1])
    assert [8] in [list(found.get_xdata()) for found in ax.lines]  # a mark: no line shows it


def test_sampled_evaluations_are_not_joined_across_greedy_ones(tmp_path, drawn):
    greedy = [{"step": n, "eval/accuracy": 0.1 * n} for n in (0, 2, 4)]
    sampled = [{"step": n, "eval/pass@8": 0.5} for n in (0, 4)]
    curves.curves(write(tmp_path, [*map(row, range(1, 5)), *greedy, *sampled]))
    found = line(panel(drawn[0], "Held-out problems"), "pass@8 50.0 \u2192 50.0%").get_xydata()
    np.testing.assert_array_equal(found, [[0, 0.5], [2, np.nan], [4, 0.5]])


def test_held_out_rewards_where_nothing_says_what_is_right(tmp_path, drawn):
    evaluated = [{"step": n, "eval/reward": 2.0 + n, "eval/reward/f": 2.0 + n} for n in (0, 1)]
    curves.curves(write(tmp_path, evaluated))
    assert labels(panel(drawn[0], "Held-out problems")) == ["reward = f 2 \u2192 3"]


def test_what_run_it_is(tmp_path, drawn):
    write(tmp_path, map(row, range(3)))
    config(tmp_path, **{"rollout.max_tokens": 50, "algorithm.kl_coef": 0.0})
    (tmp_path / "config.json").rename(tmp_path / "kept.json")
    curves.curves(tmp_path)
    assert tmp_path.name in texts(drawn[0]) and "2 steps" in texts(drawn[0])
    (tmp_path / "kept.json").rename(tmp_path / "config.json")
    curves.curves(tmp_path)
    told = next(text for text in texts(drawn[0]) if "seed" in text)
    assert [part.strip() for part in told.split("\u00b7")] == [
        "o/m", "seed 3", "2 steps", "2026-11-29 05:56",
    ]  # fmt: skip
    assert "limit 50" in labels(panel(drawn[0], "Completion length"))
    config(tmp_path, **{"rollout.max_tokens": 5000})
    curves.curves(tmp_path)
    assert "limit 5,000 (out of view)" in labels(panel(drawn[0], "Completion length"))
    assert panel(drawn[0], "Completion length").get_ylim()[1] < 50


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "new model, 2 layers of width 8"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/models/qwen", "qwen"),
        ("runs/a/export", "a/export"),
        ("./qwen/", "qwen"),
    ],
)
def test_the_name_of_a_model(path, told):
    options = {"model.path": path, "model.num_layers": 2, "model.width": 8}
    assert history.History("n", {1: {}}, options, "").told().startswith(f"{told} ")


def test_a_run_without_evaluations_and_kl_says_so(tmp_path, drawn):
    rows = [{n: v for n, v in row(step).items() if n != "policy/kl"} for step in range(3)]
    config(write(tmp_path, rows), **{"algorithm.kl_coef": 0.0})
    curves.curves(tmp_path)
    assert {"no evaluation", "no reference (algorithm.kl_coef = 0)"} <= set(texts(drawn[0]))


@pytest.mark.parametrize("rows", [[{"step": 0}], [row(0)], [{"step": 3, "reward": 1.0}]])
def test_curves_of_little(tmp_path, drawn, rows):
    (tmp_path / "config.json").write_text("{torn")
    assert curves.curves(write(tmp_path, rows, tail='{"step": 1, "rew')).stat().st_size > 10_000
    absent = sum(not labels(ax) for ax in drawn[0].axes)
    assert absent == {1: 8, 2: 7}.get(len(rows[0]), 1)  # of the last, evaluations
    assert texts(drawn[0]).count("not measured") == {1: 7, 2: 6}.get(len(rows[0]), 0)


def test_supervised_training_has_the_panels_that_it_measures(tmp_path, drawn):
    rows = [{"step": n, "sft/loss": 3.0 / n, "policy/grad_norm": 1.0} for n in range(1, 4)]
    curves.curves(write(tmp_path, rows))
    assert [ax.get_title(loc="left") for ax in drawn[0].axes] == ["Loss", "Gradient norm"]
    rows[-1]["sft/eval_loss"] = 1.5
    (loss, _) = panels.panels(history.read(write(tmp_path, rows)))
    assert [(line.label, line.as_points) for line in loss.lines] == [
        ("loss", False), ("held out", True),
    ]  # fmt: skip


def test_preferences_and_reward_models_have_panels_of_their_own(tmp_path, drawn):
    told = {"loss": 0.6, "reward_accuracy": 0.75, "reward_chosen": 0.2, "reward_margin": 0.3}
    rows = [{"step": n, **{f"preference/{name}": v for name, v in told.items()}} for n in (1, 2)]
    rows += [{"step": n, "preference/eval_reward_accuracy": 0.5} for n in (0, 2)]
    curves.curves(write(tmp_path, rows))
    assert [ax.get_title(loc="left") for ax in drawn[0].axes] == [
        "Loss", "Preferences", "Implicit reward",
    ]  # fmt: skip
    apart = panel(drawn[0], "Preferences")
    assert labels(apart) == ["pairs told apart", "held out 50.0 \u2192 50.0%"]
    np.testing.assert_array_equal(line(apart, "held out").get_xydata(), [[0, 0.5], [2, 0.5]])
    assert labels(panel(drawn[0], "Implicit reward")) == ["chosen", "margin"]

    told = {"loss": 0.6, "accuracy": 0.75, "margin": 1.0}
    rows = [{"step": n, **{f"reward_model/{name}": v for name, v in told.items()}} for n in (1, 2)]
    found = panels.panels(history.read(write(tmp_path, rows)))
    assert [p.title for p in found] == ["Loss", "Preferences", "Reward"]


# --- A dark page ----------------------------------------------------------------------------------


def test_a_dark_picture_is_the_same_in_other_colours(tmp_path, drawn):
    folder = write(tmp_path, [*map(row, range(5)), {"step": 4, "eval/accuracy": 0.75}])
    curves.curves(folder)
    report.main([str(folder), "--dark"])
    assert (tmp_path / "curves_dark.svg").exists()
    dark, light = ElementTree.parse(tmp_path / "curves_dark.svg"), (tmp_path / "curves.svg")
    said = lambda tree: [e.text for e in tree.iter() if e.tag.endswith("text")]  # noqa: E731
    assert said(dark) == said(ElementTree.parse(light))
    text = (tmp_path / "curves_dark.svg").read_text()
    assert "#16191e" in text and curves.COLORS[1].lower() in text
    for color in ("#ffffff", curves.COLORS[0].lower(), curves._INK, curves._PALE, curves._GRID):
        assert color in light.read_text() and color not in text, color


# --- Time -----------------------------------------------------------------------------------------


def seconds(tmp_path, *rows):
    names = ("step", "time/rollout_s", "time/update_s", "time/step_s", "time/compile_s")
    write(tmp_path, [dict(zip(names, values)) for values in rows])
    return {name: list(s) for name, (_, s) in panels._seconds(history.read(tmp_path)).items()}


def test_compiling_is_a_part_of_its_own(tmp_path):
    """Step 1 takes 9 s, of which 7 compile; usual are 1 s of rollout, 1 of update, none of others.

    So the rollout is 0 s longer than usual, the update 5 and the rest 2: of these 7 the 7.
    """
    usual = [(n, 1.0, 1.0, 2.0, 0.0) for n in (2, 3, 4)]
    found = seconds(tmp_path, (1, 1.0, 6.0, 9.0, 7.0), *usual)
    assert found["compiling"] == [7, 0, 0, 0]
    assert found["rollout"] == found["update"] == [1, 1, 1, 1]
    assert found["other"] == [0, 0, 0, 0]


def test_compiling_of_a_single_step_is_taken_from_all(tmp_path):
    """It compiles for half of its 8 s."""
    found = seconds(tmp_path, (1, 2.0, 4.0, 8.0, 4.0))
    assert [found[part] for part in ("rollout", "update", "other")] == [[1], [2], [1]]
    assert found["compiling"] == [4]
    found = seconds(tmp_path, (1, 2.0, 4.0, 8.0, 90.0))  # some of it in an evaluation before
    assert found["compiling"] == [8] and found["update"] == [0]


def test_a_cut_bar_is_marked(tmp_path, drawn):
    usual = [{"step": n, "time/update_s": 1.0, "time/step_s": 1.0} for n in range(2, 30)]
    first = {"step": 1, "time/update_s": 20.0, "time/step_s": 21.5, "time/compile_s": 20.0}
    curves.curves(write(tmp_path, [first, *usual]))
    ax = panel(drawn[0], "Time")
    assert ax.get_ylim()[1] < 3 and "22 s" in texts(drawn[0])
    assert [list(found.get_xdata()) for found in ax.lines] == [[1]]
    hatched = [patch.get_label() for patch in ax.patches if patch.get_hatch()]
    assert hatched == ["compiling"]


# --- Several runs ---------------------------------------------------------------------------------


def test_runs_are_compared(tmp_path, drawn, capsys):
    folders = [tmp_path / name for name in ("a", "b")]
    for i, folder in enumerate(folders):
        folder.mkdir()
        write(folder, [row(step) | {"reward": float(i)} for step in range(4)])
    out = tmp_path / "both.png"
    report.main([*map(str, folders), "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n" and out.with_suffix(".svg").exists()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a", "b"]
    colors = [handle.get_color() for handle in drawn[0].legends[0].legend_handles]
    shown = [found for found in panel(drawn[0], "Reward").lines if len(found.get_xdata())]
    assert [found.get_color() for found in shown] == colors and len(set(colors)) == 2
    assert [list(found.get_ydata()) for found in shown] == [[0.0] * 4, [1.0] * 4]
    assert "no evaluation" in texts(drawn[0])
    assert not list(folders[0].glob("*.png"))


def test_one_folder_is_drawn_alone_however_it_is_named(tmp_path, capsys):
    write(tmp_path, [row(0), row(1)])
    for arguments in ([str(tmp_path)], ["--workdir", str(tmp_path)], [str(tmp_path)] * 2):
        report.main(arguments)
        assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    with pytest.raises(SystemExit):
        report.main([])
    assert "give the folder of a run" in capsys.readouterr().err


def test_nothing_to_draw_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: There is no .*metrics\.jsonl"):
        report.main(["--workdir", str(tmp_path)])
    write(tmp_path, [], tail="{torn")
    with pytest.raises(SystemExit, match="holds no metrics yet"):
        report.main(["--workdir", str(tmp_path)])


def test_the_speed_of_a_run_that_was_rolled_back(tmp_path):
    """Six steps at 1,000 tokens a second, or 3,000 in the last of them, after four were undone."""
    rows = [
        {"step": n, "tokens/generated": 4000 + 1000 * n, "time/rollout_s": 1.0 if n < 6 else 2.0,
         "throughput/generated_tokens_per_s": 1000.0 if n < 6 else 3000.0}
        for n in range(1, 7)
    ]  # fmt: skip
    without = [{"step": 0}, {"step": 7, "throughput/generated_tokens_per_s": 9e9}]  # no seconds
    assert curves.mean_throughput(write(tmp_path, [*rows, *without])) == 11_000 / 7
    assert curves.mean_throughput(write(tmp_path, without)) == 0.0


def test_smooth_keeps_length_and_mean_of_a_window():
    value = np.arange(48.0)  # 48 // 24 = 2 on either side
    smooth = curves._smooth(value)
    np.testing.assert_allclose(smooth[2:-2], value[2:-2])
    assert smooth[0] == 1.0 and smooth[-1] == 46.0  # (0 + 1 + 2) / 3 and (45 + 46 + 47) / 3
    np.testing.assert_array_equal(curves._smooth(np.array([3.0, 1.0])), [3.0, 1.0])
    value[10] = np.nan  # of the one before it 7, 8, 9 and 11 are known
    smooth = curves._smooth(value)
    assert np.isnan(smooth[10]) and smooth[9] == (7 + 8 + 9 + 11) / 4


def test_summary(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(summary_lib, "console", Console(file=out, width=80))
    summary = {"export": "/run/[bold]", "accuracy_before": 0.2, "accuracy_after": None}
    summary |= {"train_wall_s": 1234.56, "generated_tokens_per_s": 9876.5, "parameters": 396928}
    summary_table(summary | {"skipped_updates": 0, "roll_backs": 2, "steps": 1000, "seed": 2026})
    text = out.getvalue()
    for word in ("20.0%", "1,234.6 s", "9,876 tokens/s", "/run/[bold]", "396,928", "steps  "):
        assert word in text
    assert "1,000" in text and " 2026 " in text and "roll-backs" in text
    assert "after" not in text and "skipped" not in text
    assert text.index("before") < text.index("export")
