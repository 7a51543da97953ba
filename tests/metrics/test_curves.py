import io
import json
import struct

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from grpo_jax import report
from grpo_jax.metrics import curves
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


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure that is saved."""
    axes, save = [], Figure.savefig

    def spy(figure, *args, **options):
        save(figure, *args, **options)
        axes.extend(figure.axes)

    monkeypatch.setattr(Figure, "savefig", spy)
    return axes


def labels(axes):
    return [text for ax in axes for text in ax.get_legend_handles_labels()[1]]


def test_curves_of_a_run(tmp_path, drawn):
    evaluated = {"step": 4, "eval/accuracy": 0.75}  # a line of its own joins its step
    folder = write(tmp_path, [*map(row, range(5)), {"step": 0, "eval/accuracy": 0.5}, evaluated])
    path = curves.curves(folder)
    assert path == tmp_path / "curves.png"
    header = path.read_bytes()[:24]
    assert header.startswith(b"\x89PNG") and struct.unpack(">II", header[16:]) == (1500, 900)
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "curves.png"}
    held_out = next(line for line in drawn[0].lines if line.get_label().startswith("held out"))
    np.testing.assert_array_equal(held_out.get_xydata(), [[0, 0.5], [4, 0.75]])
    found = labels(drawn)
    assert found.count("exact") == 1 and "exact_std" not in found
    assert {"reward", "accuracy", "length", "entropy", "gradient norm", "rollout"} <= set(found)
    kl = next(line for ax in drawn for line in ax.lines if line.get_label().startswith("KL"))
    np.testing.assert_array_equal(kl.get_xdata(), [0, 1, 3, 4])


@pytest.mark.parametrize("rows", [[{"step": 0}], [row(0)], [{"step": 3, "reward": 1.0}]])
def test_curves_of_little(tmp_path, drawn, rows):
    assert curves.curves(write(tmp_path, rows, tail='{"step": 1, "rew')).stat().st_size > 10_000
    texts = [text.get_text() for ax in drawn for text in ax.texts]
    assert texts.count("not measured") == {1: 6, 2: 5}.get(len(rows[0]), 0)


def test_nothing_to_draw_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"error: There is no .*metrics\.jsonl"):
        report.main(["--workdir", str(tmp_path)])
    write(tmp_path, [], tail="{torn")
    with pytest.raises(SystemExit, match="holds no metrics yet"):
        report.main(["--workdir", str(tmp_path)])


def test_main_prints_where_the_picture_is(tmp_path, capsys):
    report.main(["--workdir", str(write(tmp_path, [row(0), row(1)]))])
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"


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


def test_summary(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(summary_lib, "console", Console(file=out, width=80))
    summary = {"export": "/run/[bold]", "accuracy_before": 0.2, "accuracy_after": None}
    summary_table(summary | {"train_wall_s": 1234.56, "generated_tokens_per_s": 9876.5})
    text = out.getvalue()
    for word in ("20.0%", "1,234.6 s", "9,876 tokens/s", "/run/[bold]", "after   -"):
        assert word in text
    assert text.index("before") < text.index("export")
