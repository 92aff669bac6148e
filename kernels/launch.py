"""Where a Triton kernel can run, and what differs there.

A kernel's host function asks `triton_supports` and takes its torch form otherwise. Triton's interpreter runs the same
kernels on CPU tensors for tests; it rounds otherwise than the compiler does, which kernels get as INTERPRETED.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Types that the kernels of the training graph take; they compute in float32."""


def interpreter_enabled() -> bool:
    """Whether Triton was imported with TRITON_INTERPRET=1."""
    return bool(triton.knobs.runtime.interpret)


def triton_supports(tensor: Tensor) -> bool:
    """Whether a kernel can run on `tensor`."""
    return (tensor.is_cuda or interpreter_enabled()) and tensor.dtype in KERNEL_DTYPES


def is_interpreted(tensor: Tensor) -> bool:
    """Whether kernels have to round by themselves (`round_to`): the interpreter truncates to bfloat16."""
    return not tensor.is_cuda


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which statistics of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unrounded(x: Tensor) -> Tensor:
    """x in the type in which sums of it are kept: float32 of 16 bit."""
    return x.to(accumulation_dtype(x.dtype))


def cdiv(number: int, size: int) -> int:
    """number / size, rounded up. Triton's own, which kernels may call too, takes the host microseconds."""
    return -(-number // size)


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is no less than `number`, which is at least 1. Likewise."""
    return 1 << (number - 1).bit_length()


def warps(elements: int) -> int:
    """Warps of a program that handles so many elements at once: sixteen to a thread."""
    return max(1, min(16, next_power_of_2(elements) // 512))


def unit_stride(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where its last stride is not 1, as autograd's expanded gradients have it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def on_device(tensor: Tensor) -> torch.cuda.device:
    """Triton launches on the current device; a CPU tensor (interpreter) leaves it alone."""
    return torch.cuda.device(tensor.device.index if tensor.is_cuda else -1)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`. From a host's memory they go through pinned memory: a copy from ordinary memory takes its
    turn behind what the GPU has been given, and the host waits for it."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def int64_tensor(numbers: Iterable[int]) -> Tensor:
    """`numbers` on the CPU; several times as fast as `torch.tensor`, which asks of every one what it is."""
    values = array("q", numbers)
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def float32_tensor(numbers: Iterable[float]) -> Tensor:
    """The same of other numbers."""
    values = array("f", numbers)
    return torch.frombuffer(values, dtype=torch.float32) if values else torch.empty(0)


@lru_cache
def disable_reduced_precision() -> None:
    """Let cuBLAS add up a product of 16-bit matrices in float32 alone, for the rest of the process.

    torch lets it round the parts of a product that it splits along K before it adds them, for speed: more than one
    rounding. And float32 means float32 there and in Triton's kernels, vLLM's attention among them.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False
    triton.knobs.language.fp32_default = "ieee"


@triton.jit
def round_to(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 -> DTYPE, to nearest even. Triton's interpreter truncates to bf16, so for it rounding is written out."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)
