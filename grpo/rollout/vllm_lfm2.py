"""LFM2 for vLLM versions that build the projections around its convolutions as layers no quantisation knows.

They are given the quantisation method of the others, so that they are served from the one copy and have an adapter.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.model_executor.models.lfm2 import Lfm2ForCausalLM


class Lfm2(Lfm2ForCausalLM):
    """vLLM's class, all of whose linear layers are served alike."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        for name, module in self.named_modules():
            if isinstance(module, ShortConv):
                for part in ("in_proj", "out_proj"):
                    serve(module.get_submodule(part), vllm_config.quant_config, f"{name}.{part}")


def serve(layer: Any, quantization: Any, name: str) -> None:
    """Give `layer`, a linear one, the method of `quantization` unless it has one."""
    method = None if quantization is None else quantization.get_quant_method(layer, name)
    if type(layer.quant_method) is not UnquantizedLinearMethod or method is None:
        return
    dtype = layer.weight.dtype
    del layer.weight
    layer.quant_method = method
    method.create_weights(
        layer, layer.input_size_per_partition, layer.output_partition_sizes, layer.input_size, layer.output_size, dtype,
        weight_loader=layer.weight_loader,
    )  # fmt: skip
