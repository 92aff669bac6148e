"""GPUs that people own or rent: memory, speeds of memory and of 16-bit products, as their makers state them.

A plan for a GPU that is not in the machine takes its figures from here (`--card 3090`), and the predicted speeds of one
that is. Nothing here loads torch: what is in the machine is asked of NVML.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
from dataclasses import dataclass, replace

from grpo.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU. Speeds are the makers'; what of them is reached is roofline.py's."""

    name: str
    architecture: int
    """86 for compute capability 8.6."""
    memory: int
    """Bytes that CUDA shows of it, which is less than the name says."""
    bandwidth: float
    """Bytes a second."""
    flops: float
    """16-bit products with float32 sums, dense, a second."""

    @property
    def flash(self) -> bool:
        """Whether torch's flash attention runs on it."""
        return self.architecture >= 80


def _gpu(name: str, architecture: int, gigabytes: float, bandwidth: float, teraflops: float) -> Gpu:
    return Gpu(name, architecture, int(gigabytes * 1e9), bandwidth * 1e9, teraflops * 1e12)


GPUS = tuple(
    _gpu(*row)
    for row in (
        ("RTX 2060 12GB", 75, 12.6, 336, 25.8),
        ("RTX 2070", 75, 8.3, 448, 29.9),
        ("RTX 2080 Ti", 75, 11.5, 616, 53.8),
        ("T4", 75, 15.8, 320, 65),
        ("A100 40GB", 80, 42.3, 1555, 312),
        ("A100 80GB", 80, 84.9, 2039, 312),
        ("A10", 86, 23.7, 600, 125),
        ("A10G", 86, 23.7, 600, 70),
        ("A40", 86, 47.6, 696, 149.7),
        ("RTX A4000", 86, 16.9, 448, 76.7),
        ("RTX A5000", 86, 25.3, 768, 111),
        ("RTX A6000", 86, 50.9, 768, 154.8),
        ("RTX 3060", 86, 12.6, 360, 25.6),
        ("RTX 3070", 86, 8.4, 448, 40.6),
        ("RTX 3080", 86, 10.4, 760, 59.5),
        ("RTX 3090", 86, 25.4, 936, 71),
        ("RTX 3090 Ti", 86, 25.4, 1008, 80),
        ("L4", 89, 23.7, 300, 121),
        ("L40S", 89, 47.7, 864, 362),
        ("RTX 6000 Ada", 89, 50.9, 960, 364),
        ("RTX 4060 Ti 16GB", 89, 16.8, 288, 44.1),
        ("RTX 4070", 89, 12.5, 504, 58.3),
        ("RTX 4070 Ti Super", 89, 16.8, 672, 88.2),
        ("RTX 4080", 89, 16.8, 717, 97.5),
        ("RTX 4090", 89, 25.2, 1008, 165.2),
        ("H100 PCIe", 90, 84.9, 2039, 756),
        ("H100 80GB HBM3", 90, 84.9, 3350, 989),
        ("H200", 90, 150.1, 4800, 989),
        ("B200", 100, 191.5, 8000, 2250),
        ("RTX 5070 Ti", 120, 16.6, 896, 87.9),
        ("RTX 5080", 120, 16.6, 960, 112.6),
        ("RTX 5090", 120, 33.7, 1792, 209.5),
    )
)
USUAL = next(gpu for gpu in GPUS if gpu.name == "A100 80GB")
"""Whose ratio of speeds is taken for a GPU that is in no table."""


def plain(name: str) -> str:
    """ "rtx3090" for "NVIDIA GeForce RTX 3090": small letters and digits, without makers' words."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    dropped = ("nvidia", "geforce", "tesla", "sxm4", "sxm5", "hbm3", "gpu", "graphics")
    return "".join(word for word in words if word not in dropped)


def known_gpu(name: str) -> Gpu | None:
    """The row of a GPU as a driver or a person calls it: "NVIDIA GeForce RTX 3090", "3090", "A100"."""
    wanted = plain(name)
    names = {plain(gpu.name): gpu for gpu in GPUS}
    if wanted in names:
        return names[wanted]
    ends = [gpu for key, gpu in names.items() if key.removeprefix("rtx") == wanted]
    starts = [gpu for key, gpu in names.items() if wanted and re.fullmatch(re.escape(wanted) + r"\d+gb", key)]
    matches = (
        ends or [gpu for key, gpu in names.items() if key.removeprefix("rtx").startswith(wanted + "16gb")] or starts
    )
    return matches[0] if matches and wanted else None


def gpu_named(name: str) -> Gpu:
    """What `--card` names. Raises UserError, with the nearest, for one that is not known."""
    known = known_gpu(name)
    if known is None:
        short = {plain(gpu.name).removeprefix("rtx"): gpu.name for gpu in GPUS}
        near = difflib.get_close_matches(plain(name).removeprefix("rtx"), short, n=1, cutoff=0.5)
        hint = f"did you mean {short[near[0]]!r}?" if near else f"known are {', '.join(gpu.name for gpu in GPUS)}"
        raise UserError(f"--card {name}: not a known GPU; {hint}")
    return known


def gpu_here() -> Gpu | None:
    """The GPU of this machine that CUDA would take first; None without one. No GPU is started."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # no package, or no driver
        return None
    try:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = (visible or "0").split(",")[0]
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(first) if first.isdecimal() else 0)
        name = pynvml.nvmlDeviceGetName(handle)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except Exception:  # a driver that answers none of it
        return None
    return as_found(str(name), 10 * major + minor, total)


def as_found(name: str, architecture: int, memory: int) -> Gpu:
    """A GPU that says this of itself, with the speeds of its table row, or with usual ones."""
    return replace(known_gpu(name) or USUAL, name=name, architecture=architecture, memory=memory)
