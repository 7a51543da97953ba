"""A disk that is full: how to know of it, and what to say."""

from __future__ import annotations

import errno
import re
import shutil
import time
from pathlib import Path

from etils import epath

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


def delete(folder: epath.Path, *, patience: float = 30.0) -> bool:
    """Deletes a folder that threads may still be writing to; whether it is gone.

    A write that has failed is told before the writes beside it have ended, and these make files in
    a folder that is being emptied. So it is tried again for `patience` seconds.
    """
    until = time.monotonic() + patience
    while True:
        try:
            folder.rmtree(missing_ok=True)
            return True
        except OSError:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)


def size(num_bytes: float) -> str:
    """A number of bytes as people read it: 3.1 GB."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while num_bytes >= 1000 and unit != "TB":
        num_bytes, unit = num_bytes / 1000, next(units)
    return f"{num_bytes:.3g} {unit}"
