"""The model card of an export: a README.md as Hugging Face's hub shows it.

The card says what was trained, how, and with what result, so that an exported folder explains
itself. It names no path, address or account of the machine that trained the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpo_jax
from grpo_jax.config import options as options_lib
from grpo_jax.hosts import processes
from grpo_jax.messages.credentials import redact
from grpo_jax.models.policy import Policy
from grpo_jax.run.whole_files import write_whole
from grpo_jax.trainers import exporting

# Sections of one machine and one user, which do not change what is trained.
_PRIVATE = ("checkpoint", "hosts", "logging", "profile")
_RESULTS = (  # label, keys of a run's summary before and after, format
    ("held-out accuracy", "accuracy_before", "accuracy_after", "{:.1%}"),
    ("held-out reward", "held_out_reward_before", "held_out_reward_after", "{:,.3f}"),
)
_METHODS = {  # by tag
    "grpo": " by Group Relative Policy Optimization "
    "([Shao et al. 2024](https://arxiv.org/abs/2402.03300), section 4.1)",
    "sft": " by supervised fine-tuning",
    "dpo": " on preferences",
    "reward_model": " as a reward model, on pairs",
    "": "",
}


def write(
    folder: Path,
    policy: Policy,
    options: Mapping[str, Any],
    *,
    step: int,
    method: str = "",
    summary: Mapping[str, Any] | None = None,
) -> None:
    """Process 0 writes the card of an export.

    `options`: a run's options by their dotted names. `method`: a key of `_METHODS`, "" if it is
    unknown. `summary`: values before and after training,
    under the names of summary.json.
    """
    if processes.is_first():
        text = _text(policy, options, step, method, summary or {})
        write_whole(folder / "README.md", redact(text))


def _text(
    policy: Policy,
    options: Mapping[str, Any],
    step: int,
    method: str,
    summary: Mapping[str, Any],
) -> str:
    # Without model.path the source is the run's own supervised start.
    base = exporting.source_name(policy) if options.get("model.path") else None
    tags = [*filter(None, [method]), "grpo_jax", *(["lora"] if policy.model.lora else [])]
    is_hub_id = base is not None and base != str(policy.source)
    task = "text-classification" if policy.model.head == "scalar" else "text-generation"
    head = ["library_name: transformers", f"pipeline_tag: {task}"]
    head += [f"base_model: {base}"] if is_hub_id else []
    head += ["tags:", *(f"- {tag}" for tag in tags)]
    start = "a new model" if base is None else f"`{base if is_hub_id else Path(base).name}`"
    model = policy.model
    lines = [
        "---", *head, "---", "",
        f"# {_title(base)}", "",
        f"{start[0].upper()}{start[1:]} ({model.family}, {model.num_params:,} parameters), trained"
        f"{_METHODS[method]} with grpo_jax {grpo_jax.__version__}: {step:,} steps.",
        *_results(summary),
        "", "## Options", "", "Those that are not the default:", "",
        "```", *_changed(options), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _title(base: str | None) -> str:
    name = "a new model" if base is None else Path(base).name
    return f"{name}, trained with grpo_jax"


def _results(summary: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {label} | {form.format(summary[before]) if summary.get(before) is not None else ''} "
        f"| {form.format(summary[after])} |"
        for label, before, after, form in _RESULTS
        if summary.get(after) is not None
    ]
    return ["", "| | before | after |", "| --- | --- | --- |", *rows] if rows else []


def _changed(options: Mapping[str, Any]) -> list[str]:
    """The options that are not the default, one a line; of a file only its name."""
    lines = []
    for option in options_lib.TABLE:
        value = options.get(option.name, option.default)
        value = tuple(value) if isinstance(value, list) else value
        if value != option.default and option.name.split(".")[0] not in _PRIVATE:
            lines.append(f"{option.name} = {_without_folders(value)!r}")
    return lines


def _without_folders(value: Any) -> Any:
    """A value with the names of files and folders of this machine in place of their paths."""
    if isinstance(value, tuple):
        return tuple(map(_without_folders, value))
    if not isinstance(value, str) or "/" not in value:
        return value
    is_path = value[0] in "/~." or Path(value).exists()
    return Path(value).name if is_path else value
