"""Whether a folder holds a checkpoint, and whether it is whole: as written, and restorable."""

from __future__ import annotations

import re
import time

from etils import epath

from grpo_jax.messages.console import say
from grpo_jax.run import checksums, disk

WRITTEN_LAST = ("commit_success.txt",)  # by Orbax, with nothing in it that is read
_MANIFEST = "manifest.ocdbt"  # of an item's arrays
_TRY_AGAIN_S = (1.0, 3.0, 10.0)  # a network's file system may fail for a moment
_PATTERNS = re.compile(r"[*?\[\]\\]")  # Orbax looks in its own folders by patterns of names


def damage(folder: epath.Path, part: int = 0, parts: int = 1) -> str:
    """What is wrong with a checkpoint's files, in words; "" for nothing.

    Raises ValueError where they cannot be read, also after some time.
    """
    for wait_s in (*_TRY_AGAIN_S, None):
        try:
            found = checksums.faults(folder, leave_out=WRITTEN_LAST, part=part, parts=parts)
            found = found or unmerged(folder)
            break
        except Exception as error:  # of the storage and its library: no common base
            if wait_s is None:
                raise ValueError(
                    f"The checkpoint {folder} cannot be read ({reason(error)}), which says nothing "
                    "of what is in it. Nothing was changed. See to its rights and its file system; "
                    "then the same command goes on. To go on without it, rename it."
                ) from error
            say(f"{folder} cannot be read ({reason(error)}). Trying again in {wait_s:g} s.")
            time.sleep(wait_s)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def unmerged(folder: epath.Path) -> list[str]:
    """What lacks in a checkpoint of the arrays that its processes have written, each for itself.

    Orbax merges them under one manifest; it does not mind where it finds none to merge.
    """
    items = [item for item in folder.iterdir() if item.is_dir()]
    if not (folder / "state").is_dir():
        return ["state is missing"]
    return [
        f"{item.name}/{_MANIFEST} is missing"
        for item in items
        if any(part.name.startswith("ocdbt.") for part in item.iterdir())
        and not (item / _MANIFEST).exists()
    ]


def refuse_pattern(folder: epath.Path) -> None:
    """Raises ValueError for a path that is a pattern."""
    if _PATTERNS.search(str(folder)):
        raise ValueError(
            f"Checkpoints cannot be kept in {folder}: a path with one of * ? [ ] \\ is a pattern "
            "to the library that writes them. Give another --workdir, or set checkpoint.folder."
        )


def refuse_strangers(folder: epath.Path) -> None:
    """Raises ValueError for a folder that holds what would be taken for checkpoints."""
    found = strangers(folder)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} holds {', '.join(found[:3])}{more}, which have the name of a checkpoint, "
            "a number, and nothing of one in them. Give checkpoint.folder (or --workdir) a folder "
            "of the run's own."
        )


def strangers(folder: epath.Path) -> list[str]:
    """Folders with numbers as names that no checkpoint has ever been in."""
    if not folder.is_dir():
        return []
    numbered = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
    marks = (checksums.NAME, "_CHECKPOINT_METADATA", "state")
    return sorted(p.name for p in numbered if not any((p / mark).exists() for mark in marks))


def reason(error: Exception) -> str:
    """Why a save has failed, in one line."""
    if disk.is_full(error):
        return "no space is left on the disk"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"[:300]
