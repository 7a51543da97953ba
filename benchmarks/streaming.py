"""Trains on a dataset that is larger than memory, row by row: memory, first batch, and a resume.

    python benchmarks/streaming.py --gb 20
    python benchmarks/streaming.py --gb 0.2 --kind parquet
    python benchmarks/streaming.py --gb 20 --steps 1000 --exact

Writes rows of that size to a temporary folder, each with a short text and 20 kB that are not
trained on. Then `grpo_jax.sft` trains a tiny model through all of them with `data.streaming`. It is
stopped in the middle, and started again. Printed are the resident memory of the run and of the
processes that read for it, by step ("anonymous" is without pages of files, which the system takes
back), the seconds from the program's start to its first step and to the first step after the
resume, and beside them those of a dataset of a hundred rows. With --exact it trains once more,
without a stop, and compares the models and the losses. Exits with 1 if memory grew by more than
200 MB over the second half, or if anything is not equal.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

BATCH, BUFFER, FILLER_BYTES = 64, 2000, 20_000
PARTS = 4  # files
GROWTH_MB = 200
_TAIL = 20_000  # bytes of the metrics that are read for the last step
CONFIG = """
from grpo_jax import config

def get_config():
    c = config.default()
    c.model.path, c.data.path = {model!r}, {data!r}
    c.data.streaming, c.data.shuffle_buffer = True, {buffer}
    c.data.max_prompt_tokens, c.sft.max_tokens = 32, 32
    c.sft.num_steps, c.sft.batch, c.sft.checkpoint_every_steps = {steps}, {batch}, 0
    c.logging.tensorboard, c.logging.samples_every_steps = False, 0
    return c
"""


def write_rows(folder: Path, kind: str, count: int) -> None:
    """Files of sums, each with its own filler, which does not compress."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    per_file = -(-count // PARTS)
    for part in range(PARTS):
        some = range(part * per_file, min((part + 1) * per_file, count))
        if some:
            _write(folder / f"train-{part}.{kind}", kind, some, rng)


def _write(path: Path, kind: str, numbers: range, rng: np.random.Generator) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    def row(number: int) -> dict[str, str]:
        text = f"{number % 100}+{number % 37}={number % 100 + number % 37}"
        return {"text": text, "notes": rng.bytes(FILLER_BYTES // 2).hex()}

    if kind == "jsonl":
        with path.open("w") as file:
            file.writelines(json.dumps(row(n)) + "\n" for n in numbers)
        return
    schema = pa.schema([("text", pa.string()), ("notes", pa.string())])
    open_file = {
        "parquet": lambda: parquet.ParquetWriter(path, schema),
        "arrow": lambda: pa.ipc.new_file(str(path), schema),
    }[kind]
    with open_file() as writer:
        for start in range(numbers.start, numbers.stop, 1000):
            rows = [row(n) for n in range(start, min(start + 1000, numbers.stop))]
            writer.write_table(pa.Table.from_pylist(rows, schema))


def make_model(folder: Path) -> None:
    """A model of two layers for arithmetic."""
    import jax

    from grpo_jax import config
    from grpo_jax.data import tasks
    from grpo_jax.devices import sharding
    from grpo_jax.models import policy
    from grpo_jax.models.hf.export import save
    from grpo_jax.setup import model

    options = config.default().model
    options.width, options.mlp_width = 32, 64
    tokenizer = tasks.load("arithmetic").make_tokenizer()
    new = model.new(options, tokenizer)
    params = policy.load_params(new, sharding.make_mesh(devices=jax.devices()[:1]), seed=0)
    save(folder, params, new.model, source=None, dtype="float32", tokenizer=tokenizer)


def memory_mb(pid: int) -> tuple[float, float, float]:
    """Resident MB of a process, anonymous MB of it, and resident MB of its children."""
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    own, children = _status(pid), [_status(int(child)) for child in listed.stdout.split()]
    return own[0], own[1], sum(anonymous for _, anonymous in children)


def _status(pid: int) -> tuple[float, float]:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0.0, 0.0
    kb = lambda name: float((re.search(rf"{name}:\s+(\d+)", text) or [0, 0])[1])  # noqa: E731
    return kb("VmRSS") / 1024, kb("RssAnon") / 1024


def train(config: Path, folder: Path, stop_at: int = 0) -> tuple[float, list[tuple]]:
    """Seconds to the first new step, and (step, MB...) while it trains; stopped after a step."""
    log = folder / "metrics.jsonl"
    before = _last_step(log)
    command = [sys.executable, "-m", "grpo_jax.sft", "--config", str(config), "--workdir", folder]
    began, first_s, rows = time.monotonic(), 0.0, []
    with (folder.parent / f"{folder.name}.log").open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ)
    while process.poll() is None:
        time.sleep(0.2)
        step = _last_step(log)
        if step > before and not first_s:
            first_s = time.monotonic() - began
        if step > before and (not rows or rows[-1][0] != step):
            rows.append((step, *memory_mb(process.pid)))
        if stop_at and step >= stop_at:
            process.send_signal(signal.SIGTERM)
            process.wait()
    if process.returncode not in (0, 75):
        sys.exit((folder.parent / f"{folder.name}.log").read_text()[-3000:])
    return first_s, rows


def _last_step(log: Path) -> int:
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _TAIL, 0))
        lines = [x for x in file.read().splitlines() if x.startswith(b"{") and x.endswith(b"}")]
    return max((json.loads(line)["step"] for line in lines), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gb", type=float, default=0.2, help="size of the dataset")
    parser.add_argument("--kind", choices=("jsonl", "parquet", "arrow"), default="jsonl")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--steps", type=int, help=f"of {BATCH} rows; default: through all")
    parser.add_argument("--exact", action="store_true", help="compare with a run without a stop")
    options = parser.parse_args()
    count = max(int(options.gb * 1e9 / FILLER_BYTES), 4 * BATCH)
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        folder = Path(temporary)
        grew = measure(folder, options.kind, count, options.steps or count // BATCH)
        differs = options.exact and not is_equal(folder)
    sys.exit(int(grew or differs))


def is_equal(folder: Path) -> bool:
    """Whether the stopped run of `folder` has the models and losses of one without a stop."""
    train(folder / "large.py", folder / "run_whole")
    runs = [folder / "run_large", folder / "run_whole"]
    models = [(run / "export" / "model.safetensors").read_bytes() for run in runs]
    losses = [
        [row["sft/loss"] for row in map(json.loads, file) if "sft/loss" in row]
        for file in ((run / "metrics.jsonl").open() for run in runs)
    ]
    equal = models[0] == models[1] and losses[0] == losses[1]
    print(f"after {len(losses[1]):,} steps the model and all losses are equal: {equal}")
    return equal


def measure(folder: Path, kind: str, count: int, num_steps: int) -> bool:
    """Prints the table; returns whether memory grew."""
    make_model(folder / "model")
    began = time.monotonic()
    for name, number in (("small", 100), ("large", count)):
        write_rows(folder / name, kind, number)
        steps = 3 if name == "small" else num_steps
        values = {"model": str(folder / "model"), "data": str(folder / name), "steps": steps}
        text = CONFIG.format(buffer=BUFFER, batch=BATCH, **values)
        (folder / f"{name}.py").write_text(text)
    size = sum(f.stat().st_size for f in (folder / "large").iterdir()) / 1e9
    print(f"{count:,} rows, {size:.2f} GB as {kind}, written in {time.monotonic() - began:.0f} s")
    small_s, _ = train(folder / "small.py", folder / "run_small")
    first_s, before = train(folder / "large.py", folder / "run_large", stop_at=steps // 2)
    resume_s, after = train(folder / "large.py", folder / "run_large")
    print(
        "| step | resident MB | anonymous MB | anonymous MB of its processes |\n|---|---|---|---|"
    )
    rows = before + after
    shown = {int(i) for i in np.linspace(0, len(rows) - 1, 12)}
    for i in sorted(shown):
        print("| " + " | ".join(f"{value:,.0f}" for value in rows[i]) + " |")
    print(f"first step after {first_s:.1f} s, of a hundred rows after {small_s:.1f} s")
    print(f"first step after the resume in the middle after {resume_s:.1f} s")
    tenth = max(len(after) // 10, 1)
    growth = max(r[2] + r[3] for r in after[-tenth:]) - max(r[2] + r[3] for r in after[:tenth])
    print(f"growth of anonymous memory over the second half: {growth:,.0f} MB")
    return growth > GROWTH_MB


if __name__ == "__main__":
    main()
