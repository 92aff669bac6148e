"""How long a step takes on a GPU, predicted: bytes and products over what of a GPU's speeds this project reaches.

The shares are those of committed results: decoding, of benchmarks/results/nf4_as_sm80.json, nf4_as_sm75.json and the
rollouts on an H200; training, of whole_step.json. Nothing was measured on the other GPUs: what comes out says which of
two plans is faster, and roughly how fast. Completions are taken at their full length. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from grpo.config.schema import Config
from grpo.memory.gpus import Gpu
from grpo.model.attention_layers import attention_layers
from grpo.model.sizes import eight_bit_bytes, linear_shapes, mlp_widths, nf4_bytes, stored_block

COPY_SHARE = 0.85
"""Of the bandwidth that a maker states, what a copy reaches."""
PACKED_SHARE = 0.50
"""Of a copy's speed, at which 4-bit weights are read and multiplied with up to 16 rows."""
PRODUCT_SHARE, PRODUCT_SHARE_TURING = 0.37, 0.11
"""Of the 16-bit products, where rows make the fused product wait for them."""
DENSE_SHARE = 0.6
"""The same of cuBLAS."""
TRAIN_SHARE = 0.42
"""Of the 16-bit products in training, everything between them included."""
LAYER_SECONDS = 80e-6
"""Of a decoding step for each layer, whatever the batch: attention, norms, small launches."""
AGAIN_SHARE = 0.6
"""What of a forward pass's time computing it again takes, of train_step_8b.json."""
BUS, BUS_WAITS = 12e9, 0.3
"""Bytes a second between host and GPU, and the share of a copy's time that nothing hides (both assumed)."""


@dataclass(frozen=True)
class Work:
    """A model's sizes as they take time."""

    linear: int
    """Weights of all linear layers."""
    gate_up: int
    linear_bytes: float
    head: int
    layers: int
    hidden: int
    query: int
    kv_token: int
    """Bytes of a token in the KV cache."""
    itemsize: int
    packed: bool

    @classmethod
    def of(cls, config: Config, shape: Any, itemsize: int) -> Work:
        sizes = linear_shapes(shape)
        attention = attention_layers(shape)
        inner = mlp_widths(shape)
        linear = sum(rows * columns for rows, columns in sizes.values())
        packed = config.model.quantized
        kv_item = 1 if config.rollout.kv_cache_dtype == "fp8" else itemsize
        return cls(
            linear=linear,
            gate_up=2 * shape.hidden_size * shape.num_hidden_layers * sum(inner) // len(inner),
            linear_bytes=stored_bytes(config, shape, itemsize),
            head=shape.vocab_size * shape.hidden_size,
            layers=shape.num_hidden_layers,
            hidden=shape.hidden_size,
            query=sum(layer.query_heads * layer.head_size for layer in attention.values()) // len(attention),
            kv_token=sum(layer.elements_per_token for n, layer in attention.items() if layer.keys_of == n) * kv_item,
            itemsize=itemsize,
            packed=packed,
        )


def stored_bytes(config: Config, shape: Any, itemsize: int) -> float:
    """The linear layers as they are held."""
    sizes = linear_shapes(shape).values()
    if config.model.load_in_8bit:
        return sum(eight_bit_bytes([size], stored_block(shape)) for size in sizes)
    if config.model.load_in_4bit:
        return sum(nf4_bytes(*size, itemsize) for size in sizes)
    return sum(map(math.prod, sizes)) * itemsize


def decode_seconds(work: Work, gpu: Gpu, sequences: int, context: float) -> float:
    """One token for each of `sequences`, which have `context` tokens each."""
    copy = COPY_SHARE * gpu.bandwidth
    products = 2.0 * work.linear * sequences
    dense = products / (DENSE_SHARE * gpu.flops)
    if work.packed:
        share = PRODUCT_SHARE if gpu.architecture >= 80 else PRODUCT_SHARE_TURING
        fused = max(work.linear_bytes / (PACKED_SHARE * copy), products / (share * gpu.flops))
        linear = min(fused, (work.linear_bytes + 2 * work.linear * work.itemsize) / copy + dense)
    else:
        linear = max(work.linear_bytes / copy, dense)
    head = max(work.head * work.itemsize / copy, 2.0 * work.head * sequences / (DENSE_SHARE * gpu.flops))
    return linear + head + sequences * context * work.kv_token / copy + work.layers * LAYER_SECONDS


def rollout_seconds(config: Config, work: Work, gpu: Gpu, sequences: int) -> float:
    """All completions of a step with so many decoded at once, their prompts computed once."""
    rollout, count = config.rollout, config.completions_per_step
    at_once = min(sequences, count)
    context = rollout.max_prompt_length + rollout.max_completion_length / 2
    steps = rollout.max_completion_length * max(1.0, count / at_once)
    prompts = rollout.prompts_per_step * rollout.max_prompt_length
    return steps * decode_seconds(work, gpu, at_once, context) + 2.0 * work.linear * prompts / (TRAIN_SHARE * gpu.flops)


def training_seconds(config: Config, work: Work, gpu: Gpu, mode: str) -> float:
    """The forward and backward passes over a step's completions and their shared prompts."""
    rollout = config.rollout
    completed = config.completions_per_step * rollout.max_completion_length
    tokens = completed + rollout.prompts_per_step * rollout.max_prompt_length
    length = rollout.max_prompt_length + rollout.max_completion_length
    return config.train.num_iterations * pass_seconds(
        work, gpu, mode, tokens, length, config.train.tokens_per_micro_batch, predicted=completed
    )


def pass_seconds(
    work: Work, gpu: Gpu, mode: str, tokens: int, length: int, micro_batch: int, *, predicted: int
) -> float:
    """Forward and backward of `tokens` in sequences of `length`, `predicted` of them scored, in micro-batches."""
    again = {"none": 0, "mlp": work.gate_up}.get(mode, work.linear)
    attention = 2.0 * work.query * length * work.layers  # two products, half of the pairs
    attention *= 3.5 + AGAIN_SHARE * (mode in ("layer", "offload"))
    products = tokens * (4.0 * work.linear + 2.0 * AGAIN_SHARE * again + attention)
    products += 4.0 * work.head * predicted
    passes = 2 + (mode != "none")
    dequantised = passes * (work.linear_bytes + 2 * work.linear * work.itemsize) if work.packed else 0.0
    batches = math.ceil(tokens / micro_batch)
    seconds = products / (TRAIN_SHARE * gpu.flops) + batches * dequantised / (COPY_SHARE * gpu.bandwidth)
    moved = 2.0 * tokens * work.hidden * work.itemsize * work.layers if mode == "offload" else 0.0
    return max(seconds + BUS_WAITS * moved / BUS, moved / BUS)
