"""Full disks: how to recognize one, and what to report."""

from __future__ import annotations

import errno
import re
import shutil
import time
from pathlib import Path

from etils import epath

_FULL = {errno.ENOSPC, errno.EDQUOT}
# C++ libraries report it only in the error's text.
_IN_WORDS = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT")


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk or quota is full."""
    return getattr(error, "errno", None) in _FULL or bool(_IN_WORDS.search(str(error)))


def free(folder: Path) -> str:
    """The free space on a folder's disk, as text; "" if unknown, as for a bucket."""
    try:
        return size(shutil.disk_usage(folder).free)
    except OSError:
        return ""


def delete(folder: epath.Path, *, patience: float = 30.0) -> bool:
    """Deletes a folder to which threads may still be writing; returns whether it is gone.

    A failed write is reported before parallel writes have ended, and these may add files to the
    folder meanwhile. So deletion is tried again for `patience` seconds.
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
    """A number of bytes as text: 3.1 GB."""
    units = iter(("bytes", "kB", "MB", "GB", "TB"))
    unit = next(units)
    while num_bytes >= 1000 and unit != "TB":
        num_bytes, unit = num_bytes / 1000, next(units)
    return f"{num_bytes:.3g} {unit}"
