"""vLLM's own LoRA on the shared weights, to compare with the adapter inside our linear layers. For benchmarks only.

vLLM wraps every linear layer, looks up an adapter for each token and runs its LoRA kernels; a new adapter is written
straight into the wrappers' stacked buffers, which is the cheapest way in. The base product is ours in both routes.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.lora.request import LoRARequest

from grpo.model.base_weights import BaseWeights
from grpo.policy.policy import Policy
from grpo.rollout.engine import Engine, EngineSettings

ADAPTER = LoRARequest("policy", 1, "/none")


class VllmLoraEngine(Engine):
    """An `Engine` whose adapter goes through vLLM's LoRA buffers."""

    def __init__(self, base: BaseWeights, policy: Policy, settings: EngineSettings):
        self.trained = policy
        super().__init__(base, None, settings)
        runner = self.llm.llm_engine.model_executor.driver_worker.model_runner
        rank = policy.lora.r
        runner.lora_manager.add_dummy_lora(ADAPTER, rank=rank)
        manager = runner.lora_manager._adapter_manager
        manager.activate_adapter(ADAPTER.lora_int_id)
        runner.lora_manager.pin_adapter(ADAPTER.lora_int_id)
        slot = manager.lora_index_to_id.index(ADAPTER.lora_int_id)
        layers = policy.adapter_layers()
        places = list(self._buffers(manager.modules, slot, rank))
        self._a_buffers, self._b_buffers = [a for _, a, _ in places], [b for _, _, b in places]
        self._a_trained = [layers[part].lora_A["default"].weight for part, _, _ in places]
        self._b_trained = [layers[part].lora_B["default"].weight for part, _, _ in places]
        self._scales = [layers[part].scaling["default"] for part, _, _ in places]
        self.llm.llm_engine.add_request = functools.partial(self.llm.llm_engine.add_request, lora_request=ADAPTER)
        self.sync_adapter()

    def _arguments(self) -> dict[str, Any]:
        arguments = super()._arguments()
        arguments |= {
            "enable_lora": True,
            "max_loras": 1,
            "max_lora_rank": self.trained.lora.r,
            "lora_target_modules": self.trained.lora.target_modules,
        }
        if "compilation_config" in arguments:
            arguments["compilation_config"]["cudagraph_specialize_lora"] = False
        return arguments

    def _buffers(self, modules: dict[str, Any], slot: int, rank: int) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(part, where A goes [r, in], where scaled B goes [out, r])."""
        for name, linear in self.base.linears.items():
            wrapper = modules[name]
            for number, part in enumerate(linear.parts):
                a, b = wrapper.lora_a_stacked[number], wrapper.lora_b_stacked[number]
                yield part, a[slot, 0, :rank], b[slot, 0, :, :rank]

    @torch.no_grad()
    def sync_adapter(self) -> float:
        """Write the trained adapter into vLLM's buffers and forget cached prefixes; returns seconds."""
        start = time.perf_counter()
        torch._foreach_copy_(self._a_buffers, self._a_trained)
        torch._foreach_copy_(self._b_buffers, torch._foreach_mul(self._b_trained, self._scales))
        self.reset_prefix_cache()
        if self.base.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
