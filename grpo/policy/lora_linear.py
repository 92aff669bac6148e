"""Linear layers of the training graph: views of the base weights, and LoRA over them, rounded once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.errors import UserError
from grpo.kernels import stored_weight
from grpo.kernels.lora_factors import LowRank
from grpo.kernels.lora_sum import dense_linear
from grpo.model.base_weights import Segment

ADAPTER = "default"
"""peft's name of the one adapter."""


class BaseLinear(nn.Module):
    """A frozen linear layer over rows of the one copy; knows no adapter."""

    def __init__(self, rows: Segment, bias: Tensor | None):
        super().__init__()
        self.out_features = rows.rows
        self.in_features = rows.columns
        self.dtype = rows.dtype
        self.weight = nn.Parameter(rows.weight, requires_grad=False)
        self.register_buffer("absmax", rows.absmax, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def dense(self) -> Tensor:
        """The weight [out, in] in the compute dtype: a view, or dequantised anew."""
        return stored_weight.dequantize(self.weight, self.absmax, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenLinear.apply(x, self)


class FrozenLinear(torch.autograd.Function):
    """x W^T + b, rounded once. W is dequantised in the forward and again in the backward: no dense W is saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: BaseLinear) -> Tensor:
        ctx.layer = layer
        return dense_linear(x.flatten(0, -2), layer.dense(), layer.bias, None).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.dense(), None


class RoundedOnce(torch.autograd.Function):
    """x W^T + b + x_lora_a lora_b^T, rounded once (kernels/lora_sum.py). W is made again in the backward, not saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_lora_a: Tensor, lora_b: Tensor, layer: BaseLinear) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x_lora_a, lora_b)
        low_rank = LowRank(x_lora_a.flatten(0, -2), lora_b)
        y = dense_linear(x.flatten(0, -2), layer.dense(), layer.bias, low_rank)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_lora_a, lora_b = ctx.saved_tensors
        x_grad = grad @ ctx.layer.dense() if ctx.needs_input_grad[0] else None
        return x_grad, grad @ lora_b, grad.flatten(0, -2).t() @ x_lora_a.flatten(0, -2), None


class LoraLinear(nn.Module, LoraLayer):
    """peft's LoRA on a BaseLinear: y = x W^T + b + (dropout(x) A^T) (s B)^T, rounded once.

    A and B are kept in float32 and used in x's dtype, with s B rounded once, as the engine uses them. Where the adapter
    started from a part of the base, its first values stand in while adapters are disabled.
    """

    initial_a: Tensor | None
    initial_b: Tensor | None

    def __init__(
        self,
        base_layer: BaseLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ):
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        for name in ("initial_a", "initial_b"):
            self.register_buffer(name, None, persistent=False)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def scaled(self, adapter: str = ADAPTER) -> tuple[Tensor, Tensor]:
        """A [r, in] and s B [out, r] in float32."""
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight * self.scaling[adapter]

    @torch.no_grad()
    def start_from(self, a: Tensor, b: Tensor) -> None:
        """Let A and B have these values, [r, in] and [out, r], and remember them."""
        device = self.lora_A[ADAPTER].weight.device
        self.initial_a, self.initial_b = a.to(device, torch.float32), b.to(device, torch.float32)
        self.lora_A[ADAPTER].weight.copy_(self.initial_a)
        self.lora_B[ADAPTER].weight.copy_(self.initial_b)

    def initial(self) -> tuple[Tensor, Tensor] | None:
        """A and s B that the adapter started from, where that is a part of the base; None where it is nothing."""
        if self.initial_a is None or self.initial_b is None:
            return None
        return self.initial_a, self.initial_b * self.scaling[ADAPTER]

    def is_fresh(self) -> bool:
        """Whether the adapter changes nothing: its values are the initial ones, or B is zero."""
        a, b = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        if self.initial_a is None or self.initial_b is None:
            return not bool(b.any())
        return bool(a.equal(self.initial_a)) and bool(b.equal(self.initial_b))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.lora_A]
        pairs = [(self.lora_dropout[name](x), *self.scaled(name)) for name in active]
        if self.disable_adapters and (initial := self.initial()) is not None:
            pairs = [(x, *initial)]
        if not pairs:
            return self.base_layer(x)
        x_lora_a = [F.linear(dropped, a.to(x.dtype)) for dropped, a, _ in pairs]
        lora_b = [b.to(x.dtype) for _, _, b in pairs]
        return RoundedOnce.apply(x, joined(x_lora_a), joined(lora_b), self.base_layer)

    def merge(self, *args: Any, **kwargs: Any) -> None:
        raise UserError(
            "the adapter cannot be merged in place, the base is shared with generation; export a merged model instead"
        )

    unmerge = merge


def joined(columns: list[Tensor]) -> Tensor:
    """Side by side; one alone as it is."""
    return columns[0] if len(columns) == 1 else torch.cat(columns, -1)
