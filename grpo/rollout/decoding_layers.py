"""Norms and gated activations by our kernels in vLLM's modules. For vllm_model.py alone.

In decoding batches they compute what vLLM's compute; but from sm_90 on each is launched while the product in front of
it runs, and what follows while it runs, which between kernels of a few microseconds is a third of their time. Prompts,
other types and other forms stay with vLLM. Where the stream between layers is float32, all norms that add to it are
ours: vLLM's have one type for the stream and for what is computed of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

from grpo.kernels import cards, glu, residual_norm


def serve_between(model: nn.Module) -> int:
    """Replace the forward of `model`'s plain norms and SwiGLUs, vLLM's, for decoding batches; how many these are."""
    served = 0
    for module in model.modules():
        if type(module) is RMSNorm and module.has_weight and module.variance_size_override is None:
            module.forward = norm_forward(module, module.forward)
            served += 1
        elif type(module) is SiluAndMul:
            module.forward = gate_forward(module.forward)
            served += 1
    return served


def widen_stream(model: nn.Module) -> int:
    """Let the stream that the layers of `model`, vLLM's, hand on beside their result be float32; how many norms add to
    it. The first that does makes it of the embedding."""
    norms = [module for module in model.modules() if type(module) is RMSNorm and module.has_weight]
    for norm in norms:
        norm.forward = stream_forward(norm, norm.forward)
    return len(norms)


def stream_forward(norm: nn.Module, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A norm's forward where what comes with x is the stream."""

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return theirs(x)
        stream = residual_norm.add_to_stream(x, residual, norm.weight, norm.variance_epsilon)
        return x, stream

    return forward


def norm_forward(norm: nn.Module, theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A norm's forward: in place where a residual comes with x, as vLLM's own."""

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None or not residual_norm.serves(x, residual, norm.weight):
            return theirs(x, residual)
        residual_norm.add_and_norm(x, residual, norm.weight, norm.variance_epsilon)
        return x, residual

    return forward


def gate_forward(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of silu(gate) * up."""

    def forward(x: Tensor) -> Any:
        if x.ndim != 2 or not x.is_cuda or not 0 < x.shape[0] <= residual_norm.MOST_ROWS or x.dtype == torch.float32:
            return theirs(x)
        out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype, device=x.device)
        glu.launch_forward(x, "silu", out, overlapped=cards.card(x.device).overlaps)
        return out

    return forward
