"""Checksums of a run's inputs: a continued run must read the same inputs.

Prompts are drawn by number, so one more row changes all draws; another model is another reference
for the KL; and a chat template with the date writes other prompts tomorrow. So the first start of a
run records its date and the checksums of its inputs in the workdir; checkpoints have the checksums,
too. Later starts use that date. They are refused if a checksum differs, unless the change is
accepted by name (`checkpoint.accept_changes`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.data.problems import Problem
from grpo_jax.data.streaming import Part
from grpo_jax.hosts import processes
from grpo_jax.messages.console import say
from grpo_jax.models.hf import folder as folder_lib
from grpo_jax.models.hf import peft
from grpo_jax.models.policy import Policy
from grpo_jax.rewards import given, kinds, registry
from grpo_jax.rewards.registry import Reward
from grpo_jax.run.whole_files import write_json

Sums = dict[str, dict[str, Any]]  # by input and part: numbers and checksums

_MAX_HEADER_BYTES = 100_000_000  # of a safetensors file; safetensors' own limit
_SAMPLE_BYTES = 256  # read from each tensor: training changes some of any 256
_PART_BYTES = 4096  # read of the start, the middle and the end of a streamed file
_REWARDS = "reward modules"
_OPTIONS = {  # that name the inputs
    "training problems": "data.path",
    "held-out problems": "data.eval_path",
    "model": "model.path",
    "adapter": "lora.path",
    "teacher": "distill.teacher",
    "critic": "critic.path",
    "reward models": "rewards.names",
}


# --- The date -------------------------------------------------------------------------------------


def date(chosen: str, folder: Path | None = None) -> datetime:
    """The date for chat templates: `chosen` (data.date), or the time of the run's first start.

    `folder` is the run's opened folder. Without one it is the present time of the first process, on
    all processes. Every process must call it.
    """
    if chosen:
        return datetime.fromisoformat(chosen)
    own = datetime.now().isoformat(timespec="seconds") if processes.is_first() else ""
    if own and folder is not None:
        record = _record(folder)
        if "date" not in record:  # a record of an older version
            write_json(folder / "config.json", record | {"date": own})
        own = record.get("date", own)
    return datetime.fromisoformat(processes.agree(own))


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


# --- Sums -----------------------------------------------------------------------------------------


def of_problems(
    problems: Sequence[Problem], prompt_ids: Sequence[Sequence[int]] | None = None
) -> dict[str, Any]:
    """The number of problems, and checksums of their prompts and columns.

    With `prompt_ids`, prompts count as tokens, which also change with the template or tokenizer.
    """
    if prompt_ids is None:
        prompts = [json.dumps([p.prompt, p.arguments], default=str) for p in problems]
        prompt_sum = _sum(text.encode() for text in prompts)
    else:
        lengths = np.fromiter(map(len, prompt_ids), np.int64, len(prompt_ids))
        ids = np.fromiter((i for row in prompt_ids for i in row), np.int64, int(lengths.sum()))
        prompt_sum = _sum([lengths.tobytes(), ids.tobytes()])
    columns = (json.dumps(p.columns, default=str).encode() for p in problems)
    return {"number": len(problems), "prompts": prompt_sum, "columns": _sum(columns)}


def of_examples(examples: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """The number of rows with given completions, and a checksum of their arrays and values."""
    parts = (
        field.tobytes() if isinstance(field, np.ndarray) else repr(field).encode()
        for example in examples
        for field in example
    )
    return {"number": len(examples), "tokens": _sum(parts)}


def of_stream(found: Sequence[Part]) -> dict[str, Any]:
    """The number of files of a stream, and a checksum of their sizes and of a few bytes of each."""
    parts = []
    for part in found:
        path = Path(part.path)
        if not path.is_file():
            parts.append(part.where.encode())
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            for at in (0, size // 2, max(size - _PART_BYTES, 0)):
                file.seek(at)
                parts.append(size.to_bytes(8, "little") + file.read(_PART_BYTES))
    return {"number": len(found), "tokens": _sum(parts)}


def of_model(policy: Policy) -> dict[str, Any]:
    """Checksums of a model's configuration and weights; {} for a model that is new or has none.

    Weights count by their files' headers, which have names, shapes and sizes, and by a few bytes of
    each tensor: reading whole files would take as long as loading them.
    """
    return {} if policy.source is None else of_folder(policy.source)


def of_folder(folder: Path) -> dict[str, Any]:
    """Checksums of the model in a folder, as `of_model`."""
    weights = list(_weights(folder))
    if not weights:  # the model is gone; the run's copy has no weights
        return {}
    found = {"configuration": _sum(_configs(folder)), "weights": _sum(weights)}
    if folder.parent.name == "snapshots":  # a folder in the hub's cache
        found["revision"] = folder.name
    return found


def of_adapter(path: str) -> Sums:
    """Checksums of the adapter that a run begins with, if any and if its folder exists."""
    folder = Path(path)
    files = [folder / name for name in (peft.CONFIG, peft.WEIGHTS)]
    if not path or not all(file.is_file() for file in files):
        return {}
    return {"adapter": {"files": _sum(file.read_bytes() for file in files)}}


def of_reward_model(path: str) -> dict[str, Any]:
    """Checksums of a reward model among the rewards; of an adapter with those of its base."""
    folder = folder_lib.resolve(path, "rewards.names")
    if not peft.is_adapter(folder):
        return of_folder(folder)
    base = folder_lib.resolve(peft.base_of(folder), peft.base_option(folder))
    return of_folder(base) | of_adapter(str(folder))


def of_critic(path: str, critic: Policy | None) -> Sums:
    """Checksums of the model that a critic begins with, if it has a folder of its own.

    Of an adapter those of its base and of itself.
    """
    return {"critic": of_model(critic) | of_adapter(path)} if critic is not None and path else {}


def of_rewards(rewards: Sequence[Reward]) -> dict[str, str]:
    """Checksums of the files with a user's reward functions, by module name; and of rubrics.

    A function passed from Python counts by its own source text.
    """
    found = {}
    for reward in rewards:
        if reward.runs == kinds.HOST:  # of a rubric
            found[reward.spec] = registry.function(reward.spec).digest[:16]
        if reward.runs != kinds.WORKERS:
            continue
        if reward.spec.startswith(given.PREFIX):
            found[reward.spec] = _sum([given.source(reward.spec)])
            continue
        module, colon, _ = reward.spec.partition("(")[0].partition(":")
        try:
            spec = importlib.util.find_spec(module) if colon else None
        except (ImportError, ValueError):  # a module made at run time
            spec = None
        if spec is not None and spec.origin and Path(spec.origin).is_file():
            found[module] = _sum([Path(spec.origin).read_bytes()])
    return found


def _sum(parts: Any) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.hexdigest()[:16]


def _configs(folder: Path) -> Iterator[bytes]:
    """The config files that decide how the weights are used, without the writer's notes."""
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.is_file():
            known = json.loads(file.read_text(encoding="utf-8"))
            for name in ("transformers_version", "_name_or_path"):
                known.pop(name, None)
            yield json.dumps(known, sort_keys=True).encode()


def _weights(folder: Path) -> Iterator[bytes]:
    for file in sorted(f for f in folder.glob("*.safetensors") if f.is_file()):
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = stream.read(min(size, _MAX_HEADER_BYTES))
            yield header
            try:
                tensors = json.loads(header)
                tensors.pop("__metadata__", None)
                spans = sorted(tuple(tensor["data_offsets"]) for tensor in tensors.values())
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # damaged: loading refuses it by name
            for begin, end in spans:
                middle = (begin + end) // 2
                stream.seek(8 + size + middle)
                yield stream.read(min(_SAMPLE_BYTES, end - middle))


# --- Then and now ---------------------------------------------------------------------------------


def hold(folder: Path, found: Sums, accept: Collection[str] = ()) -> None:
    """Records a run's inputs at its first start, and refuses changed inputs at later starts.

    Inputs of the options in `accept` may change; the change is noted, and the new input is the
    run's from then on. Every process must call it, after `run_folder.open_for`. Raises ValueError
    naming the differences to the first start or between processes. Edited reward modules only give
    a warning.
    """
    for process, theirs in enumerate(processes.gather(found, "the sums of what is read")):
        differs = _differences(found, theirs)
        if differs:
            raise ValueError(
                f"{processes.name(process)} reads something else than "
                f"{processes.name(processes.number())}: "
                f"{'; '.join(differs)}. Give all the same files."
            )
    if processes.is_first():
        record = _record(folder)
        before = record.get("read", {})
        refuse_other(before, found, f"--workdir {folder}", accept)
        _tell_of_edited(before, found)
        known = {k: before.get(k, {}) | found.get(k, {}) for k in before | found}
        if before != known:
            noted = [*record.get("changes", []), *_changes(before, found)]
            new = {"read": known} | ({"changes": noted} if noted else {})
            write_json(folder / "config.json", record | new)
    processes.barrier("the sums of what is read")


def refuse_other(before: Sums, now: Sums, where: str, accept: Collection[str] = ()) -> None:
    """Raises ValueError if a run began with other inputs than those of `now`.

    `where` names the run's place in the message; `accept` as for `hold`.
    """
    held = {thing: sums for thing, sums in before.items() if not _may_change(thing, accept)}
    differs = _differences(held, now)
    if differs:
        names = [option for thing, option in _OPTIONS.items() if _differs(thing, held, now)]
        value = names[0] if len(names) == 1 else '"(' + ",".join(f"'{n}'" for n in names) + ')"'
        raise ValueError(
            f"{where} holds a run that read something else: {'; '.join(differs)}. Give the run its "
            "own --workdir, or what it was started with. To go on with what there is now, add "
            f"--config.checkpoint.accept_changes={value}."
        )


def _may_change(thing: str, accept: Collection[str]) -> bool:
    """Whether an accepted option decides on this input; for problems, any option of `data`."""
    option = _OPTIONS.get(thing, "")
    of_data = option.startswith("data.") and any(name.startswith("data.") for name in accept)
    return of_data or option in accept


def _differs(thing: str, before: Sums, now: Sums) -> bool:
    return bool(_differences({thing: before.get(thing, {})}, now))


def _changes(before: Sums, now: Sums) -> list[dict[str, Any]]:
    """The changes to note for a run with changed inputs, in the form of `record.continued`."""
    when = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return [
        {"option": option, "from": before[thing], "to": now[thing], "when": when}
        for thing, option in _OPTIONS.items()
        if _differs(thing, before, now)
    ]


def _tell_of_edited(before: Sums, now: Sums) -> None:
    then, new = before.get(_REWARDS, {}), now.get(_REWARDS, {})
    for name in sorted(n for n in then.keys() & new.keys() if then[n] != new[n]):
        say(
            f"warning: the file of {name!r} in rewards.names was edited since the run began: its "
            "rewards may mean something else from here on."
        )


def _differences(before: Sums, now: Sums) -> list[str]:
    """The differences, as texts; a part that one side lacks is not compared."""
    found = []
    for thing in before.keys() & now.keys() - {_REWARDS}:
        then, new = before[thing], now[thing]
        parts = [p for p in then if p != "revision" and p in new and then[p] != new[p]]
        if "number" in parts:
            found.append(f"{then['number']:,} {thing} there, {new['number']:,} now")
        elif parts:
            revisions = {r["revision"] for r in (then, new) if "revision" in r}
            hint = f" (hub revisions {', '.join(sorted(revisions))})" if len(revisions) > 1 else ""
            found.append(f"{' and '.join(parts)} of the {thing}{hint}")
    return sorted(found)


def of_run(
    train: Sequence[Problem],
    prompt_ids: Sequence[Sequence[int]],
    held_out: Sequence[Problem],
    policy: Policy,
    rewards: Sequence[Reward],
) -> Sums:
    """The checksums of all inputs of a run."""
    found = {
        "training problems": of_problems(train, prompt_ids),
        "model": of_model(policy),
        _REWARDS: of_rewards(rewards),
    }
    models = {}
    for reward in rewards:
        if reward.model:
            sums = of_reward_model(reward.model)
            models[reward.name] = _sum([json.dumps(sums, sort_keys=True).encode()])
    found |= {"reward models": models} if models else {}
    return found | ({"held-out problems": of_problems(held_out)} if held_out else {})
