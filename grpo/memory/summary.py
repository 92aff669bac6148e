"""The memory plan as a dry run prints it, for a model of which it reads no more than the sizes."""

from __future__ import annotations

import json
from pathlib import Path

from grpo.config.schema import Config
from grpo.memory.plan import MemoryPlan, Shape, hosted, plan_memory, sequence_limits
from grpo.model.adapter_layers import adapted_layers
from grpo.model.families.table import listed
from grpo.model.gguf_header import read_header
from grpo.model.layout import EMBEDDING, HEAD
from grpo.model.locate import local_path


def model_shape(config: Config) -> Shape | None:
    """The sizes of the model that `config` names, or None where it is not on this machine or of an unknown kind."""
    path = local_path(config.model.name) or cached_config(config.model.name, config.model.revision)
    if path is None:
        return None
    if path.suffix == ".gguf":
        return gguf_shape(path)
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        shape = Shape.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return shape if shape.model_type in listed() else None


def cached_config(name: str, revision: str | None) -> Path | None:
    """config.json of a hub model that was downloaded before; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def gguf_shape(path: Path) -> Shape | None:
    """The sizes that a GGUF file states."""
    metadata, tensors = read_header(path)
    family = metadata.get("general.architecture", "")
    family_keys = {key.removeprefix(f"{family}."): value for key, value in metadata.items()}
    values = {
        "model_type": {"gemma3": "gemma3_text"}.get(family, family),
        "hidden_size": family_keys.get("embedding_length"),
        "intermediate_size": family_keys.get("feed_forward_length"),
        "num_hidden_layers": family_keys.get("block_count"),
        "num_attention_heads": family_keys.get("attention.head_count"),
        "num_key_value_heads": family_keys.get("attention.head_count_kv"),
        "head_dim": family_keys.get("attention.key_length"),
        "vocab_size": family_keys.get("tokenizer.ggml.tokens") or family_keys.get("vocab_size"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    try:
        shape = Shape.of(values)
    except TypeError:
        return None
    return shape if shape.model_type in listed() else None


def memory_plan(config: Config) -> list[str]:
    """The plan in words, one part a line, or one line that says why there is none."""
    shape = model_shape(config)
    if shape is None:
        return [f"Memory: {config.model.name} is not on this machine, or of an unknown kind, so nothing is planned."]
    on_gpu = config.model.device == "cuda" or (config.model.device == "auto" and has_gpu())
    plan = plan_memory(config, shape, compute_itemsize(config, on_gpu), on_gpu=on_gpu)
    storage = "NF4" if config.model.load_in_4bit else "unquantised"
    if config.model.load_in_4bit and not on_gpu:
        storage = "NF4 values, dequantised"
    tokens = max(config.train.tokens_per_micro_batch, config.max_seq_length)
    lines = [
        f"Memory on the {'GPU' if on_gpu else 'CPU'}, planned, in GB of 10^9 bytes:",
        f"  {gb(plan.weights)}  weights, {storage}, one copy for sampling and training",
        f"  {kv_line(config, plan, on_gpu)}",
        f"  {gb(plan.adapter)}  adapter of {ranks(config, shape)}: values, gradients, moments, vLLM's copy",
        f"  {gb(plan.sampling)}  at most, while sampling",
        f"  {gb(plan.training)}  at most, while training on {tokens:,} tokens ({training_line(plan)})",
    ]
    if on_gpu:
        lines.insert(3, f"  {gb(plan.vllm)}  vLLM's buffers and CUDA graphs")
    if plan.host:
        names = {EMBEDDING: "the token embedding", HEAD: "the output head"}
        hosted_names = " and ".join(names[name] for name in hosted(config, shape, on_gpu=on_gpu))
        tied = ", which is the output head too" if shape.tie_word_embeddings else ""
        lines.append(f"  {gb(plan.host)}  of host memory, pinned, for {hosted_names}{tied}")
    return lines


def ranks(config: Config, shape: Shape) -> str:
    """The ranks of the adapter's layers, in words."""
    found = sorted({adapter.rank for adapter in adapted_layers(shape, config.lora).values()})
    return f"rank {found[0]}" if len(found) == 1 else f"ranks {found[0]} to {found[-1]}"


def kv_line(config: Config, plan: MemoryPlan, on_gpu: bool) -> str:
    length, sequences = sequence_limits(config)
    share = config.rollout.gpu_memory_utilization
    if share is not None and on_gpu:
        return f"   rest  KV cache: what {share:g} of the GPU leaves beside weights and vLLM's buffers"
    if config.rollout.kv_cache_memory_bytes is not None:
        return f"{gb(plan.kv_cache)}  KV cache, as rollout.kv_cache_memory_bytes says"
    fitted = "; less where the GPU has less" if on_gpu else ""
    return f"{gb(plan.kv_cache)}  KV cache: {sequences:,} sequences of {length:,} tokens{fitted}"


def training_line(plan: MemoryPlan) -> str:
    """The peak of every mode that training may take."""
    peaks = ", ".join(f"{mode} {peak / 1e9:.2f}" for mode, peak in plan.peaks.items())
    return f'gradient_checkpointing = "{plan.gradient_checkpointing}": {peaks}'


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
