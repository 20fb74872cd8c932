"""How many of the machine's cores this process may use, and what they can do."""

from __future__ import annotations

import math
import os
from pathlib import Path

__all__ = ["core_limit", "has_amx", "usable_cores"]

_CGROUPS = Path("/sys/fs/cgroup")  # what a container sees as its own
_CPU_INFO = Path("/proc/cpuinfo")  # of Linux


def has_amx() -> bool:
    """Tell whether this CPU is known to multiply matrices in bfloat16 (AMX: Intel Xeon from 2023 on)."""
    try:
        return " amx_bf16" in _CPU_INFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False


def usable_cores() -> int:
    """Return how many cores this process may use, at least 1.

    Those it is bound to (by taskset, or a scheduler such as Slurm), and no more than the share of time that a
    container has (`docker run --cpus`).
    """
    # macOS and Windows bind no process
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(bound, _share(_CGROUPS))))


def core_limit() -> int | None:
    """Return `usable_cores` where they are not all of the machine's, else None."""
    cores = usable_cores()
    return cores if cores < (os.cpu_count() or 1) else None


def _share(cgroups: Path) -> float:
    """Return how many cores' time the control group at `cgroups`, of version 2 or 1, may take."""
    try:
        if (cgroups / "cpu.max").is_file():
            quota, period = (cgroups / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota, period = (
                (cgroups / "cpu" / f"cpu.cfs_{part}_us").read_text(encoding="ascii").strip()
                for part in ("quota", "period")
            )
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError, ZeroDivisionError):  # none is set ("max"), or there are no control groups
        return math.inf
