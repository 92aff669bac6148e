"""Every launch of every kernel with a model's real shapes, compiled for a card that is not there.

Tensors are torch's fake ones that call themselves tensors of a GPU, so the kernels' own host functions choose tiles,
strides and specialisations as they would; Triton compiles for the card's architecture and runs nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from grpo.kernels import (
    cards,
    decode_attention,
    delta_rule,
    delta_step,
    dense_gemm,
    eight_bit,
    eight_bit_gemm,
    expert_rows,
    gated_norm,
    glu,
    logprob,
    lora_factors,
    lora_shrink,
    lora_sum,
    mxfp4,
    nf4,
    nf4_experts,
    nf4_gemm,
    nf4_plans,
    nf4_tiles,
    nf4_turing,
    recurrence,
    residual_norm,
    rms_norm,
    rope,
    routing,
    sample,
    shared_keys,
    short_conv,
)
from grpo.kernels.cards import MB, SHARED_MEMORY, Card
from grpo.kernels.experts import ExpertAdapter, ExpertAdapters, ExpertMatrix, Experts
from grpo.kernels.lora_factors import Adapter, LowRank
from grpo.kernels.nf4_lookup import CODE, byte_tables
from grpo.kernels.pretended import pretended as pretend
from tests.helpers.paths import ROOT

MODULES = (
    decode_attention, dense_gemm, eight_bit, eight_bit_gemm, glu, logprob, lora_factors, lora_shrink, lora_sum, nf4,
    nf4_gemm, nf4_turing, residual_norm, rms_norm, rope, sample, shared_keys,
)  # fmt: skip
EXPERT_MODULES = expert_rows, mxfp4, nf4_experts, routing
"""Those that mixtures of experts launch beside them."""
RECURRENT_MODULES = delta_rule, delta_step, gated_norm, short_conv
"""Those of layers with a state."""
CARDS = (
    Card("Tesla T4", 75, SHARED_MEMORY[75], 40, 4 * MB),
    Card("NVIDIA A100-SXM4-80GB", 80, SHARED_MEMORY[80], 108, 40 * MB),
    Card("NVIDIA GeForce RTX 3090", 86, SHARED_MEMORY[86], 82, 6 * MB),
    Card("NVIDIA GeForce RTX 4090", 89, SHARED_MEMORY[89], 128, 72 * MB),
    Card("NVIDIA H100 80GB HBM3", 90, SHARED_MEMORY[90], 132, 50 * MB),
    Card("NVIDIA B200", 100, SHARED_MEMORY[100], 148, 126 * MB),
    Card("NVIDIA GeForce RTX 5090", 120, SHARED_MEMORY[120], 170, 96 * MB),
)
"""One of every architecture that is served."""
BY_NAME = {f"sm_{card.architecture}": card for card in CARDS}
SPILLS = json.loads((ROOT / "tests" / "data" / "kernel_spills.json").read_text())
"""Kernel -> bytes of local memory a thread may have; 0 for those that are not named."""
DECODING = (1, 16, 17, 40, 128, 200, 512)
"""Numbers of sequences that decode together: whole tiles and ragged ones."""
EIGHT_BIT_ROWS = (1, 17, 128, 200)
"""The same for products with 8-bit weights, whose tiles are few."""
TOKENS = 1000
"""Of a training micro-batch."""


@dataclass(frozen=True)
class Shape:
    """A model, as far as kernels see it."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head: int
    vocabulary: int
    bias: bool = False
    activation: str = "silu"
    unit_offset: bool = False
    head_norms: bool = False
    softcap: float | None = None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Fused layer -> (rows of W, columns)."""
        queries = self.heads * self.head
        return {
            "qkv": (queries + 2 * self.key_value_heads * self.head, self.hidden),
            "o": (self.hidden, queries),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


MODELS = {
    "SmolLM2-135M": Shape(576, 1536, 9, 3, 64, 49152),
    "Qwen2.5-3B": Shape(2048, 11008, 16, 2, 128, 151936, bias=True),
    "Llama-3.1-8B": Shape(4096, 14336, 32, 8, 128, 128256),
    "Gemma-3-4B": Shape(2560, 10240, 8, 4, 256, 262208, activation="gelu_tanh", unit_offset=True, head_norms=True),
    "Phi-4": Shape(5120, 17920, 40, 10, 128, 100352),
}


@dataclass
class Collected:
    """What was compiled: (kernel, shared memory in bytes, bytes a thread keeps in memory for want of registers)."""

    kernels: list[tuple[str, int, int]] = field(default_factory=list)

    def add(self, name: str, binary: bytes, shared: int) -> None:
        self.kernels.append((name, shared, stack_bytes(binary)))

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.kernels}

    def most_spilled(self) -> dict[str, int]:
        return {name: max(stack for other, _, stack in self.kernels if other == name) for name in sorted(self.names)}


def stack_bytes(binary: bytes) -> int:
    """Local memory that a thread of this kernel has."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1])


def kernels_of(module: Any) -> dict[str, JITFunction]:
    """The kernels that a module launches."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }


def hold(card: Card, collected: Collected) -> None:
    """The card's limits."""
    assert collected.kernels
    over = [(name, shared) for name, shared, _ in collected.kernels if shared > card.shared_memory]
    assert not over, f"{card.name} gives a block {card.shared_memory} bytes"
    spilled = {name: stack for name, stack in collected.most_spilled().items() if stack > SPILLS.get(name, 0)}
    assert not spilled, f"on {card.name} registers do not suffice: {spilled} bytes"


@contextlib.contextmanager
def pretended(card: Card) -> Iterator[Collected]:
    """kernels/pretended.py's `card`, without plans that were added; yields what launches compile."""
    collected = Collected()
    for dtype in (torch.bfloat16, torch.float16):
        byte_tables(dtype, CODE)
        byte_tables(dtype, mxfp4.VALUES)
    with (
        patch.object(nf4_plans, "_added", {}),
        patch.object(routing, "_counters", {}),
        pretend(card, collected.add),
    ):
        forget(card.architecture)
        try:
            yield collected
        finally:
            forget(card.architecture)  # while Triton has a driver to unload them with


def forget(architecture: int) -> None:
    """Let go of what was compiled, so that it is compiled, or found on disk, and reported again."""
    for kernel in (
        kernel for module in (*MODULES, *EXPERT_MODULES, *RECURRENT_MODULES) for kernel in kernels_of(module).values()
    ):
        kernel.device_caches.pop(architecture, None)


def dtypes(card: Card) -> tuple[torch.dtype, ...]:
    """The 16-bit types that the card multiplies."""
    return (torch.float16,) if card.architecture < 80 else (torch.bfloat16, torch.float16)


# Launches: each function makes those of one kernel or of a few, for a model's shape


def adapter(rows: int, features: int, ranks: int, dtype: torch.dtype) -> LowRank:
    return LowRank(torch.empty(rows, ranks, dtype=dtype), torch.empty(features, ranks, dtype=dtype))


def packed_weights(shape: Shape, dtype: torch.dtype) -> None:
    for rows, columns in shape.linears.values():
        packed, absmax = nf4.allocate(rows, columns, dtype, "cpu")
        for stored in (dtype, torch.float32):
            nf4.quantize_rows(packed, absmax, 0, torch.empty(rows, columns, dtype=stored))
        nf4.dequantize(packed, absmax)


def packed_products(shape: Shape, dtype: torch.dtype) -> None:
    for name, (features, columns) in shape.linears.items():
        packed, absmax = nf4.allocate(features, columns, dtype, "cpu")
        bias = torch.empty(features, dtype=dtype) if shape.bias and name == "qkv" else None
        for rows in DECODING:
            x = torch.empty(rows, columns, dtype=dtype)
            nf4_gemm.nf4_linear(x, packed, absmax, bias)
            for pending in {False, cards.card(x.device).overlaps}:
                low_rank = adapter(rows, features, 48 if name == "qkv" else 16, dtype)
                nf4_gemm.nf4_linear(x, packed, absmax, bias, low_rank=replace(low_rank, pending=pending))


def eight_bit_products(shape: Shape, dtype: torch.dtype) -> None:
    """int8 with a scale a row, and FP8 with one for blocks of 128 x 128 rather than for parts of them."""
    for name, (features, columns) in shape.linears.items():
        bias = torch.empty(features, dtype=dtype) if shape.bias and name == "qkv" else None
        shared = math.gcd(features, 128)
        for codes, scales in (
            (torch.empty(features, columns, dtype=torch.int8), torch.empty(features, 1)),
            (
                torch.empty(features, columns, dtype=torch.float8_e4m3fn),
                torch.empty(features // shared, -(-columns // 128)),
            ),
        ):
            eight_bit.dequantize(codes, scales, dtype)
            for rows in EIGHT_BIT_ROWS:
                x = torch.empty(rows, columns, dtype=dtype)
                low_rank = adapter(rows, features, 48 if name == "qkv" else 16, dtype)
                eight_bit_gemm.eight_bit_linear(x, codes, scales, bias, None, low_rank)


def dense_products(shape: Shape, dtype: torch.dtype) -> None:
    for name, (features, columns) in shape.linears.items():
        weight = torch.empty(features, columns, dtype=dtype)
        bias = torch.empty(features, dtype=dtype) if shape.bias and name == "qkv" else None
        for rows in DECODING:
            low_rank = adapter(rows, features, 48 if name == "qkv" else 16, dtype)
            lora_sum.dense_linear(torch.empty(rows, columns, dtype=dtype), weight, bias, low_rank)


def shrinks(shape: Shape, dtype: torch.dtype) -> None:
    scale = torch.empty(1, dtype=dtype)
    for _, columns in shape.linears.values():
        for rows in DECODING:
            for ranks in (16, 48, 64):
                x, a = torch.empty(rows, columns, dtype=dtype), torch.empty(ranks, columns, dtype=dtype)
                lora_shrink.lora_shrink(x, a, scale, overlapped=cards.card(x.device).overlaps)


def factors(shape: Shape, dtype: torch.dtype) -> None:
    queries, pairs = shape.heads * shape.head, shape.key_value_heads * shape.head
    for parts in ((queries, pairs, pairs), (shape.intermediate, shape.intermediate), (shape.hidden,)):
        firsts = [sum(parts[:index]) for index in range(len(parts))]
        adapters = [Adapter(first, rows, 2.0) for first, rows in zip(firsts, parts, strict=True)]
        made = [torch.empty(size) for rows in parts for size in ((16, shape.hidden), (rows, 16))]
        width = 16 * len(parts)
        down, up = torch.empty(width, shape.hidden, dtype=dtype), torch.empty(sum(parts), width, dtype=dtype)
        lora_factors.pack_lora(adapters, made, down, up)


def heads_of(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """Queries and keys [tokens, heads, dim] where they lie in the fused projection's output."""
    rows = torch.empty(TOKENS, shape.linears["qkv"][0], dtype=dtype)
    queries, pairs = shape.heads * shape.head, shape.key_value_heads * shape.head
    return [part.unflatten(1, (-1, shape.head)) for part in rows.split([queries, pairs, pairs], 1)[:2]]


def norms(shape: Shape, dtype: torch.dtype) -> None:
    wide = torch.empty(TOKENS, shape.hidden, dtype=dtype)
    for x in (wide, *(heads_of(shape, dtype) if shape.head_norms else ())):
        norm = rms_norm.Norm(torch.empty(x.shape[-1], dtype=dtype), 1e-6, shape.unit_offset)
        norm.forward(x)
        if x.ndim == 2:
            rows = x[:40]
            residual_norm.launch(rows, torch.empty_like(rows), norm.weight, 1e-6)
            for stream in (torch.empty_like(rows), torch.empty_like(rows, dtype=torch.float32)):
                residual_norm.add_to_stream(rows, stream, norm.weight, 1e-6, unit_offset=shape.unit_offset)
            wide_x = torch.empty_like(x, dtype=torch.float32)
            norm.forward(wide_x)
            norm.backward(torch.empty_like(x), wide_x)
        for plus in (None, torch.empty_like(x)):
            norm.backward(torch.empty_like(x), x, plus)


def rotations(shape: Shape, dtype: torch.dtype) -> None:
    cos, sin = (torch.empty(TOKENS, shape.head, dtype=torch.float32) for _ in range(2))
    for x in heads_of(shape, dtype):
        for inverse in (False, True):
            rope.rotate(x, cos, sin, inverse=inverse)


def gated_units(shape: Shape, dtype: torch.dtype) -> None:
    gate_up = torch.empty(TOKENS, 2 * shape.intermediate, dtype=dtype)
    product = glu.glu_forward(gate_up, shape.activation)
    glu.launch_forward(gate_up, shape.activation, product, overlapped=cards.card(gate_up.device).overlaps)
    glu.glu_backward(torch.empty_like(product), gate_up, shape.activation, product, torch.empty_like(gate_up))


def logprobs(shape: Shape, dtype: torch.dtype) -> None:
    logits, targets = torch.empty(256, shape.vocabulary, dtype=dtype), torch.empty(256, dtype=torch.int64)
    for gradient, entropy in ((False, None), (True, None), (True, torch.empty_like(logits))):
        logprob.softmax_stats_(logits, targets, 0.9, shape.softcap, gradient=gradient, entropy_gradient=entropy)


def samples(shape: Shape, dtype: torch.dtype) -> None:
    for kind in (torch.float32, dtype):
        sample.sample_tokens(torch.empty(16, shape.vocabulary, dtype=kind), torch.empty(16), 3)


def decoding_attention(shape: Shape, dtype: torch.dtype) -> None:
    """Of sequences of one chunk and of several, with and without the new token."""
    if not cards.card(torch.device("cuda")).dot_is_fast:
        return  # FlashAttention, whose place it takes, is not there either
    if not decode_attention.serves(shape.heads, shape.key_value_heads, shape.head, dtype, dtype):
        return
    parts = shape.heads, shape.key_value_heads, shape.key_value_heads
    projected = torch.empty(40, sum(parts), shape.head, dtype=dtype)
    query, keys, values = projected.split(parts, 1)
    held = torch.empty(64, 16, shape.key_value_heads, 2 * shape.head, dtype=dtype).split(shape.head, -1)
    new = decode_attention.NewToken(keys, values, torch.empty(1024, shape.head, dtype=dtype))
    for pages in (30, 512):
        places = torch.empty(40, pages, dtype=torch.int32), torch.empty(40, dtype=torch.int32)
        for given in (None, new):
            decode_attention.launch_decode(
                query, decode_attention.Cache(*held, *places), 1.0, torch.empty(query.shape, dtype=dtype), given,
                decode_attention.cut_for(40 * shape.key_value_heads, 1, shape.head, cards.card(query.device)),
            )  # fmt: skip


def keys_of_prefixes(shape: Shape, dtype: torch.dtype) -> None:
    rows = torch.empty(TOKENS, shape.key_value_heads, shape.head, dtype=dtype)
    numbers = torch.empty(2 * TOKENS, dtype=torch.int64)
    places: Any = SimpleNamespace(sources=numbers, order=numbers, bounds=numbers[: TOKENS + 1])
    out = torch.empty(2, 2 * TOKENS, *rows.shape[1:], dtype=dtype)
    shared_keys.launch_copy(rows, rows, places, out)
    shared_keys.launch_sum(out[0], out[1], places, torch.empty(2, *rows.shape, dtype=dtype))


def recurrent_operators(dtype: torch.dtype) -> None:
    """Of Qwen 3.5-4B: a convolution, and the delta rule, which is in bfloat16 alone."""
    numbers, width = torch.empty(2 * TOKENS, dtype=torch.int64), torch.empty(8192, 4, dtype=dtype)
    places: Any = SimpleNamespace(
        own=numbers[:TOKENS], sources=numbers, token_at=numbers, copies=numbers[:9], copied=numbers[:3],
        counts=numbers[:3],
    )  # fmt: skip
    mixed = torch.empty(TOKENS, 8192, dtype=dtype)
    short_conv.launch_forward(mixed, width, None, places, torch.empty_like(mixed), True)
    for rows, out in ((numbers[:TOKENS], torch.empty_like(mixed)), (numbers[:12], torch.empty(12, 8192))):
        short_conv.launch_backward(mixed, mixed, width, None, places, rows, out, True)
    heads_out, of_head = torch.empty(TOKENS, 32, 128, dtype=dtype), torch.empty(128, dtype=dtype)
    gated_norm.launch_forward(heads_out, heads_out, of_head, 1e-6, heads_out)
    gated_norm.launch_backward(heads_out, heads_out, heads_out, of_head, 1e-6, heads_out, heads_out)
    if dtype != torch.bfloat16:
        return
    query, key, value = mixed.split([2048, 2048, 4096], 1)
    heads = [part.unflatten(1, (-1, 128)) for part in (query, key, value)]
    inputs = delta_rule.Inputs(*heads, torch.empty(TOKENS, 32), torch.empty(TOKENS, 32))
    of_chunks = torch.empty(20, dtype=torch.int32)
    order = recurrence.Order(torch.empty(5, 4, dtype=torch.int32), None)
    run = recurrence.Run(of_chunks, of_chunks, [order])
    made, kept = delta_rule.prepare(inputs, run, 1e-6), delta_rule.empty_kept(inputs, run)
    grad = torch.empty(TOKENS, 32, 128, dtype=dtype)
    delta_rule.along(inputs, run, made, 1e-6, torch.empty_like(grad))
    delta_rule.along(inputs, run, made, 1e-6, kept=kept)
    later = delta_rule.back(inputs, run, made, 1e-6, grad)
    delta_rule.input_grads(inputs, run, 1e-6, grad, kept, later, [torch.empty_like(part) for part in inputs])
    sampled_recurrences(mixed, width)


def sampled_recurrences(mixed: Tensor, width: Tensor) -> None:
    """The same while sampling; what vLLM's pages of it are, and the batch's."""
    dtype, numbers = mixed.dtype, torch.empty(64, dtype=torch.int32)
    conv, states = torch.empty(9, 3, 8192, dtype=dtype), torch.empty(9, 32, 128, 128)
    gates, gate = torch.empty(TOKENS, 64, dtype=dtype), torch.empty(TOKENS, 4096, dtype=dtype)
    of_heads = torch.empty(32, dtype=dtype)
    weights = delta_step.Weights(width, of_heads, of_heads, torch.empty(128, dtype=dtype), 1e-6, 1e-6, 16)
    delta_step.step(
        mixed,
        *gates.chunk(2, 1),
        gate,
        weights,
        conv,
        states,
        torch.empty(TOKENS, dtype=torch.int32),
        torch.empty_like(gate),
    )
    begun = torch.empty(5, dtype=torch.bool)
    sequences = delta_step.Sequences(numbers[:6], numbers[:40].view(20, 2), numbers[:5], begun)
    delta_step.convolve(mixed, width, conv, sequences, 64)


LAUNCHES: tuple[Callable[[Shape, torch.dtype], None], ...] = (
    packed_weights, packed_products, eight_bit_products, dense_products, shrinks, factors, norms, rotations,
    gated_units, logprobs, samples, keys_of_prefixes, decoding_attention,
)  # fmt: skip


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    activation: str = "silu"
    mxfp4: bool = False
    """With biases, as gpt-oss."""


EXPERT_MODELS = {
    "Qwen3-30B-A3B": ExpertShape(2048, 768, 128, 8),
    "gpt-oss-20b": ExpertShape(2880, 2880, 32, 4, "clamped_silu", mxfp4=True),
}


def expert_matrix(out: int, columns: int, shape: ExpertShape, dtype: torch.dtype) -> ExpertMatrix:
    if shape.mxfp4:
        weight, scales = mxfp4.allocate(shape.experts * out, columns, "cpu")
        return ExpertMatrix(weight, scales, shape.experts, torch.empty(shape.experts, out, dtype=dtype))
    return ExpertMatrix(*nf4.allocate(shape.experts * out, columns, dtype, "cpu"), shape.experts)


def expert_adapter(out: int, columns: int, shape: ExpertShape, dtype: torch.dtype) -> ExpertAdapter:
    a, b = (shape.experts, 16, columns), (shape.experts, out, 16)
    return ExpertAdapter(torch.empty(a, dtype=dtype), torch.empty(b, dtype=dtype))


def expert_layers(shape: ExpertShape, dtype: torch.dtype) -> None:
    """Decoding by the tiles that are taken first, with adapters on both matrices and without; dequantising."""
    above = expert_matrix(2 * shape.inner, shape.hidden, shape, dtype)
    below = expert_matrix(shape.hidden, shape.inner, shape, dtype)
    layer = Experts(above, below, shape.activation)
    sizes = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
    adapters = ExpertAdapters(*(expert_adapter(*size, shape, dtype) for size in sizes), torch.empty((), dtype=dtype))
    table = routing.Record(torch.empty(64, 2, shape.top_k, dtype=torch.uint8), torch.empty(512, dtype=torch.int64), 1)
    x, logits = torch.empty(40, shape.hidden, dtype=dtype), torch.empty(40, shape.experts, dtype=dtype)
    for tile, each, record in (
        (nf4_experts.FEW[0], None, None),
        (nf4_experts.FEW[0], adapters, table),
        (nf4_experts.FEW[1], adapters, table),
        (nf4_experts.MANY[0], adapters, table),
    ):
        tiles = nf4_experts.DecodeTiles(tile, tile)
        nf4_experts.decode(x, logits, layer, shape.top_k, True, each, tiles, record)
    if shape.mxfp4:
        below.dense()
    expert_rows_of_training(shape, dtype)


def expert_rows_of_training(shape: ExpertShape, dtype: torch.dtype) -> None:
    """What happens to rows between the products of a micro-batch."""
    pairs = TOKENS * shape.top_k
    rows, inner = torch.empty(pairs, shape.hidden, dtype=dtype), torch.empty(pairs, shape.inner, dtype=dtype)
    weights, order = torch.empty(TOKENS, shape.top_k, dtype=dtype), torch.empty(pairs, dtype=torch.int64)
    for each in (weights, None):
        total = expert_rows.sum_rows(rows, each, order, shape.top_k)
    expert_rows.spread_backward(total, rows, weights, order)
    gate_up = torch.empty(pairs, 2 * shape.inner, dtype=dtype)
    expert_rows.gated_backward(inner, gate_up, weights.reshape(-1), shape.activation)


def tuned_products(shape: Shape, dtype: torch.dtype, card: Card) -> None:
    """Those that a search may launch, short or thorough."""
    for features, columns in shape.linears.values():
        packed, absmax = nf4.allocate(features, columns, dtype, "cpu")
        jobs = set(nf4_tiles.shortlist(card, (features, columns)))
        jobs |= {(rows, 2, tile) for rows in nf4_tiles.ROWS for tile in nf4_tiles.candidates(card, rows)}
        for rows, split, tile in jobs:
            if nf4_tiles.fits(tile, split, rows, features):
                x, out = torch.empty(rows, columns, dtype=dtype), torch.empty(rows, features, dtype=dtype)
                nf4_gemm.launch_fused(x, packed, absmax, None, out, tile, split)
