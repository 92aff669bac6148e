"""Training the weights themselves: the graph's views of the one copy as parameters that get gradients.

A parameter is memory of a `BaseWeights`, so what the optimiser writes is what generation reads at its next step. Each
is a view with a version counter of its own: q, k and v are rows of one tensor, and autograd would take a step on one of
them for a change to all. For what keeps small steps see grpo/training/weight_optimizer.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grpo.kernels.lora_sum import dense_linear
from grpo.kernels.weight_gradient import add_gradient, float32_product
from grpo.memory.full_finetuning import check_trainable
from grpo.model.base_weights import BaseWeights
from grpo.policy.graph import set_module
from grpo.policy.lora_linear import BaseLinear


class TrainedLinear(nn.Module):
    """y = x W^T + b, rounded once, over rows of the one copy; W [out, in] and b [out] get gradients."""

    def __init__(self, rows: BaseLinear):
        super().__init__()
        self.out_features, self.in_features = rows.weight.shape
        self.weight = own_parameter(rows.weight)
        self.bias = None if rows.bias is None else own_parameter(rows.bias)

    def dense(self) -> Tensor:
        """The weight [out, in]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return _TrainedProduct.apply(x, self.weight, self.bias)


class _TrainedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return dense_linear(x.flatten(0, -2), weight, bias, None).unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        x_grad = grad @ weight if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(grad.dtype, torch.float32)
        bias_grad = rows.sum(0, dtype=wide) if ctx.has_bias else None
        return x_grad, float32_product(rows.t(), x.flatten(0, -2)), bias_grad


class TrainedEmbedding(nn.Module):
    """Rows of the embedding [vocabulary, hidden], times Gemma's scale. A row's gradient is summed in float32."""

    def __init__(self, weight: nn.Parameter, embed_scale: Tensor | None):
        super().__init__()
        self.weight = weight
        self.register_buffer("embed_scale", embed_scale, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        rows = _TrainedRows.apply(ids, self.weight)
        return rows if self.embed_scale is None else rows * self.embed_scale


class _TrainedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.ids, ctx.weight = ids, weight
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        weight = ctx.weight
        used, places = ctx.ids.flatten().unique(return_inverse=True)
        # Sorted and added up in order, unlike an index_add_ on a GPU: a run that is repeated has the same bits.
        rows = grad.flatten(0, -2).to(torch.promote_types(grad.dtype, torch.float32))
        sums = torch.ops.aten.embedding_dense_backward(rows, places, len(used), -1, False)
        if weight.grad is None:
            add_gradient(weight, torch.zeros(weight.shape, dtype=weight.grad_dtype or weight.dtype, device=grad.device))
        weight.grad[used] = weight.grad[used].add_(sums)
        return None, None


def own_parameter(tensor: Tensor) -> nn.Parameter:
    """The same memory as a parameter with a version counter of its own."""
    return nn.Parameter(tensor.data, requires_grad=True)


def train_weights(graph: nn.Module, base: BaseWeights) -> None:
    """Let every parameter of `graph`, a causal LM over `base`, get a gradient. Raises UserError for a base or a family
    whose weights cannot be trained in place."""
    check_trainable(base.config, str(base.dtype).removeprefix("torch."))
    embedding = graph.model.embed_tokens
    weight = own_parameter(embedding.weight)
    set_module(graph, "model.embed_tokens", TrainedEmbedding(weight, getattr(embedding, "embed_scale", None)))
    for name, module in list(graph.named_modules()):
        if isinstance(module, BaseLinear):
            set_module(graph, name, TrainedLinear(module))
    head = graph.get_output_embeddings()
    for module in graph.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None or parameter.requires_grad:
                continue
            tied = module is head and base.config.tie_word_embeddings
            module._parameters[leaf] = weight if tied else own_parameter(parameter)
