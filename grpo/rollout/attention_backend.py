"""Which of vLLM's attention backends serves a GPU, decided before vLLM starts, where one that does not would only fail.

vLLM tries them in an order of its own, and may end with one that compiles its kernels at the first request and needs
nvcc for it. Here the choice follows from the compute capability, the type of the KV cache and the size of heads. Neither torch nor vLLM
is imported.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec

from grpo.errors import UserError

FP8_TRITON = 89
"""Architecture from which Triton converts to fp8."""
LARGEST_FLASH_HEAD = 256
"""Of those that FlashAttention 2 and 3 take. Its fourth version takes larger ones, and wants packages of its own."""
FP8_FLASH = 90
"""The one whose FlashAttention takes an fp8 cache."""


def choose_backend(wanted: str, kv_cache_dtype: str, architecture: int, head_size: int = 0) -> str:
    """The backend for a GPU of `architecture` (86 for sm_86), as `rollout.attention_backend` names it.

    head_size: of the model's largest attention heads; 0 where that is not known. All layers have the same backend.
    Raises UserError, a sentence, for what `wanted` cannot serve there, and where nothing serves `kv_cache_dtype`.
    """
    fp8 = kv_cache_dtype == "fp8"
    if wanted == "auto":
        if fp8 and architecture < FP8_TRITON:
            raise UserError(
                f'rollout.kv_cache_dtype = "fp8": no attention backend serves it on compute capability '
                f"{capability(architecture)}: FlashAttention takes it on 9.0 alone, and Triton from 8.9 on; "
                'set "auto", and lower rollout.max_num_seqs if the KV cache is too large'
            )
        if architecture < 80 or (fp8 and architecture != FP8_FLASH) or head_size > LARGEST_FLASH_HEAD:
            return "triton_attn"
        return "flash_attn"
    if (reason := refusal(wanted, fp8, architecture, head_size)) is not None:
        raise UserError(f'rollout.attention_backend = "{wanted}": {reason}; set another, or "auto"')
    return wanted


def refusal(backend: str, fp8: bool, architecture: int, head_size: int = 0) -> str | None:
    """Why `backend` does not serve this GPU, cache and model; None if it does."""
    here = f"this GPU has compute capability {capability(architecture)}"
    if backend == "flash_attn" and architecture < 80:
        return f"FlashAttention needs compute capability 8.0 or more, and {here}"
    if backend == "flash_attn" and head_size > LARGEST_FLASH_HEAD:
        return f"FlashAttention takes heads of up to {LARGEST_FLASH_HEAD}, and this model has some of {head_size}"
    if backend == "flash_attn" and fp8 and architecture != FP8_FLASH:
        return f"FlashAttention takes an fp8 KV cache on compute capability 9.0 alone, and {here}"
    if backend == "triton_attn" and fp8 and architecture < FP8_TRITON:
        return f"Triton converts to fp8 from compute capability 8.9 on, and {here}"
    if backend == "flex_attention" and fp8:
        return "FlexAttention takes no fp8 KV cache"
    if backend == "flashinfer" and architecture < 80:
        return f"FlashInfer needs compute capability 8.0 or more, and {here}"
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
