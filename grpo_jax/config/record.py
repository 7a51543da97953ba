"""What a run's folder and its checkpoints record of the config, and whether another may go on."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import grpo_jax
from grpo_jax.config import definitions, options
from grpo_jax.config.dotted import flatten
from grpo_jax.messages.values import shown

_SHOWN = 5  # changes in a message


def new(config: ConfigDict) -> dict[str, Any]:
    """The record of a run that begins with this config."""
    return {
        "version": grpo_jax.__version__,
        "date": datetime.now().isoformat(timespec="seconds"),
        "definitions": definitions.in_force(config),
        "binding": binding(config),
        "options": json.loads(json.dumps(flatten(config))),
        "changes": [],
    }


def read(file: Path) -> dict[str, Any]:
    """The record that a file holds; raises ValueError where it holds none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not all(isinstance(found[part], dict) for part in ("binding", "options")):
            raise KeyError("binding")
        return found
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} does not hold a run's options as they were written ({type(error).__name__}: "
            f"{error}). The checkpoints beside it are not touched. Put the file back, or delete "
            "it: the next start writes it anew, and compares its options with the checkpoints'."
        ) from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error


def changes(then: dict[str, Any], config: ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Options that a run was started with and that are others now, each with both values.

    `then`: its binding options. One that it lacks, as it was written by a version without that
    option, has the default of today.
    """
    now = binding(config)
    default = json.loads(json.dumps(flatten(options.default())))
    pairs = {
        name: (then.get(name, default.get(name)), now.get(name, then.get(name)))
        if name in now or name in default
        else (then[name], None)
        for name in sorted(then.keys() | now.keys())
    }
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def refuse(found: dict[str, tuple[Any, Any]], where: str, remedy: str) -> None:
    """Raises ValueError that names the changes, if there are any, and how to go on with them."""
    if not found:
        return
    told = [f"{n}: {shown(then)} there, {shown(now)} now" for n, (then, now) in found.items()]
    more = f" and {len(told) - _SHOWN} more" if len(told) > _SHOWN else ""
    accepted = ""
    if len(found) <= _SHOWN:
        names = ",".join(f"'{name}'" for name in found)
        value = next(iter(found)) if len(found) == 1 else f'"({names})"'
        accepted = f" To go on with the new, add --config.checkpoint.accept_changes={value}."
    raise ValueError(
        f"{where} holds a run of a different config ({'; '.join(told[:_SHOWN])}{more}). "
        f"{remedy}, or the options it was started with.{accepted}"
    )


def not_accepted(
    then: dict[str, Any], config: ConfigDict, accepted: tuple[str, ...] = ()
) -> dict[str, tuple[Any, Any]]:
    """The changes but those to options that `checkpoint.accept_changes` or `accepted` names."""
    names = {*config.checkpoint.accept_changes, *accepted}
    return {n: pair for n, pair in changes(then, config).items() if n not in names}


def continued(file: Path, config: ConfigDict) -> dict[str, Any] | None:
    """What a file must record once the run in its folder goes on with this config; None: as it is.

    Raises ValueError where it may not go on.
    """
    found = read(file)
    refuse(
        not_accepted(found["binding"], config),
        f"--workdir {file.parent}",
        "Give the run its own --workdir",
    )
    new_values = changes(found["binding"], config)
    if not new_values:
        return None
    when = time.strftime("%Y-%m-%d %H:%M:%S %z")
    told = [
        {"option": name, "from": then, "to": now, "when": when}
        for name, (then, now) in new_values.items()
    ]
    # What was begun with holds: its date, and the sums of what it read.
    begun = {name: found[name] for name in ("date", "read") if name in found}
    return new(config) | begun | {"changes": [*found.get("changes", []), *told]}


def binding(config: ConfigDict) -> dict[str, Any]:
    """The options that a resumed run must share with the one it continues."""
    free = {option.name for option in options.TABLE if option.free}
    bound = {name: value for name, value in flatten(config).items() if name not in free}
    # The decay ends with the run, and the last step samples nothing ahead.
    if config.optim.schedule != "constant" or config.loop.async_rollouts:
        epochs = config.loop.num_epochs
        bound |= {
            "loop.num_steps": 0 if epochs else config.loop.num_steps,
            "loop.num_epochs": epochs,
        }
    return json.loads(json.dumps(bound))  # tuples as the lists that a file gives back


def accepted(folder: Path) -> tuple[str, ...]:
    """Options with which the run has gone on though it was started with others."""
    file = folder / "config.json"
    noted = read(file).get("changes", []) if file.exists() else []
    return tuple(change["option"] for change in noted)
