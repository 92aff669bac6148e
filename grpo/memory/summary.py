"""The memory plan as a dry run prints it, for a model of which it reads no more than the sizes: what takes how much,
whether it fits a GPU, and how fast it would be there."""

from __future__ import annotations

from pathlib import Path

from grpo.config.schema import Config
from grpo.memory.fit import (
    CONTEXT,
    DESKTOP,
    DESKTOP_BELOW,
    Fit,
    best_fit,
    least_bytes,
    refusal,
    usable_bytes,
    with_weight_update,
)
from grpo.memory.full_finetuning import check_trainable
from grpo.memory.gpus import GPUS, Gpu, gpu_here
from grpo.memory.plan import MemoryPlan, Shape, hosted, plan_memory, sequence_limits
from grpo.memory.shapes import model_shape, model_tower
from grpo.model.adapter_layers import adapted_layers
from grpo.model.layout import EMBEDDING, HEAD
from grpo.model.quantization import quantization


def memory_plan(config: Config, gpu: Gpu | None = None) -> list[str]:
    """The plan in words, one part a line, or one line that says why there is none.

    gpu: to plan for; else the one of this machine, where `model.device` may be a GPU.
    """
    shape = model_shape(config.model, network=True)
    if shape is None:
        return [f"Memory: the sizes of {config.model.name} are not known here, so nothing is planned."]
    may = config.model.device != "cpu"
    gpu = gpu or (gpu_here() if may else None)
    on_gpu = gpu is not None or config.model.device == "cuda" or (may and has_gpu())
    itemsize = compute_itemsize(config, on_gpu)
    if config.model.full_finetuning:
        half = "bfloat16" if gpu is None or gpu.architecture >= 80 else "float16"
        check_trainable(shape, "float32" if itemsize == 4 else half)
    memory = None if gpu is None else (gpu.memory - CONTEXT, gpu.memory)
    config = with_weight_update(config, shape, itemsize, memory, gpu)
    tower = model_tower(config.model)
    if config.model.images and tower is None:
        return [f"Memory: the sizes of the vision tower of {config.model.name} are not known, so nothing is planned."]
    plan = plan_memory(config, shape, itemsize, on_gpu=on_gpu, flash=gpu is None or gpu.flash, tower=tower)
    if gpu is None:
        return parts(config, shape, plan, None, on_gpu=on_gpu) + (smallest(config, shape) if may else [])
    fit = None
    if config.rollout.gpu_memory_utilization is None:
        fit = best_fit(config, shape, itemsize, plan, usable_bytes(gpu.memory - CONTEXT, gpu.memory), gpu)
    where = f"the {gpu.name} of {gpu.memory / 1e9:.1f} GB"
    return parts(config, shape, plan, fit, on_gpu=True, where=where) + verdict(config, shape, plan, fit, gpu)


def parts(
    config: Config, shape: Shape, plan: MemoryPlan, fit: Fit | None, *, on_gpu: bool, where: str = ""
) -> list[str]:
    """What takes memory, a line each. fit: how a certain GPU's is shared out."""
    storage = held_as(config, shape)
    if config.model.quantized and not on_gpu:
        storage = f"{storage} values, dequantised"
    tokens = max(config.train.tokens_per_micro_batch, config.max_seq_length)
    training = plan.peaks[fit.mode] if fit else plan.training
    lines = [
        f"Memory on {where or ('the GPU' if on_gpu else 'the CPU')}, planned, in GB of 10^9 bytes:",
        f"  {gb(plan.weights)}  weights, {storage}, one copy for sampling and training",
        f"  {kv_line(config, plan, fit, on_gpu)}",
        f"  {gb(plan.adapter)}  {trained_line(config, shape)}",
        f"  {gb(plan.sampling)}  at most, while sampling",
        f"  {gb(training)}  at most, while training on {tokens:,} tokens ({training_line(plan, fit)})",
    ]
    if on_gpu:
        lines.insert(3, f"  {gb(plan.vllm)}  vLLM's buffers and CUDA graphs")
    if plan.images:
        lines[2:2] = [
            f"  {gb(plan.tower)}  vision tower" + (", in host memory between uses" if not plan.tower else ""),
            f"  {gb(plan.images)}  images' embeddings, and vLLM's buffers for them",
        ]
    if plan.host:
        names = {EMBEDDING: "the token embedding", HEAD: "the output head"}
        moved = [names[name] for name in hosted(config, shape, on_gpu=on_gpu)]
        moved += ["the vision tower"] if plan.images and not plan.tower else []
        tied = ", which is the output head too" if shape.tie_word_embeddings and moved[0] in names.values() else ""
        lines.append(f"  {gb(plan.host)}  of host memory, pinned, for {' and '.join(moved)}{tied}")
    return lines


def held_as(config: Config, shape: Shape) -> str:
    """What the linear layers are kept in."""
    if config.model.load_in_8bit:
        return quantization({"quantization_config": getattr(shape, "quantization_config", None)}).kind or "int8"
    return "NF4" if config.model.load_in_4bit else "unquantised"


def verdict(config: Config, shape: Shape, plan: MemoryPlan, fit: Fit | None, gpu: Gpu) -> list[str]:
    """What the plan comes to on `gpu`: the total, whether it fits, and how fast it would be."""
    free = gpu.memory - CONTEXT
    usable = usable_bytes(free, gpu.memory)
    others = gpu.memory - usable
    lines = [others_line(gpu, others)]
    share = config.rollout.gpu_memory_utilization
    if share is not None:
        return [*lines, f"What rollout.gpu_memory_utilization = {share:g} leaves to training is seen when it starts."]
    if fit is None:
        return [*lines, f"Does not fit: {refusal(config, shape, plan, least_bytes(config, plan), free, usable)}."]
    taken = plan.peak(fit.kv_cache, fit.mode) + others
    return [
        *lines,
        f"  {gb(taken)}  at once, sampling and training taking turns",
        f"Fits the {gpu.name} with {(gpu.memory - taken) / 1e9:.1f} GB to spare.",
        f"Predicted, not measured, for completions of {config.rollout.max_completion_length:,} tokens: "
        f"sampling {speed(config, fit.rollout_seconds)} and training {speed(config, fit.training_seconds)} of them a "
        f"second, a step in {fit.seconds:,.0f} s.",
    ]


def others_line(gpu: Gpu, others: int) -> str:
    """What a plan leaves of `gpu` to what it does not count."""
    desktop = f", and {DESKTOP / 1e9:.0f} GB to a desktop" if gpu.memory < DESKTOP_BELOW else ""
    return f"  {gb(others)}  left to the CUDA context, kernels loaded later, fragments{desktop}"


def smallest(config: Config, shape: Shape) -> list[str]:
    """The least memory of the known GPUs that would do, in a line; none where none would."""
    for gpu in sorted(GPUS, key=lambda gpu: gpu.memory):
        itemsize = compute_itemsize(config, True)
        tried = with_weight_update(config, shape, itemsize, (gpu.memory - CONTEXT, gpu.memory), gpu)
        plan = plan_memory(tried, shape, itemsize, on_gpu=True, flash=gpu.flash, tower=model_tower(config.model))
        usable = usable_bytes(gpu.memory - CONTEXT, gpu.memory)
        if best_fit(tried, shape, itemsize, plan, usable, gpu) is not None:
            name = gpu.name.removeprefix("RTX ")
            return [f'A GPU of {gpu.memory / 1e9:.0f} GB would do; --card "{name}" plans for the {gpu.name}.']
    return []


def trained_line(config: Config, shape: Shape) -> str:
    """What there is beside the weights, because something is trained."""
    if not config.model.full_finetuning:
        return f"adapter of {ranks(config, shape)}: values, gradients, moments, vLLM's copy"
    low = ", lower halves of the weights" if config.train.weight_update != "stochastic" else ""
    frozen = f", the reference in {config.loss.reference_storage}" if config.loss.beta > 0 else ""
    return f'gradients, moments{low}{frozen}; train.weight_update = "{config.train.weight_update}"'


def ranks(config: Config, shape: Shape) -> str:
    """The ranks of the adapter's layers, in words."""
    every = sorted({adapter.rank for adapter in adapted_layers(shape, config.lora).values()})
    return f"rank {every[0]}" if len(every) == 1 else f"ranks {every[0]} to {every[-1]}"


def speed(config: Config, seconds: float) -> str:
    """Sampled tokens a second of a step that takes so long for them."""
    return f"{config.completions_per_step * config.rollout.max_completion_length / seconds:,.0f}"


def kv_line(config: Config, plan: MemoryPlan, fit: Fit | None, on_gpu: bool) -> str:
    length, sequences = sequence_limits(config)
    share = config.rollout.gpu_memory_utilization
    if share is not None and on_gpu:
        return f"   rest  KV cache: what {share:g} of the GPU leaves beside weights and vLLM's buffers"
    if config.rollout.kv_cache_memory_bytes is not None:
        return f"{gb(plan.kv_cache)}  KV cache, as rollout.kv_cache_memory_bytes says"
    if fit is not None:
        return (
            f"{gb(fit.kv_cache)}  KV cache: {fit.sequences:,} of {sequences:,} sequences of {length:,} tokens at once"
        )
    fitted = "; less where the GPU has less" if on_gpu else ""
    return f"{gb(plan.kv_cache)}  KV cache: {sequences:,} sequences of {length:,} tokens{fitted}"


def training_line(plan: MemoryPlan, fit: Fit | None) -> str:
    """The peak of every mode that training may take, and which it takes."""
    peaks = ", ".join(f"{mode} {peak / 1e9:.2f}" for mode, peak in plan.peaks.items())
    taken = f', here "{fit.mode}"' if fit and plan.gradient_checkpointing == "auto" else ""
    return f'gradient_checkpointing = "{plan.gradient_checkpointing}"{taken}: {peaks}'


def gb(size: int) -> str:
    return f"{size / 1e9:7.2f}"


def has_gpu() -> bool:
    """Whether a CUDA device seems to be there, without loading torch."""
    return any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg"))


def compute_itemsize(config: Config, on_gpu: bool) -> int:
    """Bytes of a number in `model.dtype`; "auto" is float32 only on a CPU without AVX512."""
    if config.model.dtype != "auto":
        return 4 if config.model.dtype == "float32" else 2
    info = Path("/proc/cpuinfo")
    return 2 if on_gpu or (info.exists() and "avx512bw" in info.read_text()) else 4
