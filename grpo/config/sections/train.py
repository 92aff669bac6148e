"""`[train]`: the keys of the optimiser and of a run's length."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from grpo.config.sections.section import Fraction, PositiveFloat, PositiveInt, Section


class Train(Section):
    """`[train]`: optimiser and length of the run."""

    learning_rate: PositiveFloat = 1e-5
    """Peak learning rate. LoRA wants about ten times that of full fine-tuning."""
    max_steps: PositiveInt | None = None
    """Steps (rollout batches) to run. Default: `num_train_epochs` over the data."""
    num_train_epochs: PositiveFloat = 1.0
    """Passes over the prompts when `max_steps` is not set."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_ratio: Fraction = 0.0
    """Share of the steps over which the learning rate rises from 0."""
    optim: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """Optimiser; the 8-bit forms come from bitsandbytes and need a GPU (on a CPU, adamw with a notice)."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """First-moment decay."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Second-moment decay."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on the adapter; with `full_finetuning` on all weights but norms and biases."""
    weight_update: Literal["auto", "float32", "compensated", "stochastic"] = "auto"
    """With `full_finetuning`: what keeps steps that are smaller than a bfloat16 weight can show. The lower half of
    float32 weights beside the half that is served, with gradients in float32, or in bfloat16 ("compensated"); or
    nothing but rounding at random ("stochastic"). 6, 4 and 2 bytes a weight beside the moments; "auto": the first that
    fits."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """A step with NaN or infinity in rewards, logprobs, loss or gradient, or beyond one of the two limits below: leave
    its update out, or stop the run. Either way the batch is dumped for `python -m grpo.replay`."""
    max_nonfinite_steps: PositiveInt = 5
    """Stop when so many steps in a row were left out."""
    max_mismatch_kl: PositiveFloat | None = 1.0
    """Treat a step as non-finite whose `mismatch_kl` is above this: vLLM and the trainer no longer agree."""
    grad_norm_spike: Annotated[float, Field(gt=1)] | None = 100.0
    """Treat a step as non-finite whose gradient norm is so many times the median of the last 50."""
    num_iterations: PositiveInt = 1
    """Passes over each rollout batch."""
    optimizer_steps_per_rollout: PositiveInt = 1
    """Optimiser steps in one such pass; the batch is split by whole prompts."""
    tokens_per_micro_batch: PositiveInt = 8192
    """Tokens in one forward and backward, packed without padding. Changes memory and speed, never the result."""
    logprob_chunk_tokens: PositiveInt = 1024
    """Tokens whose logits exist at once."""
    router_replay: bool = True
    """Of a mixture of experts: train each token with the experts that sampling chose for it, also for old and reference
    logprobs. Rounding alone chooses other ones for some tokens, which no importance ratio corrects well."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """What computes the layers in training: fused Triton kernels, or plain torch modules to compare them with. "auto":
    Triton on a GPU, torch on a CPU."""
    gradient_checkpointing: bool | Literal["auto", "none", "mlp", "layer", "offload"] = "auto"
    """What the backward pass finds: everything ("none"), all but the MLP's intermediate tensors ("mlp", with Triton
    kernels), each layer's input ("layer"), or that in host memory ("offload"); the rest is computed again. "auto":
    the first of these that fits; if that is "mlp", as many layers as there is room for keep everything all the same.
    true and false, as in TRL, are "layer" and "none"."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of data order, sampling and adapter initialisation."""

    @field_validator("gradient_checkpointing")
    @classmethod
    def booleans_as_in_trl(cls, value: bool | str) -> str:
        return value if isinstance(value, str) else "layer" if value else "none"
