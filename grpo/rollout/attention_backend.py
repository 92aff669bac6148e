"""Which of vLLM's attention backends serves a GPU, decided before vLLM starts, where one that does not would only fail.

vLLM tries them in an order of its own, and may end with one that compiles its kernels at the first request and needs
nvcc for it. Here the choice follows from the compute capability, the types of the computation and of the KV cache, and
the size of attention heads. Neither torch nor vLLM is imported.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from grpo.errors import UserError
from grpo.model.checks import largest_head
from grpo.model.families.table import family_of

OURS = "grpo"
"""FlashAttention, and for decoding steps the kernel of kernels/decode_attention.py."""
OURS_MEASURED, OUR_HEADS = (90,), (64, 128, 256)
"""Architectures on which it was compared with training and timed beside FlashAttention; its attention heads."""
FP8_TRITON = 89
"""Architecture from which Triton converts to fp8."""
FP8_FLASH = 90
"""The one whose FlashAttention takes an fp8 cache."""
FLASH_SINKS = 90
"""The one whose FlashAttention takes attention sinks."""
NO_SINKS = {
    "flash_attn": "FlashAttention takes attention sinks on compute capability 9.0 alone",
    "flashinfer": "FlashInfer takes no attention sinks",
    "flex_attention": "FlexAttention takes no attention sinks",
}
FLASH_HEAD, FLASHINFER_HEADS = 256, (64, 128, 256)
"""The largest attention head of FlashAttention; FlashInfer's."""


@dataclass(frozen=True)
class Served:
    """What a backend has to serve."""

    architecture: int
    """The GPU's, 86 for sm_86."""
    kv_cache_dtype: str = "auto"
    dtype: str = "auto"
    """What is computed in, as `model.dtype` names it."""
    head_size: int = 128
    """Of the layer with the largest attention heads: one backend serves all layers."""
    sinks: bool = False
    """Whether heads have sinks."""

    @property
    def fp8(self) -> bool:
        return self.kv_cache_dtype == "fp8"


def served_by(model: Any, architecture: int, kv_cache_dtype: str, dtype: Any) -> Served:
    """What a backend has to serve for `model`, a decoder's configuration or sizes. dtype: torch's, or its name."""
    name = str(dtype).removeprefix("torch.")
    return Served(architecture, kv_cache_dtype, name, largest_head(model), family_of(model.model_type).sinks)


def choose_backend(wanted: str, served: Served) -> str:
    """The backend for `served`, as `rollout.attention_backend` names it.

    Raises UserError, a sentence, for what `wanted` cannot serve, and where nothing serves an fp8 KV cache.
    """
    if wanted != "auto":
        if (reason := refusal(wanted, served)) is not None:
            raise UserError(f'rollout.attention_backend = "{wanted}": {reason}; set another, or "auto"')
        return wanted
    if served.fp8 and served.architecture < FP8_TRITON:
        raise UserError(
            f'rollout.kv_cache_dtype = "fp8": no attention backend serves it on compute capability '
            f"{capability(served.architecture)}: FlashAttention takes it on 9.0 alone, and Triton from 8.9 on; "
            'set "auto", and lower rollout.max_num_seqs if the KV cache is too large'
        )
    if refusal("flash_attn", served) is not None:
        return "triton_attn"
    return OURS if gains(served) else "flash_attn"


def gains(served: Served) -> bool:
    """Whether decoding steps are known to be faster by our kernels, where FlashAttention serves."""
    plain = not served.fp8 and not served.sinks and served.head_size in OUR_HEADS
    return plain and served.architecture in OURS_MEASURED


def decodes_by_ours(wanted: str, served: Served) -> bool:
    """Whether `choose_backend` would choose our kernels for decoding steps; not, where it would refuse."""
    try:
        return choose_backend(wanted, served) == OURS
    except UserError:
        return False


def refusal(backend: str, served: Served) -> str | None:
    """Why `backend` does not serve this; None if it does."""
    if backend == OURS:
        backend = "flash_attn"
    architecture, head = served.architecture, served.head_size
    here = f"this GPU has compute capability {capability(architecture)}"
    if backend in ("flash_attn", "flashinfer"):
        name = {"flash_attn": "FlashAttention", "flashinfer": "FlashInfer"}[backend]
        if architecture < 80:
            return f"{name} needs compute capability 8.0 or more, and {here}"
        if served.dtype == "float32":
            return f'{name} computes in 16 bit, and model.dtype is "float32"'
    if backend == "flash_attn" and (head > FLASH_HEAD or head % 8):
        return f"FlashAttention takes attention heads of up to {FLASH_HEAD}, in eights, and this model's have {head}"
    if served.sinks and backend in NO_SINKS and (backend != "flash_attn" or architecture != FLASH_SINKS):
        return f"{NO_SINKS[backend]}, which this model's heads have"
    if backend == "flash_attn" and served.fp8 and architecture != FP8_FLASH:
        return f"FlashAttention takes an fp8 KV cache on compute capability 9.0 alone, and {here}"
    if backend == "triton_attn" and served.fp8 and architecture < FP8_TRITON:
        return f"Triton converts to fp8 from compute capability 8.9 on, and {here}"
    if backend == "flex_attention" and served.fp8:
        return "FlexAttention takes no fp8 KV cache"
    if backend == "flashinfer" and head not in FLASHINFER_HEADS:
        return (
            f"FlashInfer takes attention heads of {', '.join(map(str, FLASHINFER_HEADS))}, and this model's have {head}"
        )
    if backend == "flashinfer" and not flashinfer_is_ready():
        return "FlashInfer compiles its kernels and finds no nvcc here (CUDA_HOME, PATH), nor compiled ones"
    return None


def flashinfer_is_ready() -> bool:
    """Whether FlashInfer is installed with a compiler for its kernels, or with compiled ones."""
    if find_spec("flashinfer") is None:
        return False
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    return compiler is not None or find_spec("flashinfer_jit_cache") is not None


def capability(architecture: int) -> str:
    """ "8.6" for 86."""
    return f"{architecture // 10}.{architecture % 10}"
