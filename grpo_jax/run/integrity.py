"""Whether a folder holds a checkpoint, and whether it is whole: as written, and restorable."""

from __future__ import annotations

import re
import time

from etils import epath

from grpo_jax.messages.console import say
from grpo_jax.run import checksums, disk

WRITTEN_LAST = ("commit_success.txt",)  # by Orbax; its content is not read
_MANIFEST = "manifest.ocdbt"  # lists an item's arrays
_TRY_AGAIN_S = (1.0, 3.0, 10.0)  # a network file system may fail for a moment
_PATTERNS = re.compile(r"[*?\[\]\\]")  # Orbax searches its folders by glob patterns


def damage(folder: epath.Path, part: int = 0, parts: int = 1) -> str:
    """The faults of a checkpoint's files, as text; "" for none.

    Raises ValueError if they cannot be read, after several tries.
    """
    for wait_s in (*_TRY_AGAIN_S, None):
        try:
            found = checksums.faults(folder, leave_out=WRITTEN_LAST, part=part, parts=parts)
            found = found or unmerged(folder)
            break
        except Exception as error:  # from storage and library, without a common base class
            if wait_s is None:
                raise ValueError(
                    f"The checkpoint {folder} cannot be read ({reason(error)}), which does not "
                    "mean that it is damaged. Nothing was changed. Check its permissions and its "
                    "file system; then the same command goes on. To go on without it, rename it."
                ) from error
            say(f"{folder} cannot be read ({reason(error)}). Trying again in {wait_s:g} s.")
            time.sleep(wait_s)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return "; ".join(found[:3]) + more


def unmerged(folder: epath.Path) -> list[str]:
    """Missing manifests of a checkpoint's arrays, which its processes write in parts.

    Orbax merges the parts under one manifest, and reports no error if it finds no parts to merge.
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
    """Raises ValueError for a path with the characters of a glob pattern."""
    if _PATTERNS.search(str(folder)):
        raise ValueError(
            f"Checkpoints cannot be kept in {folder}: a path with one of * ? [ ] \\ is a pattern "
            "to the library that writes them. Give another --workdir, or set checkpoint.folder."
        )


def refuse_strangers(folder: epath.Path) -> None:
    """Raises ValueError if a folder holds other folders that would be taken for checkpoints."""
    found = strangers(folder)
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} holds {', '.join(found[:3])}{more}, which are named like checkpoints, by a "
            "number, but are none. Give checkpoint.folder (or --workdir) a folder of the run's "
            "own."
        )


def strangers(folder: epath.Path) -> list[str]:
    """Folders named by numbers that never held a checkpoint."""
    if not folder.is_dir():
        return []
    numbered = [path for path in folder.iterdir() if path.name.isdigit() and path.is_dir()]
    marks = (checksums.NAME, "_CHECKPOINT_METADATA", "state")
    return sorted(p.name for p in numbered if not any((p / mark).exists() for mark in marks))


def reason(error: Exception) -> str:
    """The reason of a failed save, in one line."""
    if disk.is_full(error):
        return "no space is left on the disk"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else error!r}"[:300]
