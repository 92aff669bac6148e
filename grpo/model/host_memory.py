"""Tensors in pinned host memory that a GPU reads in place: for large ones of which a step needs a few rows, or that
the GPU has no room for.

Pinned memory has the same address for the host and for every GPU, so a tensor "on the GPU" can begin there. Kernels
and CUDA graphs take it as any other, and only the rows that they read cross the bus. Nothing here copies to a GPU or
decides what is worth keeping on the host: `base_weights.py` does.
"""

from __future__ import annotations

from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.model.sizes import pinned_bytes


def has_own_memory(device: torch.device) -> bool:
    """Whether tensors on `device` are elsewhere than in host memory."""
    return device.type == "cuda"


def pinned_zeros(*shape: int, dtype: torch.dtype, wanted_by: str) -> Tensor:
    """Zeros on the CPU that the GPU can read.

    Raises UserError, which says that `wanted_by` (a key) asked for it, where the host has not so much memory to pin.
    """
    message = check_host_memory(pinned_bytes(torch.Size(shape).numel() * dtype.itemsize), wanted_by)
    try:
        return torch.zeros(shape, dtype=dtype, pin_memory=True)
    except RuntimeError as error:
        raise UserError(f"{message} but gives none ({str(error).splitlines()[0]}); do without") from None


def check_host_memory(size: int, *wanted_by: str) -> str:
    """A sentence's beginning: that the keys `wanted_by` pin `size` bytes, and what the host has. Raises UserError with
    it where the host has less."""
    keys, free = " and ".join(wanted_by), psutil.virtual_memory().available
    message = f"{keys}: {size / 1e9:.1f} GB of host memory would be pinned, and the host has {free / 1e9:.1f} GB free"
    if size > free:
        raise UserError(f"{message}; do without, or free some")
    return message


def device_view(device: torch.device, pinned: Tensor) -> Tensor:
    """The memory of `pinned`, contiguous and on the CPU, as a tensor on `device`. Keeps it alive.

    Write to `pinned`, not to the result: a copy between the two would be given the wrong direction.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    bytes_there = torch.as_tensor(PinnedBytes(pinned), device=torch.device("cuda", index))
    if bytes_there.data_ptr() != pinned.data_ptr():
        raise RuntimeError(f"torch {torch.__version__} copied pinned memory to {device} instead of viewing it")
    return bytes_there.view(pinned.dtype).view(pinned.shape)


class PinnedBytes:
    """The owner of a view: pinned memory in the protocol in which libraries hand each other a GPU's."""

    def __init__(self, pinned: Tensor):
        assert pinned.is_contiguous() and pinned.device.type == "cpu", "pinned memory is contiguous and on the host"
        self.pinned = pinned

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        # As bytes: the protocol has no name for bfloat16.
        return {
            "shape": (self.pinned.numel() * self.pinned.element_size(),),
            "typestr": "|u1",
            "data": (self.pinned.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def free_pinned_memory() -> None:
    """Return pinned memory that no tensor uses any more to the system; torch would keep it for the next tensor.

    For a process that has used a GPU.
    """
    torch.cuda.synchronize()  # a kernel that reads it may still be running
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    else:  # torch 2.11
        torch._C._host_emptyCache()
