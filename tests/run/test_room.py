"""grpo/run/room.py: a container's limits count, in both forms of Linux, and what cannot be read limits nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.run import room

FILES = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)))
    for folder in ("cpu", "memory"):
        (tmp_path / folder).mkdir()
    return tmp_path


@FILES
@given(quota=st.integers(1, 4_000_000), period=st.integers(1000, 1_000_000), second=st.booleans())
def test_a_quota_of_cores_counts(cgroup: Path, quota: int, period: int, second: bool) -> None:
    (cgroup / "cpu.max").write_text(f"{quota} {period}\n" if second else "max 100000\n")
    (cgroup / "cpu" / "cpu.cfs_quota_us").write_text("-1" if second else f"{quota}\n")
    (cgroup / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    assert room.cores() == max(1, min(16, quota // period))


@FILES
@given(used=st.integers(0, 1 << 20), cached=st.integers(0, 1 << 20), second=st.booleans())
def test_a_limit_of_memory_counts_but_not_what_is_only_cached(
    cgroup: Path, used: int, cached: int, second: bool
) -> None:
    limit = 1 << 20
    folder, names = (cgroup, ("memory.max", "memory.current")) if second else (cgroup / "memory", None)
    most, now = names or ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for file in [*cgroup.glob("memory.*"), *(cgroup / "memory").iterdir()]:
        file.unlink()
    (folder / most).write_text(f"{limit}\n")
    (folder / now).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'' if second else 'total_'}inactive_file {cached}\n")
    assert room.free_memory() == limit - used + cached


def test_a_machine_without_limits_has_what_the_system_says(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "cpu.max").write_text("max 100000\n")
    assert room.cores() == 16 and room.free_memory() > 1 << 20
