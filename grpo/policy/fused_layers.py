"""Our kernels in the training graph: decoder layers whose forward and backward are four autograd functions.

A `FusedLayer` takes the place of one transformers decoder layer and holds the same children under the same names, so
adapters, checkpoints and whoever looks a weight up see no difference; only its forward is our own. It computes what
transformers' layer computes for the families listed for it in `families/`: norm, q/k/v, q/k norm, rotary embedding;
attention; output projection with the residual; the gated MLP with its norm and residual. Between these only what the
next one needs is kept. A layer that does anything else (another activation, dropout on the residual) stays as it is.

Not here: which layers are recomputed (`activation_checkpointing.py`) and the kernels themselves.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from grpo.errors import UserError
from grpo.kernels.attention import Packing, packed_attention
from grpo.kernels.glu import glu
from grpo.kernels.launch import interpreter_enabled
from grpo.kernels.lora_attention import QkvProjection, lora_qkv
from grpo.kernels.lora_linear import lora_linear
from grpo.kernels.lora_mlp import GatedMlp, lora_mlp
from grpo.kernels.rms_norm import Norm, rms_norm
from grpo.kernels.rope import rope
from grpo.model.base_weights import BaseWeights
from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.table import family_of
from grpo.policy.adapted_linears import ACTIVATIONS, AdaptedLinears, activation_of
from grpo.policy.fused_mlp import install_fused_mlps

PRODUCTS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
"""The linear layers of a decoder layer, as vLLM stacks them."""


def wants_kernels(kernels: str, device: torch.device) -> bool:
    """Whether `train.kernels` asks for them on `device`. Raises UserError where they cannot run."""
    if kernels == "triton" and device.type != "cuda" and not interpreter_enabled():
        raise UserError('train.kernels = "triton" needs a GPU; set "auto" or "torch"')
    return kernels == "triton" or (kernels == "auto" and device.type == "cuda")


def install_fused_layers(decoder: nn.Module, base: BaseWeights) -> int:
    """Replace the layers and the last norm of `decoder`, a causal LM over `base`, or the MLPs where layers stay as they
    are. Returns how many layers it was."""
    if (mlps := install_fused_mlps(decoder, base)) > 0:
        return mlps
    layers = decoder.model.layers
    replaced = 0
    for index, layer in enumerate(layers):
        if can_fuse(layer, base.config):
            layers[index] = FusedLayer(layer, index, base)
            replaced += 1
    if family_of(base.config.model_type).fused_layers:
        decoder.model.norm = FusedNorm(decoder.model.norm, base.config)
    return replaced


def can_fuse(layer: nn.Module, config: DecoderConfig) -> bool:
    """Whether a FusedLayer computes what `layer` does."""
    listed = family_of(config.model_type).fused_layers
    return listed and activation_of(config) in ACTIVATIONS and not getattr(config, "resid_pdrop", 0)


def norm_of(module: nn.Module, config: DecoderConfig) -> Norm:
    """A transformers RMSNorm as the kernels take it."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    trained = module.weight if module.weight.requires_grad else None
    return Norm(module.weight.detach(), float(eps), family_of(config.model_type).norm_adds_one, trained)


class FusedNorm(nn.Module):
    """An RMSNorm outside the layers, under the names of transformers'."""

    def __init__(self, module: nn.Module, config: DecoderConfig):
        super().__init__()
        self.weight = module.weight
        self.norm = norm_of(module, config)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.norm)


class FusedLayer(GradientCheckpointingLayer):
    """One decoder layer. x [1, tokens, hidden] in and out, in the base's dtype."""

    def __init__(self, layer: nn.Module, index: int, base: BaseWeights):
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        config = base.config
        attention = self.self_attn
        self.keep_mlp = True
        """Whether the MLP's gate and up are kept where the layer is not recomputed as a whole."""
        self.mlp_tiles = 1
        """Tiles of the MLP's rows that are taken as one."""
        self.scale = attention.scaling
        self.window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
        self.softcap = attention.attn_logit_softcapping if config.model_type == "gemma2" else None
        sandwich = hasattr(self, "pre_feedforward_layernorm")
        self.after_attention = norm_of(self.post_attention_layernorm, config) if sandwich else None
        self.after_mlp = norm_of(self.post_feedforward_layernorm, config) if sandwich else None
        before_mlp = self.pre_feedforward_layernorm if sandwich else self.post_attention_layernorm
        self.qkv, self.out, self.gate_up, self.down = (self._group(name, index, base) for name in PRODUCTS)
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.projection = QkvProjection(
            self.qkv.frozen,
            config.num_attention_heads,
            config.num_key_value_heads,
            norm_of(self.input_layernorm, config),
            None if q_norm is None else norm_of(q_norm, config),
            None if k_norm is None else norm_of(k_norm, config),
        )
        self.gated = GatedMlp(
            self.gate_up.frozen,
            self.down.frozen,
            ACTIVATIONS[activation_of(config)],
            norm_of(before_mlp, config),
            residual=not sandwich,
        )

    def _group(self, name: str, index: int, base: BaseWeights) -> AdaptedLinears:
        layer = f"model.layers.{index}."
        linear = base.linears[layer + name]
        return AdaptedLinears(linear, [self.get_submodule(part.removeprefix(layer)) for part in linear.parts])

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        packing: Packing | None = None,
        *,
        make_output: bool = True,
        **ignored: Any,
    ) -> Tensor:
        """`make_output = False`: the layer runs again for its backward alone, and what no backward reads is not
        computed; the result has the right graph and unset values."""
        x = hidden_states[0]
        packing = packing or Packing.of_lengths([x.shape[0]], x.device)
        cos, sin = (part.reshape(x.shape[0], -1) for part in position_embeddings)
        q, k, v = self.attention_inputs(x, cos, sin)
        attended = packed_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), packing,
            scale=self.scale, window=self.window, softcap=self.softcap,
        )  # fmt: skip
        x = self.after(attended.flatten(1), x)
        return self.mlp_output(x, make_output)[None]

    def attention_inputs(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [tokens, heads, dim], rotated."""
        projection = self.projection
        if not self.qkv.drops:
            return lora_qkv(x, cos, sin, projection, *self.qkv.adapters())
        q, k, v = projection.split(self.qkv.plain(normed(x, projection.norm)))
        if projection.q_norm is not None and projection.k_norm is not None:
            q, k = rms_norm(q, projection.q_norm), rms_norm(k, projection.k_norm)
        return rope(q, cos, sin), rope(k, cos, sin), v

    def after(self, attended: Tensor, x: Tensor) -> Tensor:
        """x plus the projection of what attention gave."""
        if self.out.drops:
            projected = self.out.plain(attended)
        else:
            projected = lora_linear(attended, self.out.frozen, *self.out.adapters())
        return x + (projected if self.after_attention is None else rms_norm(projected, self.after_attention))

    def mlp_output(self, x: Tensor, make_output: bool) -> Tensor:
        """x plus the MLP of it; see `forward`."""
        gated = self.gated
        if self.gate_up.drops or self.down.drops:
            inner = glu(self.gate_up.plain(normed(x, gated.norm)), gated.activation)
            result = self.down.plain(inner)
            result = result + x if gated.residual else result
        else:
            (above, above_factors), (below, below_factors) = self.gate_up.adapters(), self.down.adapters()
            replayed = self.gradient_checkpointing and self.training
            result = lora_mlp(
                x, gated, (above, below), [*above_factors, *below_factors],
                keep=self.keep_mlp and not replayed,
                output=make_output or not gated.residual,
                tiles=1 if replayed else self.mlp_tiles,
            )  # fmt: skip
        return result if gated.residual else x + normed(result, self.after_mlp)


def normed(x: Tensor, norm: Norm | None) -> Tensor:
    """RMSNorm, where there is one."""
    return x if norm is None else rms_norm(x, norm)
