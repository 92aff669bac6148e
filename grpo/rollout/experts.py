"""vLLM's mixtures of experts on our storage: a method for its fused layer, and its routers. For vllm_model.py alone.

"Monolithic" to vLLM: it hands over the router's logits, and choosing, multiplying and adding up are ours, by the
functions of the training graph. None of vLLM's kernels for experts is called.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from grpo.errors import UserError
from grpo.kernels import nf4_experts
from grpo.kernels.experts import ExpertAdapters, route, sampled_mlp
from grpo.model.expert_weights import ExpertStack
from grpo.rollout.route_recorder import RouteRecorder


class SharedExpertsMethod(FusedMoEMethodBase):
    """Routing and experts from storage that the loader attaches."""

    def create_weights(self, layer: nn.Module, *args: Any, params_dtype: torch.dtype, **kwargs: Any) -> None:
        for name in ("w13_weight", "w2_weight"):
            layer.register_parameter(name, nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False))

    @property
    def is_monolithic(self) -> bool:
        return True

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        return None

    def apply_monolithic(
        self, layer: nn.Module, x: Tensor, router_logits: Tensor, input_ids: Tensor | None = None
    ) -> Tensor:
        stack: ExpertStack = layer.shared
        routing, record = stack.routing, layer.recorder and layer.recorder.record(layer.number)
        if nf4_experts.serves(x, stack.experts, routing.top_k):
            return nf4_experts.decode(x, router_logits, stack.experts, *routing, layer.adapters, record=record)
        weights, chosen = route(router_logits, *routing)
        if record is not None:
            record.write(chosen)
        return sampled_mlp(x, stack.experts, chosen, weights, layer.adapters)


class RouterMethod(QuantizeMethodBase):
    """A router, whose forward is ours: nothing is created, nothing repacked."""

    def create_weights(self, layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """vLLM made the weight."""

    def apply(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        raise NotImplementedError("its forward is `score`")


def score(router: nn.Module, x: Tensor) -> tuple[Tensor, None] | Tensor:
    """A router's logits as the training graph computes them, where vLLM has kernels of its own, with the place of a
    bias that is not added yet where the caller expects it."""
    logits = nn.functional.linear(x, router.weight, router.bias)
    return (logits, None) if router.return_bias else logits


def serve_experts(
    served: Any,
    router: Any,
    stack: ExpertStack,
    scores: tuple[Tensor, Tensor | None],
    *,
    recorder: RouteRecorder | None,
    number: int,
    adapters: ExpertAdapters | None,
) -> None:
    """Hand `stack`, with what `adapters` it has, to vLLM's `served` experts, the model's `number`-th, and the router's
    weight and bias to its `router`."""
    if served.moe_config.moe_parallel_config.use_ep or served.local_num_experts != served.global_num_experts:
        raise UserError("vLLM spreads experts over several processes (expert parallelism), which is not supported")
    served.shared, served.recorder, served.number, served.adapters = stack, recorder, number, adapters
    served.w13_weight = nn.Parameter(stack.experts.gate_up.weight, requires_grad=False)
    served.w2_weight = nn.Parameter(stack.experts.down.weight, requires_grad=False)
    weight, bias = scores
    router.weight = nn.Parameter(weight, requires_grad=False)
    router.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    router.quant_method = RouterMethod()
    router.forward = MethodType(score, router)
