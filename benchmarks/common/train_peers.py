"""The peers of train_step.py: transformers + peft + bitsandbytes on the same shapes, TRL's and Liger's way from hidden
states to a loss. Each uses its library as its documentation says, at what was found fastest among its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grpo.config.schema import SEVEN_PROJECTIONS

Step = Callable[[], None]


def peft_model(config: Any, rank: int, device: torch.device, *, checkpointing: bool) -> nn.Module:
    """A causal LM of `config` with random double-quantised NF4 linears (dense on a CPU) and LoRA on all seven."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    rotary = type(model.model.rotary_emb)(config).to(device)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and device.type == "cuda":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, four_bit(module, device))
    model.model.rotary_emb = rotary
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        parent, _, leaf = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(0, 0.02)
        setattr(model.get_submodule(parent), leaf, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.requires_grad_(False)
    model = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=SEVEN_PROJECTIONS, task_type="CAUSAL_LM")
    )
    model = model.to(device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    return model.train()


def four_bit(module: nn.Linear, device: torch.device) -> nn.Module:
    """bitsandbytes' layer in the place of `module`, with random weights that it quantised itself."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(
        module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    values = torch.empty(module.weight.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
    layer.weight = Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    return layer


def peft_step(model: nn.Module, optimizer: Any, tokens: Tensor) -> Step:
    """One optimiser step on tokens [sequences, length], by the model's own loss."""

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def policy_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The clipped objective at ratio 1, mean over tokens; advantages [sequences], logprobs [sequences, tokens]."""
    ratio = torch.exp(logprobs - logprobs.detach())
    value = advantages[:, None]
    return -torch.minimum(ratio * value, ratio.clamp(0.8, 1.2) * value).mean()


def trl_logprob_step(hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor) -> Step:
    """TRL 1.16: logits of the micro-batch, its fused selective log-softmax and entropy, the loss."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def step() -> None:
        logits = F.linear(hidden, head)
        logprobs, _ = selective_log_softmax_and_entropy(logits, targets, entropy_requires_grad=False)
        del logits
        policy_loss(logprobs, advantages).backward()
        hidden.grad = None

    return step


def liger_logprob_step(hidden: Tensor, head: Tensor, targets: Tensor, advantages: Tensor) -> Step:
    """Liger 0.8.5: LigerFusedLinearGRPOLoss on the hidden states."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, loss_type="dapo", epsilon_low=0.2, epsilon_high=0.2
    )
    mask = torch.ones_like(targets)

    def step() -> None:
        result = loss(hidden, head, targets, mask, advantages)
        (result[0] if isinstance(result, tuple) else result).backward()
        hidden.grad = None

    return step
