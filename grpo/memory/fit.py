"""Whether a run fits a GPU, and how its memory is shared out between the KV cache and training.

The two compete: a larger KV cache decodes more sequences at once, and training that keeps more computes less again.
Every mode of gradient checkpointing is tried with the largest KV cache beside it, and the pair whose step is predicted
to be the shortest is taken. Some memory is left to what no plan counts. Nothing here imports torch, or allocates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.memory.activations import FREE_SHARE
from grpo.memory.full_finetuning import FORMS
from grpo.memory.gpus import USUAL, Gpu
from grpo.memory.plan import MARGIN, VLLM_BUFFERS, MemoryPlan, plan_memory, sequence_limits
from grpo.memory.roofline import Work, rollout_seconds, training_seconds
from grpo.memory.tower import TowerSizes

CONTEXT = 500_000_000
"""Bytes of a CUDA context and of the libraries that start with it."""
MODULES = 300_000_000
"""Bytes of kernels that are loaded when they are first launched."""
DESKTOP, DESKTOP_BELOW = 1_000_000_000, 24_000_000_000
"""Bytes that a desktop may take on a GPU with less memory than the second, whoever uses it now."""


def forms_to_try(config: Config) -> list[Config]:
    """`config` with each form of the weights' update that it leaves open, in the order of preference; or itself."""
    if not config.model.full_finetuning or config.train.weight_update != "auto":
        return [config]
    forms = FORMS[:1] if config.model.dtype == "float32" else FORMS
    return [
        config.model_copy(update={"train": config.train.model_copy(update={"weight_update": form})}) for form in forms
    ]


def with_weight_update(
    config: Config, shape: Any, itemsize: int, memory: tuple[int, int] | None, gpu: Gpu | None = None
) -> Config:
    """`config` with the first form of the weights' update that fits a GPU with (free, total) bytes of `memory`; the
    last where none does. Without a GPU the first."""
    tried = forms_to_try(config)
    if memory is None:
        return tried[0]
    for candidate in tried:
        plan = plan_memory(candidate, shape, itemsize, on_gpu=True, flash=gpu is None or gpu.flash)
        if best_fit(candidate, shape, itemsize, plan, usable_bytes(*memory), gpu) is not None:
            return candidate
    return tried[-1]


@dataclass(frozen=True)
class Fit:
    """How a run's memory is shared out on a GPU."""

    mode: str
    """Of gradient checkpointing."""
    kv_cache: int
    sequences: int
    """That the KV cache holds at their full length."""
    rollout_seconds: float
    training_seconds: float

    @property
    def seconds(self) -> float:
        """A step, predicted."""
        return self.rollout_seconds + self.training_seconds


def usable_bytes(free: int, total: int) -> int:
    """What a plan may count on, of a GPU with `free` of `total` bytes after the CUDA context was made."""
    others = CONTEXT + (DESKTOP if total < DESKTOP_BELOW else 0)
    return int((min(free, total - others) - MODULES) * (1 - MARGIN))


def best_fit(config: Config, shape: Any, itemsize: int, plan: MemoryPlan, usable: int, gpu: Gpu | None) -> Fit | None:
    """The fastest way to share out `usable` bytes, predicted for `gpu` or a usual one; None where there is none.

    Where a mode is set, with it; where `kv_cache_memory_bytes` is, with that.
    """
    work, card = Work.of(config, shape, itemsize), gpu or USUAL
    fixed = config.rollout.kv_cache_memory_bytes
    chosen = plan.gradient_checkpointing
    modes = list(plan.peaks) if chosen == "auto" else [chosen if chosen in plan.peaks else "none"]
    for share in (FREE_SHARE, 1.0):
        fits = []
        for mode in modes:
            room = plan.room_for_kv(usable, mode, share)
            kv = plan.kv_cache if fixed else min(plan.kv_cache, room)
            sequences = sequences_in(kv, config, plan)
            if kv <= room and sequences:
                seconds = rollout_seconds(config, work, card, sequences)
                fits.append(Fit(mode, kv, sequences, seconds, training_seconds(config, work, card, mode)))
        if fits:
            return min(fits, key=lambda fit: fit.seconds)
    return None


def sequences_in(kv_cache: int, config: Config, plan: MemoryPlan) -> int:
    """How many sequences that vLLM decodes at once reach their full length in a cache of so many bytes; at least 1 in
    one that the configuration sets, whose sequences may be shorter."""
    held = max(0, kv_cache - plan.kv_spare) // (plan.kv_one_sequence - plan.kv_spare)
    return max(min(held, sequence_limits(config)[1]), 1 if config.rollout.kv_cache_memory_bytes else 0)


def check_memory(
    config: Config,
    shape: Any,
    itemsize: int,
    free: int,
    total: int,
    gpu: Gpu | None = None,
    tower: TowerSizes | None = None,
) -> int | None:
    """Bytes for the KV cache on a GPU with `free` of `total` bytes, nothing of the model being loaded yet.

    What the configuration sets is obeyed: None for `gpu_memory_utilization`, which the engine works out. Otherwise by
    `best_fit`. Raises UserError, with the plan and what to lower, where the run cannot fit.
    """
    plan = plan_memory(config, shape, itemsize, on_gpu=True, flash=gpu is None or gpu.flash, tower=tower)
    usable = usable_bytes(free, total)
    share = config.rollout.gpu_memory_utilization
    if share is not None:
        kv = max(int(share * total) - plan.weights - plan.tower - VLLM_BUFFERS, plan.kv_one_sequence)
        if plan.peak(kv) > usable:
            raise UserError(refusal(config, shape, plan, plan.peak(kv), free, usable))
        return None
    fit = best_fit(config, shape, itemsize, plan, usable, gpu)
    if fit is None:
        raise UserError(refusal(config, shape, plan, least_bytes(config, plan), free, usable))
    return fit.kv_cache


def least_bytes(config: Config, plan: MemoryPlan) -> int:
    """What a run takes with the smallest KV cache that serves it."""
    fixed = config.rollout.kv_cache_memory_bytes
    return plan.peak(plan.kv_cache if fixed else plan.kv_one_sequence)


# Refusing


def lighter_weights(config: Config, shape: Any) -> str:
    """What would make the weights less, the cheapest first."""
    model = config.model
    if model.full_finetuning:
        return "use a smaller model, or train a LoRA adapter"
    if not model.load_in_4bit:
        return "set model.load_in_4bit = true" + (" instead of load_in_8bit" if model.load_in_8bit else "")
    embedding = not (shape.tie_word_embeddings or model.offload_embedding)
    steps = ["set model.offload_embedding = true"] if embedding else []
    if not model.offload_head:
        slowly = "model.offload_head = true, which is slow"
        steps.append(f"and if that is not enough {slowly}" if embedding else f"set {slowly}")
    return ", ".join([*steps, "or use a smaller model" if steps else "use a smaller model"])


def lighter_update(config: Config) -> str:
    """What would make less of what training all weights takes beside them, the first that is open."""
    if config.loss.beta > 0 and config.loss.reference_storage == "16bit":
        return 'set loss.reference_storage = "8bit", or loss.beta = 0'
    if config.train.optim == "adamw":
        return 'set train.optim = "paged_adamw_8bit"'
    if config.train.weight_update in ("float32", "compensated") and config.model.dtype != "float32":
        return 'set train.weight_update = "stochastic"'
    if config.train.optim == "adamw_8bit":
        return 'set train.optim = "paged_adamw_8bit"'
    return "use a smaller model, or train a LoRA adapter"


def refusal(config: Config, shape: Any, plan: MemoryPlan, needed: int, free: int, usable: int) -> str:
    """One sentence: what is needed, of what it consists, and what would make it less."""
    share, fixed = config.rollout.gpu_memory_utilization, config.rollout.kv_cache_memory_bytes
    kv = plan.kv_cache if fixed else plan.kv_one_sequence
    full = config.model.full_finetuning
    trained = "gradients and moments" if full else "adapter"
    parts = {"weights": plan.weights, "KV cache": kv, "vLLM's buffers": plan.vllm, trained: plan.adapter}
    if plan.images:
        parts |= {"vision tower": plan.tower, "images": plan.images}
    if plan.sampling > plan.training:
        parts |= {"sampling": plan.sampling}
    else:
        logits = min(plan.logits, plan.training)
        parts |= {"activations": plan.training - logits, "logits": logits}
    remedies = {
        "weights": lighter_weights(config, shape),
        "KV cache": "lower rollout.kv_cache_memory_bytes" if fixed else "lower rollout.max_completion_length",
        "vLLM's buffers": "use a smaller model",
        "adapter": "lower lora.r",
        "gradients and moments": lighter_update(config),
        "vision tower": "set model.offload_tower = true",
        "images": "lower rollout.prompts_per_step or rollout.max_prompt_length",
        "sampling": "lower rollout.max_num_seqs or rollout.max_completion_length",
        "activations": "lower train.tokens_per_micro_batch or rollout.max_completion_length"
        if plan.gradient_checkpointing in ("auto", "offload")
        else 'set train.gradient_checkpointing = "auto"',
        "logits": "lower train.logprob_chunk_tokens",
    }
    remedy = "lower rollout.gpu_memory_utilization" if share else remedies[max(parts, key=parts.__getitem__)]
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
    others = "" if needed > free else f" beside {(free - usable) / 1e9:.1f} GB that are left to other things"
    return (
        f"the GPU has {free / 1e9:.1f} GB free, and the run needs {needed / 1e9:.1f} GB "
        f"({listed}{f'; gpu_memory_utilization = {share:g}' if share else ''}){others}; {remedy}"
    )
