"""`[rollout]`: the keys of sampling."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from grpo.config.sections.section import Fraction, PositiveInt, Section


class Rollout(Section):
    """`[rollout]`: sampling groups of completions with vLLM."""

    prompts_per_step: PositiveInt = 16
    """Different prompts in one step."""
    num_generations: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt: the group whose rewards are compared."""
    max_prompt_length: PositiveInt = 512
    """Longest prompt in tokens, chat template included."""
    max_completion_length: PositiveInt = 512
    """Longest completion in tokens."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Sampling temperature, at most 2 as in vLLM; the trainer scores with the same one."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling. Refused below 1: sampled tokens would be scored over a different set than they came from."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among the k likeliest tokens; 0 means all. Refused above 0, as `top_p`."""
    min_p: Fraction = 0.0
    """Drop tokens below this share of the likeliest one. Refused above 0, as `top_p`."""
    stop: list[str] = []
    """Strings that end a completion (kept in it), besides the model's end-of-turn tokens."""
    skip_special_tokens: bool = False
    """Take every special token out of completions before rewards see them, as TRL does. Off: only those that end a
    completion, fill up a batch or begin a sequence."""
    chat_template_kwargs: dict[str, Any] = {}
    """Passed to the chat template, for example `{ enable_thinking = false }`."""
    max_num_seqs: PositiveInt | None = None
    """Sequences that vLLM decodes at once. Default: all of a step, at most 256."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the GPU's memory for weights, KV cache and vLLM's buffers together."""
    kv_cache_memory_bytes: PositiveInt | None = None
    """KV cache in bytes, instead. With neither, planned from the lengths and what training needs."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """"fp8" halves the KV cache on a GPU from compute capability 8.9 on, at a larger mismatch between rollout and
    training."""
    attention_backend: Literal["auto", "flash_attn", "grpo", "triton_attn", "flashinfer", "flex_attention"] = "auto"
    """vLLM's attention on a GPU. "grpo": FlashAttention for prompts, this project's kernels for decoding steps of many
    sequences. "auto": that on Hopper, FlashAttention elsewhere; Triton's before Ampere and for an fp8 cache off
    Hopper."""
    release_kv_cache: bool = False
    """Give the KV cache's memory on a GPU to training while it runs; costs some tens of milliseconds a step."""
    enforce_eager: bool = False
    """Do without CUDA graphs."""

    @model_validator(mode="after")
    def one_memory_budget(self) -> Rollout:
        if self.gpu_memory_utilization is not None and self.kv_cache_memory_bytes is not None:
            raise ValueError("gpu_memory_utilization and kv_cache_memory_bytes are both set; keep one of them")
        return self

    @model_validator(mode="after")
    def sample_from_what_is_scored(self) -> Rollout:
        if self.top_p < 1 or self.top_k > 0 or self.min_p > 0:
            raise ValueError(
                "top_p < 1, top_k > 0 and min_p > 0 are refused: vLLM would renormalise over the kept tokens while the "
                "loss scores over all of them, which biases every importance ratio; use temperature instead"
            )
        return self
