"""The few sizes in which completions are decoded: each is compiled once."""

from __future__ import annotations

_PROMPT_STEP = 16  # prompts are padded to a multiple of this
_TURN_WIDTH = 64  # tokens of the shortest prefixes of later turns
Layout = tuple[int, int]  # slots of a shard, and lanes of a slot


def padded(longest: int) -> int:
    """The padded length of prompts of at most `longest` tokens."""
    return -(-longest // _PROMPT_STEP) * _PROMPT_STEP


def turn_width(longest: int) -> int:
    """The padded length of prefixes of at most `longest` tokens, of later turns.

    They grow from turn to turn, so the widths are few, each half as large again as the one before.
    """
    width = _TURN_WIDTH
    while width < longest:
        width = padded(width * 3 // 2)
    return width


def of_groups(
    num_prompts: int, group: int, *, num_slots: int, shards: int, compact: bool
) -> list[Layout]:
    """The first layout for `group` completions of each prompt, and the smaller ones to move to.

    The largest comes first. Lanes shrink faster than slots: a long tail is one or two completions
    of many prompts. `num_slots`: most completions at once; 0: all.
    """
    num_rows = min(num_slots or num_prompts * group, num_prompts * group)
    lanes = min(group, -(-num_rows // shards))
    # A group wider than a slot is split; each part has its own copy of the prompt.
    slots = min(num_rows // lanes, num_prompts * -(-group // lanes))
    slots = -(-slots // shards)
    layouts = [(slots, lanes)]
    rows = slots * lanes // 2
    while compact and rows >= 8 and len(layouts) < 5:
        lanes = max(1, lanes // 4)
        layouts.append((rows // lanes, lanes))
        rows //= 2
    return layouts


def of_turns(first: Layout, needed: int, *, compact: bool) -> list[Layout]:
    """Layouts of one lane a slot: the smallest for `needed` turns a shard, and those below.

    None is larger than `first`, the first layout of the groups.
    """
    rows = first[0] * first[1]
    layouts = [(rows, 1)]
    while rows >= 16:
        rows //= 2
        layouts.append((rows, 1))
    fitting = [i for i, (rows, _) in enumerate(layouts) if rows >= needed]
    layouts = layouts[fitting[-1] if fitting else 0 :]
    return layouts if compact else layouts[:1]
