"""How many CPUs this process may use: a container or a job often gets a part of a shared host."""

from __future__ import annotations

import math
import os
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """CPUs that the process may use: its affinity mask's, or its control groups' quota if less.

    A fraction of a CPU counts as a whole one.
    """
    known = hasattr(os, "sched_getaffinity")  # Linux has it, macOS does not
    count = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    return max(1, min([count, *map(math.ceil, _quotas(groups, own))]))


def _quotas(groups: Path, own: Path) -> list[float]:
    """The quotas, in CPUs, of the process's control group and of all groups above it.

    A line of /proc/self/cgroup is NUMBER:CONTROLLERS:PATH, without controllers in version 2. In a
    container the path may be the host's; its own group is then at the root.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = groups if not controllers else groups / "cpu"
        below = Path(path.lstrip("/"))
        for part in (below, *below.parents):
            found += _quota(root / part)
    return found


def _quota(group: Path) -> list[float]:
    """One control group's quota in CPUs (CPU time per wall time); empty if it has none."""
    try:
        if (group / "cpu.max").exists():  # "200000 100000", or "max 100000"
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()
            period = (group / "cpu.cfs_period_us").read_text().strip()
        return [] if quota in ("max", "-1") else [int(quota) / int(period)]
    except (OSError, ValueError, ZeroDivisionError):
        return []
