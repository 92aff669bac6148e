"""How much of this machine a program may take beside what runs: its cores and its free memory, by the system and by the
container's limits, which neither the scheduler's mask nor /proc/meminfo shows.

Not here: the GPU's memory (grpo/memory). Nothing is imported that a start would wait for.
"""

from __future__ import annotations

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""As a container sees its own limits, of version 2 or 1."""


def cores() -> int:
    """Cores that this process may keep busy; at least 1."""
    count = len(os.sched_getaffinity(0))
    for file, other in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (CGROUP / file).read_text().split() + ((CGROUP / other).read_text().split() if other else [])
            quota, period = (int(word) for word in words)  # "max": no limit
        except (OSError, ValueError):
            continue
        if quota > 0 and period > 0:
            count = min(count, quota // period)
    return max(1, count)


def free_memory() -> int:
    """Bytes that programs may still take; 0 where the system does not say."""
    try:
        free = _entry(Path("/proc/meminfo"), "MemAvailable:") << 10
    except (OSError, ValueError, StopIteration):
        return 0
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            room = int((CGROUP / limit).read_text()) - int((CGROUP / used).read_text())  # "max": no limit
            free = min(free, room + _entry((CGROUP / limit).with_name("memory.stat"), cached))
        except (OSError, ValueError, StopIteration):
            continue
    return max(0, free)


def _entry(file: Path, name: str) -> int:
    """The number behind `name` in a file of lines "name number"."""
    lines = (line.split() for line in file.read_text().splitlines())
    return next(int(words[1]) for words in lines if words and words[0] == name)
