"""The device programs of a draw in their order, as a plan lists them before a run."""

from __future__ import annotations

import jax
import numpy as np

from grpo_jax.devices import sharding
from grpo_jax.devices.compiling import Call
from grpo_jax.sampling import kept
from grpo_jax.sampling import layouts as layouts_lib
from grpo_jax.sampling.engine import NO_LAYOUT, Engine
from grpo_jax.structs import Params


def first_turns(
    engine: Engine,
    params: Params,
    num_prompts: int,
    group: int,
    longest: int,
    temperature: float,
    *,
    keeps: bool = False,
    looks: bool = False,
) -> list[Call]:
    """The programs of `Engine.generate`, for prompts of at most `longest` tokens.

    `params`: from `publish`, or their shapes. `keeps`: those of `Engine.first_turns`, which keeps
    the slots if it can. `looks`: as for `Engine.decoding`. Further calls of `compact`, and prefills
    when only some slots are free, are the same programs for fewer rows.
    """
    layouts, width = engine.layouts(num_prompts, group), engine.padded(longest)
    keeps = keeps and _holds_all(engine, num_prompts, group)
    return _of_layouts(engine, params, layouts, width, temperature, keeps, looks)


def _holds_all(engine: Engine, num_prompts: int, group: int) -> bool:
    """Whether the slots hold all completions at once."""
    slots, lanes = engine.layouts(num_prompts, group)[0]
    return slots * lanes * engine.shards >= num_prompts * group


def later_turns(
    engine: Engine,
    params: Params,
    num_prompts: int,
    group: int,
    prompt_tokens: int,
    longest: int,
    temperature: float,
    *,
    keeps: bool,
    forks: bool = False,
) -> list[Call]:
    """The programs of `Engine.later_turns` of all completions at once.

    `longest`: tokens of the longest prefix, of which `prompt_tokens` are the prompt's. Fewer or
    shorter turns are the same programs for smaller shapes. `keeps`: as in `first_turns`. `forks`:
    completions may go on from other prefixes than they have.
    """
    layouts = engine.layouts(num_prompts, group)
    keeps = keeps and _holds_all(engine, num_prompts, group)
    calls = _in_lanes(engine, params, layouts, engine.padded(prompt_tokens), temperature)
    if keeps and not forks:
        return calls
    first, width = layouts[0], layouts_lib.turn_width(longest)
    layouts = layouts_lib.of_turns(first, first[0] * first[1], compact=engine.compact)
    again = _of_layouts(engine, params, layouts, width, temperature, keeps)
    if not keeps:
        return again
    return [*calls, *again, *_in_lanes(engine, params, layouts, width, temperature)]


def _in_lanes(
    engine: Engine,
    params: Params,
    layouts: list[layouts_lib.Layout],
    width: int,
    temperature: float,
) -> list[Call]:
    """The programs of turns that go on in the slots of earlier ones, with prompts of `width`."""
    first = layouts[0]
    slots = Call(engine.empty, (*first, width)).result()
    lanes = first[0] * engine.shards, first[1]
    size = kept.sizes_for(engine.decoder.max_tokens)[-1]
    number = _slot_rows(engine, lanes, np.int32)
    new = _slot_rows(engine, (*lanes, size), np.int32), *[number] * 3
    after = _rounded(temperature), np.int32(0), np.int32(0)
    calls = [Call(engine.align, (slots, number)), engine.appending(params, *after, slots, new)]
    if len(layouts) > 1:
        moves = _moves(engine, layouts[1])
        smaller = Call(engine.compact_slots, (slots, *moves)).result()
        calls.append(Call(engine.put_back, (slots, smaller, *moves)))
    return calls


def _of_layouts(
    engine: Engine,
    params: Params,
    layouts: list[layouts_lib.Layout],
    width: int,
    temperature: float,
    keeps: bool,
    looks: bool = False,
) -> list[Call]:
    num_slots, lanes = layouts[0]
    empty = Call(engine.empty, (num_slots, lanes, width))
    slots, temperature = empty.result(), _rounded(temperature)
    number = engine.read_at_once(num_slots) * engine.shards
    prompts = (
        _slot_rows(engine, (number, width), np.int32),
        _slot_rows(engine, (number,), np.int32),
        _slot_rows(engine, (number,), np.int32),
        _slot_rows(engine, (number, lanes, 2), np.uint32),
        _slot_rows(engine, (number, lanes), np.bool_),
        *[_slot_rows(engine, (number, lanes), np.int32)] * 2,
    )
    following = layouts[1] if len(layouts) > 1 else NO_LAYOUT
    enough_S = _slot_rows(engine, (engine.shards,), np.int32)
    calls = [
        empty,
        engine.admitting(params, temperature, slots, prompts),
        engine.decoding(params, temperature, following, enough_S, slots, keeps, looks),
    ]
    if len(layouts) > 1:
        calls.append(Call(engine.compact_slots, (slots, *_moves(engine, layouts[1]))))
    return calls


def _moves(engine: Engine, layout: layouts_lib.Layout) -> tuple[jax.ShapeDtypeStruct, ...]:
    lanes = layout[0] * engine.shards, layout[1]
    return (
        _slot_rows(engine, lanes[:1], np.int32),
        _slot_rows(engine, lanes, np.int32),
        _slot_rows(engine, lanes, np.bool_),
    )


def _rounded(temperature: float) -> np.float32 | None:
    return np.float32(temperature) if temperature else None


def _slot_rows(engine: Engine, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    axes = ("slots",) + (None,) * (len(shape) - 1)
    placed = sharding.sharding_of(engine.decoder.mesh, axes, shape)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
