"""The result of a run in Python: metrics, samples, curves, and the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import report
from grpo_jax.api import evaluation
from grpo_jax.api.model import Model, load
from grpo_jax.evaluation.estimates import Estimate
from grpo_jax.metrics import curves
from grpo_jax.run.append_log import read_jsonl


class Rows(list):
    """A list of rows, each a dict by column. A notebook shows it as a table."""

    def to_pandas(self) -> Any:
        """The rows as a `pandas.DataFrame`."""
        import pandas

        return pandas.DataFrame(self)

    def _repr_html_(self) -> str:
        return self.to_pandas()._repr_html_()


class Picture:
    """A picture in the file `path`, which a notebook displays."""

    def __init__(self, path: Path):
        self.path = path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()

    def __repr__(self) -> str:
        return f"Picture({str(self.path)!r})"


class Trained:
    """A run that has finished, or was stopped and saved.

    `workdir` is its folder, `config` its options; `is_finished` is False if it was stopped.
    """

    def __init__(
        self, workdir: Path, config: ConfigDict, is_finished: bool, given: tuple[Any, Any, Any]
    ):
        """`given`: the rewards, data and held-out data passed to `train`."""
        self._given = given  # their names in the config may belong to a later run by now
        self.workdir = workdir
        self.config = config
        self.is_finished = is_finished  # else stopped; the same call of `train` continues it

    @property
    def summary(self) -> dict[str, Any]:
        """Accuracy before and after, tokens, seconds; {} for a stopped run, and one of `sft`."""
        file = self.workdir / "summary.json"
        if not self.is_finished or not file.exists():
            return {}
        return json.loads(file.read_text(encoding="utf-8"))

    @property
    def metrics(self) -> Rows:
        """One dict a step, as in metrics.jsonl; docs/metrics.md names them."""
        return Rows(read_jsonl(self.workdir / "metrics.jsonl"))

    @property
    def samples(self) -> Rows:
        """Sampled completions of some steps, as in samples.jsonl."""
        return Rows(read_jsonl(self.workdir / "samples.jsonl"))

    def curves(self, *, dark: bool = False) -> Picture:
        """The run's curves, as a picture; `dark`: for a dark page."""
        return Picture(curves.curves(self.workdir, dark=dark))

    def report(self) -> Path:
        """Writes the run as one page, `report.html` in its folder: curves, options, completions."""
        return report.page_of(self.workdir)

    def model(self, dtype: str = "float32") -> Model:
        """The trained model."""
        return load(self.workdir, dtype=dtype)

    def evaluate(self, data: Any = None, **options: Any) -> dict[str, Estimate]:
        """Metrics of the model on problems, by default the run's held-out problems, with intervals.

        `data` as for `train`. `options`: those of the run's config by name, such as
        `num_samples=8`.
        """
        rewards, train, held_out = self._given
        given = rewards, train, held_out if data is None else data
        return evaluation.evaluate(self.workdir, self.config, given, options)

    def __repr__(self) -> str:
        end = "finished" if self.is_finished else "stopped"
        return f"Trained({str(self.workdir)!r}, {end})"
