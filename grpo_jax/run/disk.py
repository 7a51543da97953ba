"""A disk that is full: how to know of it, and what to say."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

_FULL = {errno.ENOSPC, errno.EDQUOT}
# Libraries that write in C++ tell it in words alone.
_IN_WORDS = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT")


def is_full(error: BaseException) -> bool:
    """Whether an error says that no more can be written."""
    return getattr(error, "errno", None) in _FULL or bool(_IN_WORDS.search(str(error)))


def free(folder: Path) -> str:
    """How much is free where a folder lies, in words; "" where nobody knows, as of a bucket."""
    try:
        return size(shutil.disk_usage(folder).free)
    except OSError:
        return ""


def size(num_bytes: float) -> str:
    """A number of bytes as people read it: 3.1 GB."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while num_bytes >= 1000 and unit != "TB":
        num_bytes, unit = num_bytes / 1000, next(units)
    return f"{num_bytes:.3g} {unit}"
