"""Compiling kernels for a card that is not there: a driver for Triton that has a target and no GPU.

Launches then compile, with the key under which Triton's cache on disk finds the result later, and run nothing. Other
processes use it to compile what a tuner is about to time, and tests to compile every launch for every architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

Loaded = Callable[[str, bytes, int], None]
"""Told of a compiled kernel when it would be loaded: its name, its binary, its shared memory in bytes."""


class CompileOnly:
    """Stands for `triton.runtime.driver.active`."""

    def __init__(self, architecture: int, shared_memory: int = 1 << 30, loaded: Loaded | None = None):
        self.target = GPUTarget("cuda", architecture, 32)
        self.shared_memory, self.loaded = shared_memory, loaded
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        """A number of its own for every architecture: Triton keeps what it has compiled in memory by this number."""
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Triton refuses a kernel that needs more."""
        return {"max_shared_mem": self.shared_memory}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads)."""
        if self.loaded is not None:
            self.loaded(name, binary, shared)
        return 0, 0, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """There is none."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None


@contextmanager
def compiling_for(architecture: int, shared_memory: int = 1 << 30, loaded: Loaded | None = None) -> Iterator[None]:
    """Launches inside compile for `architecture` (90 for sm_90) and run nothing."""
    config = triton.runtime.driver
    before = config._active
    config.set_active(CompileOnly(architecture, shared_memory, loaded))
    try:
        yield
    finally:
        config._active = before


def compile_to_ptx() -> None:
    """Let Triton stop at PTX for the rest of the process, which a GPU's driver compiles when it is loaded.

    A binary for sm_80 does not load on sm_90; PTX for sm_80 does, and keeps to the instructions of sm_80. Needs a
    cache of its own (TRITON_CACHE_DIR): the key of a kernel does not tell.
    """
    CUDABackend.make_cubin = lambda self, source, metadata, options, capability: source.encode() + b"\0"


def pretend(architecture: int) -> None:
    """Compile for `architecture` and run on the GPU that there is, for the rest of the process."""
    compile_to_ptx()
    target = GPUTarget("cuda", architecture, 32)
    triton.runtime.driver.active.get_current_target = lambda: target
