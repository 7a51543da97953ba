"""Trackers, which get a run's metrics and samples: Weights & Biases, MLflow, Trackio.

A tracker is a small class with `log(step, values)`, `samples(step, rows)` and `close()`, made from
the options in `Asked`. Its library is imported when it is made, and in `check`. Each works in its
own thread (`Sent`), so a slow or failing tracker neither delays nor ends a run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import queue
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from grpo_jax.messages.console import say

_CLOSE_S = 60.0  # for pending data at a run's end


@dataclasses.dataclass(frozen=True)
class Asked:
    """The trackers' options, by their names; "" turns a tracker off."""

    wandb_project: str = ""
    wandb_entity: str = ""
    mlflow_experiment: str = ""
    trackio_project: str = ""
    run_name: str = ""  # "": the name of the run's folder
    tags: tuple[str, ...] = ()


class Tracker(Protocol):
    """A tracker. The rows of `samples` have the keys that the module `writers` describes."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None: ...

    def close(self) -> None: ...


# --- One for each ---------------------------------------------------------------------------------


class _Wandb:
    """Weights & Biases.

    It ignores steps below its newest, so steps that a resumed run repeats keep their
    old values. Steps that a roll-back undid keep theirs, too.
    """

    def __init__(self, asked: Asked, workdir: Path, config: dict[str, Any]):
        import wandb

        self._table = wandb.Table
        self._run = wandb.init(
            project=asked.wandb_project,
            entity=asked.wandb_entity or None,
            name=_name(asked, workdir),
            tags=list(asked.tags) or None,
            id=_kept_id(workdir / "wandb_id.txt", lambda: uuid.uuid4().hex[:12]),
            resume="allow",
            dir=str(workdir),
            config=config,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        columns = _columns(rows)
        data = [[column[i] for column in columns.values()] for i in range(len(rows))]
        self._run.log({"samples": self._table(columns=list(columns), data=data)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    """A run of an MLflow experiment, on the server or in the files that MLFLOW_TRACKING_URI names.

    Samples are tables, one artifact per step. A repeated step occurs twice.
    """

    def __init__(self, asked: Asked, workdir: Path, config: dict[str, Any]):
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._client, self._metric = MlflowClient(), Metric
        self._id = _kept_id(workdir / "mlflow_run_id.txt", lambda: self._begin(asked, workdir))
        self._client.set_terminated(self._id, "RUNNING")
        params = [Param(_plain(n), str(value)) for n, value in config.items() if str(value)]
        tags = [RunTag(_plain(tag), "") for tag in asked.tags]
        for first in range(0, len(params), 100):  # so many at once
            self._client.log_batch(self._id, params=params[first : first + 100])
        self._client.log_batch(self._id, tags=tags)

    def _begin(self, asked: Asked, workdir: Path) -> str:
        found = self._client.get_experiment_by_name(asked.mlflow_experiment)
        experiment = (
            found.experiment_id
            if found
            else self._client.create_experiment(asked.mlflow_experiment)
        )
        return self._client.create_run(experiment, run_name=_name(asked, workdir)).info.run_id

    def log(self, step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_plain(n), value, now, step) for n, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._client.log_table(self._id, _columns(rows), f"samples/step_{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._id, "FINISHED")


class _Trackio:
    """A run of a Trackio project, in the user's files or where TRACKIO_SPACE_ID says."""

    def __init__(self, asked: Asked, workdir: Path, config: dict[str, Any]):
        import trackio

        _print_as_errors("trackio")
        self._table = trackio.Table
        # It identifies a run by its name.
        fresh = f"{_name(asked, workdir)}-{uuid.uuid4().hex[:6]}"
        tags = {"tags": ", ".join(asked.tags)} if asked.tags else {}
        self._run = trackio.init(
            project=asked.trackio_project,
            name=_kept_id(workdir / "trackio_name.txt", lambda: fresh),
            resume="allow",
            config=config | tags,
            embed=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        import pandas

        table = self._table(dataframe=pandas.DataFrame(_columns(rows)))
        self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        self._run.finish()


def _print_as_errors(package: str) -> None:
    """While entered, a package prints on standard error: standard output may be the run's JSON."""
    for name, module in list(sys.modules.items()):
        if name == package or name.startswith(f"{package}."):
            vars(module)["print"] = functools.partial(print, file=sys.stderr)


def _name(asked: Asked, workdir: Path) -> str:
    return asked.run_name or workdir.resolve().name


def _kept_id(file: Path, make: Callable[[], str]) -> str:
    """The tracker's run id in a file, made if missing: a resumed run continues the same curves.

    The file is written atomically.
    """
    if not file.exists():
        fresh = make()
        new = file.with_name(file.name + ".new")
        new.write_text(fresh, encoding="utf-8")
        os.replace(new, file)
    return file.read_text(encoding="utf-8").strip()


def _plain(name: str) -> str:
    """A name in characters that MLflow accepts, unlike eval/pass@8."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Samples as a table, by column: texts, then each reward, then the rest."""
    rewards = list(dict.fromkeys(name for row in rows for name in row["rewards"]))
    extras = list(dict.fromkeys(name for row in rows for name in row.get("extras", {})))
    columns = {name: [row[name] for row in rows] for name in ("prompt", "completion")}
    columns["prompt"] = [str(prompt) for prompt in columns["prompt"]]
    columns |= {f"reward/{name}": [row["rewards"].get(name) for row in rows] for name in rewards}
    columns |= {name: [row.get(name) for row in rows] for name in ("advantage", "length")}
    told = {name: [row.get("extras", {}).get(name) for row in rows] for name in extras}
    return columns | {
        f"extras/{name}": [None if value is None else str(value) for value in values]
        for name, values in told.items()
    }


# --- All of a run ---------------------------------------------------------------------------------

_KINDS: dict[str, tuple[str, str, Callable[..., Tracker]]] = {  # by option: package, title, class
    "wandb_project": ("wandb", "Weights & Biases", _Wandb),
    "mlflow_experiment": ("mlflow", "MLflow", _Mlflow),
    "trackio_project": ("trackio", "Trackio", _Trackio),
}


def check(asked: Asked) -> None:
    """Raises ValueError if a configured tracker is not installed, or has no login."""
    for option, (package, title, _) in _KINDS.items():
        value = getattr(asked, option)
        if value and not _is_installed(package):
            raise ValueError(
                f"logging.{option} = {value!r} needs {title}, which is not installed: "
                f"pip install {package}, or set logging.{option} to ''."
            )
    if asked.wandb_project:
        _check_login(asked.wandb_project)


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def _check_login(project: str) -> None:
    """Checks W&B's login by its library, which knows `wandb login`, `offline` and its variables.

    Nothing is sent.
    """
    import wandb

    if wandb.setup().settings.mode in ("offline", "dryrun", "disabled"):
        return
    try:
        known = wandb.login(prompt=False, verify=False)
    except Exception as error:  # such as an invalid key: it has many kinds of errors
        raise ValueError(f"logging.wandb_project = {project!r}: {error}") from error
    if not known:
        raise ValueError(
            f"logging.wandb_project = {project!r} needs a login: run `wandb login`, or set "
            "WANDB_API_KEY, or WANDB_MODE=offline to send the run later with `wandb sync`."
        )


def start(asked: Asked, workdir: Path, config: dict[str, Any]) -> list[Sent]:
    """Starts the configured trackers."""
    return [
        Sent(title, lambda make=make: make(asked, workdir, config))
        for option, (_, title, make) in _KINDS.items()
        if getattr(asked, option)
    ]


class Sent:
    """A tracker in its own thread; after a failure it warns once, and gets no more data."""

    def __init__(self, title: str, make: Callable[[], Tracker]):
        self._title, self._make = title, make
        self._queue: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._send, name=title, daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        self._put(lambda tracker: tracker.log(step, values))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        self._put(lambda tracker: tracker.samples(step, rows))

    def close(self) -> None:
        """Waits for pending data, at most a minute."""
        self._queue.put(None)
        self._thread.join(_CLOSE_S)
        if self._thread.is_alive():
            say(
                f"warning: {self._title} has not taken everything within {_CLOSE_S:.0f} s; "
                "the run's folder has it."
            )

    def _put(self, what: Callable[[Tracker], None]) -> None:
        if not self._failed:
            self._queue.put(what)

    def _send(self) -> None:
        try:
            tracker = self._make()
            while (what := self._queue.get()) is not None:
                what(tracker)
            tracker.close()
        except BaseException as error:  # also SystemExit: some libraries exit on errors
            self._failed = True
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            say(
                f"warning: {self._title} failed ({reason}), and gets no more data. The run goes "
                "on; its folder has everything."
            )
