"""A plan as the terminal shows it, and as JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from grpo_jax.messages.console import console, print_title, say
from grpo_jax.planning import advice
from grpo_jax.planning import plan as plan_lib
from grpo_jax.planning.plan import Plan

_GIB = 2**30
_SMALL = 0.001  # of the largest program; the table leaves out smaller ones


# --- What is printed ------------------------------------------------------------------------------


def show(plan: Plan) -> None:
    """Prints the plan, 80 columns wide: memory by content, and the programs of a step."""
    devices = math.prod(plan.mesh.values())
    print_title(f"{plan.num_params:,} parameters on {devices} devices of {plan.topology}")
    say("Mesh: " + " x ".join(f"{name} {size}" for name, size in plan.mesh.items()))
    memory = _table("Memory of each device", "held for", "GiB")
    for name, size in (*plan.held.items(), ("activations", plan.activations), ("peak", plan.peak)):
        memory.add_row(name, _gib(size))
    console.print(memory)
    _show_programs(plan)
    sent = _table("Sent by each device in a step, GB", "kind", "mesh axes", "GB", "waited for, s")
    waited = plan.waited
    for key, size in sorted(plan.cost.sent.items(), key=lambda item: -item[1]):
        kind, axes = key
        seconds = f"{waited[key]:,.3f}" if waited else ""
        sent.add_row(kind, " ".join(axes), f"{size / 1e9:,.3f}", seconds)
    console.print(sent)
    if plan.chip.memory is None:
        say("Simulated devices have no limits, so it is unknown whether it fits.")
        return
    verdict = "fits" if plan.fits else "does not fit"
    say(
        f"It {verdict}: {_gib(plan.peak)} GiB at its peak, {_gib(plan.room)} GiB usable of a "
        f"{plan.chip.name}. A step takes at least {plan.step_s:,.1f} s, and {plan.in_turn_s:,.1f} "
        "s at these rates if kernels run one after the other."
    )


def _show_programs(plan: Plan) -> None:
    """Prints the programs' memory and work, then their seconds if rates are known."""
    title = "Programs on each device; what has 0 runs is not run in a step"
    needs = _table(title, "program", "runs", "peak GiB", "TFLOP", "GB", "sent GB")
    times = _table("Seconds of these, all their runs", "program", "least s", "bound", "in turn")
    size = lambda p: p.arguments + p.results + p.temporary  # noqa: E731
    largest = max(map(size, plan.programs))
    for p in (p for p in plan.programs if p.error or size(p) >= _SMALL * largest):
        work = f"{p.cost.flops / 1e12:,.2f}", f"{p.cost.bytes / 1e9:,.0f}"
        needs.add_row(
            p.name, str(p.runs), _gib(p.peak), *work, f"{sum(p.cost.sent.values()) / 1e9:,.2f}"
        )
        seconds = p.seconds(plan.chip)
        if seconds:
            name, least = plan_lib.bound(seconds)
            times.add_row(p.name, f"{least:,.3f}", name, f"{seconds['in turn']:,.3f}")
    console.print(needs)
    if times.row_count:
        console.print(times)


def _table(title: str, *heads: str) -> Table:
    """A table: names are left-aligned and may wrap; numbers are right-aligned and do not wrap."""
    table = Table(title=title, title_justify="left")
    for head in heads:
        is_name = head in ("held for", "program", "kind", "mesh axes")
        table.add_column(head, justify="left" if is_name else "right", no_wrap=not is_name,
                         overflow="fold", min_width=len(head))  # fmt: skip
    return table


def told(tries: Iterator[advice.Tried]) -> list[advice.Tried]:
    """All tries; prints each one as soon as it is compiled, which takes a while."""
    found, began = [], time.monotonic()
    for tried in tries:
        found.append(tried)
        took_s, began = time.monotonic() - began, time.monotonic()
        say(f"{tried.words}: {_verdict(tried)} ({took_s:.0f} s)")
    return found


def _verdict(tried: advice.Tried) -> str:
    if tried.plan is None:
        return tried.refusal
    return f"{'fits' if tried.fits else 'does not fit'}, {_gib(tried.plan.peak)} GiB at its peak"


def show_tried(title: str, tried: list[advice.Tried]) -> None:
    table = Table(title=title, title_justify="left")
    for name in ("change", "fits", "peak GiB", "least s a step"):
        table.add_column(name, justify="left" if name == "change" else "right")
    for t in tried:
        if t.plan is None:
            arrays = f"over {_gib(t.arrays)}" if math.isfinite(t.arrays) else ""
            table.add_row(t.words, "no" if arrays else "refused", arrays, "")
        else:
            fits = "yes" if t.fits else "no"
            table.add_row(t.words, fits, _gib(t.plan.peak), f"{t.plan.step_s:,.1f}")
    console.print(table)


def tried_json(tried: advice.Tried) -> dict[str, Any]:
    plan = tried.plan.as_json() if tried.plan else None
    return {"change": tried.change, "plan": plan, "refusal": tried.refusal}


def _gib(size: float) -> str:
    return f"{size / _GIB:,.2f}" if math.isfinite(size) else "too much"
