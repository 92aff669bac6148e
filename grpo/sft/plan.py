"""The memory of a supervised run as its dry run prints it: no vLLM, no KV cache, one mode of checkpointing."""

from __future__ import annotations

from dataclasses import replace

from grpo.config.schema import Config
from grpo.memory.activations import TrainingMemory, moment_bytes
from grpo.memory.fit import CONTEXT, usable_bytes
from grpo.memory.gpus import GPUS, Gpu, gpu_here
from grpo.memory.plan import Shape, weight_bytes
from grpo.memory.roofline import Work, pass_seconds
from grpo.memory.shapes import model_shape, model_tower
from grpo.memory.summary import compute_itemsize, gb, has_gpu, others_line
from grpo.memory.tower import images_plan
from grpo.model.adapter_config import takes_from_base
from grpo.sft.config import SftConfig


def memory_lines(config: SftConfig, gpu: Gpu | None = None) -> list[str]:
    """The plan in words, a part a line. gpu: to plan for; else the one of this machine, where `model.device` may be
    one."""
    shape = model_shape(config.model, network=True)
    if shape is None:
        return [f"Memory: the sizes of {config.model.name} are not known here, so nothing is planned."]
    may = config.model.device != "cpu"
    gpu = gpu or (gpu_here() if may else None)
    on_gpu = gpu is not None or config.model.device == "cuda" or (may and has_gpu())
    if config.model.images and model_tower(config.model) is None:
        return [f"Memory: the sizes of the vision tower of {config.model.name} are not known, so nothing is planned."]
    sizes = needed(config, shape, gpu, on_gpu=on_gpu)
    weights, adapter, training, images = sizes
    where = f"the {gpu.name} of {gpu.memory / 1e9:.1f} GB" if gpu else "the GPU" if on_gpu else "the CPU"
    lines = [
        f"Memory on {where}, planned, in GB of 10^9 bytes:",
        f"  {gb(weights)}  weights",
        *([f"  {gb(images)}  vision tower and images' embeddings"] if config.model.images else []),
        f"  {gb(adapter)}  adapter of rank {config.lora.r}: values, gradients, moments",
        f"  {gb(training)}  at most, while training on {tokens_of(config):,} tokens "
        f'(gradient_checkpointing = "{mode_of(config, on_gpu)}")',
    ]
    if gpu is not None:
        return lines + verdict(config, shape, gpu, sum(sizes))
    if may:
        return lines + smallest(config, shape)
    return lines


def tokens_of(config: SftConfig) -> int:
    """In one forward and backward, at the most."""
    return config.sft.per_device_train_batch_size * config.sft.max_length


def mode_of(config: SftConfig, on_gpu: bool) -> str:
    """As grpo.sft.trainer chooses it."""
    chosen = str(config.train.gradient_checkpointing)
    return chosen if chosen != "auto" else "layer" if on_gpu else "none"


def as_grpo(config: SftConfig) -> Config:
    """A configuration of GRPO with the same model, adapter and optimiser, of which the plan's formulas read these."""
    train = config.train.model_dump() | {"tokens_per_micro_batch": tokens_of(config)}
    tables = {"model": config.model.model_dump(), "lora": config.lora.model_dump(), "train": train}
    return Config.model_validate({**tables, "task": {"name": "arithmetic"}})


def needed(config: SftConfig, shape: Shape, gpu: Gpu | None, *, on_gpu: bool) -> tuple[int, int, int, int]:
    """Bytes of the weights, of the adapter, of training on top, and of images beside that."""
    like, itemsize = as_grpo(config), compute_itemsize(as_grpo(config), on_gpu)
    tokens, flash = tokens_of(config), gpu is None or gpu.flash
    training = TrainingMemory.of(like, shape, itemsize, on_gpu=on_gpu, tokens=tokens, flash=flash)
    training = replace(training, keys=tokens)  # no prompts are shared
    mode = mode_of(config, on_gpu)
    sizes = training.sizes
    first = 4 * takes_from_base(config.lora.init_lora_weights)
    adapter = sizes.adapter * sizes.layers * (4 + 4 + first + moment_bytes(config.train.optim, on_gpu=on_gpu))
    peak = training.peak(mode if mode in training.modes else "none")
    return weight_bytes(like, shape, itemsize, on_gpu=on_gpu), adapter, peak, image_bytes(config, itemsize, on_gpu)


def image_bytes(config: SftConfig, itemsize: int, on_gpu: bool) -> int:
    """Of the tower, of embeddings that it keeps, and of those in a batch; of the tower alone while it encodes."""
    sizes = model_tower(config.model)
    if sizes is None:
        return 0
    seen = images_plan(config.for_policy(), sizes, itemsize, on_gpu=on_gpu)
    kept = sizes.kept_bytes(config.for_policy(), itemsize)
    return seen.tower + kept + max(seen.encoding, sizes.training_bytes(tokens_of(config), itemsize))


def verdict(config: SftConfig, shape: Shape, gpu: Gpu, size: int) -> list[str]:
    """What it comes to on `gpu`."""
    others = gpu.memory - usable_bytes(gpu.memory - CONTEXT, gpu.memory)
    lines = [others_line(gpu, others)]
    spare = gpu.memory - others - size
    if spare < 0:
        return [*lines, f"Does not fit the {gpu.name}: {-spare / 1e9:.1f} GB are missing; lower "
                        "sft.per_device_train_batch_size or sft.max_length, or use a smaller model."]  # fmt: skip
    like = as_grpo(config)
    work = Work.of(like, shape, compute_itemsize(like, True))
    tokens = tokens_of(config)
    seconds = pass_seconds(work, gpu, mode_of(config, True), tokens, config.sft.max_length, tokens, predicted=tokens)
    return [
        *lines,
        f"Fits the {gpu.name} with {spare / 1e9:.1f} GB to spare.",
        f"Predicted, not measured: {tokens / seconds:,.0f} tokens a second, all of them counted.",
    ]


def smallest(config: SftConfig, shape: Shape) -> list[str]:
    """The least memory of the known GPUs that would do, in a line; none where none would."""
    for gpu in sorted(GPUS, key=lambda gpu: gpu.memory):
        if sum(needed(config, shape, gpu, on_gpu=True)) <= usable_bytes(gpu.memory - CONTEXT, gpu.memory):
            name = gpu.name.removeprefix("RTX ")
            return [f'A GPU of {gpu.memory / 1e9:.0f} GB would do; --card "{name}" plans for the {gpu.name}.']
    return []
