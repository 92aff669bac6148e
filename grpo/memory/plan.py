"""The memory of a run by arithmetic, before anything is loaded: weights, KV cache, adapter, sampling, training.

Whether a GPU is large enough for it, and how large the KV cache may be, is decided in `fit.py`. The formulas of a
training step are in `activations.py`, the words of a dry run in `summary.py`; neither torch nor transformers is
imported in any of them. What the CUDA context and libraries take outside of torch is in none of the figures here. GB is
10^9 bytes. Nothing here allocates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.config.schema import Config, Lora
from grpo.kernels.sizes import RANK_MULTIPLE
from grpo.memory.activations import TrainingMemory, moment_bytes
from grpo.memory.full_finetuning import chosen_form, gradient_bytes, state_bytes
from grpo.memory.kv_groups import KeyPool
from grpo.memory.layer_sizes import has_wide_stream
from grpo.memory.states import has_states, pages
from grpo.memory.tower import TowerSizes, images_plan
from grpo.model.adapter_config import takes_from_base
from grpo.model.adapter_layers import adapted_experts, adapted_layers
from grpo.model.attention_layers import attention_layers
from grpo.model.expert_sizes import COUNTS, MATRICES, expert_sizes
from grpo.model.families.table import family_of
from grpo.model.layout import fused_linears
from grpo.model.quantization import stated
from grpo.model.sizes import (
    AUTO_SHARE,
    eight_bit_bytes,
    embedding_bytes,
    layer_embedding_bytes,
    linear_shapes,
    nf4_bytes,
    pinned_bytes,
    runs_of,
    stored_block,
    weights_on_host,
)

CPU_BLOCK, GPU_BLOCK = 32, 16
"""Tokens in a block of the KV cache. vLLM's default of 128 on a CPU shares no prefix of a short prompt."""
VLLM_BUFFERS = 1 << 30
"""Bytes set aside for vLLM beside a share of the GPU that the configuration sets."""
VLLM_KEEPS = 400 << 20
"""Bytes that vLLM keeps: inputs of a step, the rotary table, workspaces of products, pools of CUDA graphs."""
BATCHED_TOKENS = 8192
"""Tokens that vLLM computes at once at the most, unless one sequence is longer."""
SAMPLER_BYTES = 28
"""Per logit of every sequence decoded at once, when vLLM tries its own sampler at its start: the logit in 16 bit and in
float32, sorted with its int64 place, its probability, the running sum, a mask."""
STATES_KEPT = 1
"""States of a layer that vLLM keeps of a sequence."""
MARGIN = 0.03
"""Share of the free memory that the allocator loses to fragments."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, under transformers' names."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    quantization_config: Mapping[str, Any] | None = field(default=None, hash=False)
    """How the checkpoint's weights are quantised."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Shape:
        """From the entries of a config.json. Raises KeyError for a model without the usual sizes."""
        stored = stated(values)
        values = {key: value for key, value in (values.get("text_config") or values).items() if value is not None}
        heads = values["num_attention_heads"]
        return cls(
            model_type=family_of(values["model_type"]).text_as or values["model_type"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=values.get("num_key_value_heads") or heads,
            head_dim=values.get("head_dim") or values["hidden_size"] // heads,
            vocab_size=values["vocab_size"],
            tie_word_embeddings=values.get("tie_word_embeddings", values["model_type"].startswith("gemma")),
            num_experts=next((count for key in COUNTS if (count := values.get(key))), 0),
            num_experts_per_tok=values.get("num_experts_per_tok") or 0,
            moe_intermediate_size=values.get("moe_intermediate_size") or 0,
            decoder_sparse_step=values.get("decoder_sparse_step") or 1,
            mlp_only_layers=tuple(values.get("mlp_only_layers") or ()),
            quantization_config=stored or None,
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run takes, by what takes them."""

    weights: int
    adapter: int
    """Values, gradients and moments in training, and the copy that vLLM reads."""
    kv_cache: int
    """For every sequence of `max_num_seqs` at its full length, unless the configuration sets it."""
    kv_one_sequence: int
    kv_spare: int
    """Of either, the blocks that no sequence is counted for."""
    vllm: int
    """What vLLM keeps beside weights and KV cache."""
    sampling: int
    """What a step of vLLM takes on top, and gives back."""
    peaks: dict[str, int]
    """What training takes on top for its largest micro-batch, and gives back, by mode of gradient checkpointing."""
    logits: int
    """The part of every peak that is logits, where the head is that peak."""
    gradient_checkpointing: str
    release_kv_cache: bool = False
    host: int = 0
    """Pinned host memory for what the GPU reads in place, or between uses; in none of the other figures."""
    tower: int = 0
    """The vision tower, unless it is in host memory."""
    images: int = 0
    """Embeddings of images, kept for sampling and training, and vLLM's buffers for them."""

    @property
    def mode(self) -> str:
        """The mode of checkpointing that is set, or the least demanding one where it is chosen."""
        chosen = self.gradient_checkpointing
        return min(self.peaks, key=self.peaks.__getitem__) if chosen == "auto" else chosen

    @property
    def training(self) -> int:
        """What a training step takes, at the least."""
        return self.peaks.get(self.mode, self.peaks["none"])

    @property
    def always(self) -> int:
        """What stays, besides the KV cache."""
        return self.weights + self.adapter + self.vllm + self.tower + self.images

    def peak(self, kv_cache: int, mode: str | None = None) -> int:
        """Most bytes at once with a KV cache of so many, training in `mode` or in `self.mode`. Sampling and training
        take turns; the KV cache stays during training, unless it is released."""
        training = self.training if mode is None else self.peaks[mode]
        if self.release_kv_cache:
            return self.always + max(kv_cache + self.sampling, training)
        return self.always + kv_cache + max(self.sampling, training)

    def room_for_kv(self, usable: int, mode: str, share: float = 1.0) -> int:
        """The largest KV cache with which `usable` bytes suffice, where training in `mode` may fill `share` of what it
        has; below 0 where they do not."""
        training = int(self.peaks[mode] / share)
        if self.release_kv_cache:
            return usable - self.always - self.sampling if self.always + training <= usable else -1
        return usable - self.always - max(self.sampling, training)


# What it takes


def plan_memory(
    config: Config, shape: Any, itemsize: int, *, on_gpu: bool, flash: bool = True, tower: TowerSizes | None = None
) -> MemoryPlan:
    """The plan for a model of `shape` (a Shape or transformers' configuration), computed in `itemsize` bytes.

    flash: as `TrainingMemory.flash`; tower: of a model whose images are read.
    """
    length, sequences = sequence_limits(config)
    block = GPU_BLOCK if on_gpu else CPU_BLOCK

    def kv(count: int) -> int:
        return kv_cache_bytes(shape, itemsize, config.rollout.kv_cache_dtype, length, count, block)

    training = TrainingMemory.of(config, shape, itemsize, on_gpu=on_gpu, flash=flash)
    seen = images_plan(config, tower, itemsize, on_gpu=on_gpu)
    return MemoryPlan(
        weights=weight_bytes(config, shape, itemsize, on_gpu=on_gpu),
        adapter=adapter_bytes(config, shape, itemsize, on_gpu=on_gpu),
        kv_cache=config.rollout.kv_cache_memory_bytes or kv(sequences),
        kv_one_sequence=kv(1),
        kv_spare=kv(0),
        vllm=VLLM_KEEPS if on_gpu else 0,
        sampling=max(sampling_bytes(shape, itemsize, length, sequences), seen.encoding),
        peaks={mode: training.peak(mode) + seen.training for mode in training.modes},
        logits=training.logits(),
        gradient_checkpointing=str(config.train.gradient_checkpointing),
        release_kv_cache=config.rollout.release_kv_cache and on_gpu,
        host=len(hosted(config, shape, on_gpu=on_gpu)) * pinned_bytes(embedding_bytes(shape, itemsize)) + seen.host,
        tower=seen.tower,
        images=seen.kept,
    )


def sequence_limits(config: Config) -> tuple[int, int]:
    """(longest sequence in tokens, sequences decoded at once) that vLLM is started with."""
    rollout = config.rollout
    evaluated = rollout.max_prompt_length + (config.eval.max_completion_length or 0)
    return max(config.max_seq_length, evaluated), rollout.max_num_seqs or min(config.completions_per_step, 256)


def weight_bytes(config: Config, shape: Any, itemsize: int, *, on_gpu: bool) -> int:
    """The one copy on the device: codes with their scales (on a GPU), the rest in `itemsize` bytes."""
    in_16bit, packed = config.model.keep_16bit, on_gpu and config.model.quantized
    if packed and config.model.load_in_8bit:
        return eight_bit_weights(config, shape, itemsize) + plain_bytes(config, shape, itemsize, on_gpu=on_gpu)
    size = 0.0
    for name, (rows, columns) in linear_shapes(shape).items():
        dense = rows * columns * itemsize
        nf4 = nf4_bytes(rows, columns, itemsize)
        if not packed or (in_16bit != "auto" and is_named(name, in_16bit)):
            size += dense
        else:
            size += AUTO_SHARE * dense + (1 - AUTO_SHARE) * nf4 if in_16bit == "auto" else nf4
    size += expert_bytes(shape, itemsize, packed=packed)
    return int(size) + plain_bytes(config, shape, itemsize, on_gpu=on_gpu)


def eight_bit_weights(config: Config, shape: Any, itemsize: int) -> int:
    """The linear layers in 8 bit, and those that `keep_16bit` names."""
    shapes, block, size = linear_shapes(shape), stored_block(shape), 0
    for parts in fused_linears(shape).values():
        for kept, run in runs_of(parts, lambda part: is_named(part, config.model.keep_16bit)):
            sizes = [shapes[part] for part in run]
            size += itemsize * sum(map(math.prod, sizes)) if kept else eight_bit_bytes(sizes, block)
    return size


def is_named(part: str, endings: Sequence[str]) -> bool:
    """Whether one of `endings` is the module name `part` or an ending of it."""
    return any(part == name or part.endswith(f".{name}") for name in endings)


def plain_bytes(config: Config, shape: Any, itemsize: int, *, on_gpu: bool) -> int:
    """Everything but linear layers and experts, on the device."""
    tables = 1 if shape.tie_word_embeddings else 2
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size
    plain = tables * embedding_bytes(shape, itemsize) + layer_embedding_bytes(shape, itemsize) + norms * itemsize
    return plain - host_weight_bytes(config, shape, itemsize, on_gpu=on_gpu)


def expert_bytes(shape: Any, itemsize: int, *, packed: bool) -> int:
    """All experts, in 4 bit (NF4 and MXFP4 take the same) or in `itemsize` bytes, their biases, and their routers."""
    sizes = expert_sizes(shape)
    if sizes is None:
        return 0
    matrices = sum(
        nf4_bytes(rows, columns, itemsize) if packed else rows * columns * itemsize for rows, columns in sizes.matrices
    )
    biases = 2 * sizes.inner + sizes.hidden + 1 if family_of(shape.model_type).expert_biases else 0
    return sizes.layers * (matrices + sizes.experts * (sizes.hidden + biases) * itemsize)


def host_weight_bytes(config: Config, shape: Any, itemsize: int, *, on_gpu: bool) -> int:
    """What of the one copy is in host memory while the rest is on a GPU."""
    return len(hosted(config, shape, on_gpu=on_gpu)) * embedding_bytes(shape, itemsize)


def hosted(config: Config, shape: Any, *, on_gpu: bool) -> dict[str, str]:
    """What `weights_on_host` gives where there is a GPU; nothing elsewhere, all memory being the host's."""
    wanted = weights_on_host(config.model, shape)
    return wanted if on_gpu else {}


def adapter_bytes(config: Config, shape: Any, itemsize: int, *, on_gpu: bool) -> int:
    """What is trained: float32 values and gradients, AdamW's moments, the engine's stacked copy, and the KL reference's
    values. Without an adapter, what there is beside the weights themselves: `weight_update_bytes`."""
    if config.model.full_finetuning:
        return weight_update_bytes(config, shape, itemsize, on_gpu=on_gpu)
    sizes, adapters = linear_shapes(shape), adapted_layers(shape, config.lora)
    trained = sum(adapter.rank * sum(sizes[part]) for part, adapter in adapters.items())
    engine = 0
    for parts in fused_linears(shape).values():
        # B of a fused layer has a row for every output and a column for every part's rank.
        ranks = sum(adapters[part].rank for part in parts if part in adapters)
        ranks = -(-ranks // RANK_MULTIPLE) * RANK_MULTIPLE
        engine += ranks * (sizes[parts[0]][1] + sum(sizes[part][0] for part in parts))
    trained, engine = trained + experts_adapter(shape, config.lora), engine + experts_adapter(shape, config.lora, 16)
    has_reference = config.loss.beta > 0 and config.loss.reference == "start" and config.lora.init is not None
    kept = has_reference + takes_from_base(config.lora.init_lora_weights)  # the reference's values; the first ones
    return trained * (4 + 4 + 4 * kept + moment_bytes(config.train.optim, on_gpu=on_gpu)) + engine * itemsize


def weight_update_bytes(config: Config, shape: Any, itemsize: int, *, on_gpu: bool) -> int:
    """Gradients of all weights, what the optimiser keeps of them, and the frozen copy that a KL penalty needs."""
    form, numbers = chosen_form(config), plain_bytes(config, shape, 1, on_gpu=on_gpu)
    numbers += sum(map(math.prod, linear_shapes(shape).values()))
    state = state_bytes(form, config.train.optim, itemsize, on_gpu=on_gpu)
    reference = 0
    if config.loss.beta > 0:
        reference = weight_bytes(frozen_config(config), shape, itemsize, on_gpu=on_gpu)
    return int(numbers * (state + gradient_bytes(form, itemsize))) + reference


def frozen_config(config: Config) -> Config:
    """`config` with the model as the reference of a KL penalty holds it beside one whose weights are trained."""
    storage = config.loss.reference_storage
    held = {"load_in_8bit": storage == "8bit", "load_in_4bit": storage == "4bit", "full_finetuning": False}
    return config.model_copy(update={"model": config.model.model_copy(update=held)})


def kv_bytes_per_token(shape: Any, itemsize: int, kv_cache_dtype: str) -> int:
    """Bytes that one token takes in the KV cache over all layers that have keys of their own."""
    layers = attention_layers(shape).items()
    own = sum(layer.elements_per_token for number, layer in layers if layer.keys_of == number)
    return own * (1 if kv_cache_dtype == "fp8" else itemsize)


def experts_adapter(shape: Any, lora: Lora, multiple: int = 1) -> int:
    """Numbers in the factors of adapters on experts, their ranks rounded up to a power of two of at least `multiple`
    where that is above 1."""
    sizes, total = expert_sizes(shape), 0
    for name, adapter in adapted_experts(shape, lora).items():
        assert sizes is not None
        rows, columns = sizes.matrices[name.endswith(MATRICES[1])]
        rank = adapter.rank if multiple == 1 else max(multiple, 1 << (adapter.rank - 1).bit_length())
        total += rank * (rows + sizes.experts * columns)
    return total


def layer_token_bytes(shape: Any, itemsize: int, kv_cache_dtype: str) -> int:
    """Bytes that the keys and values of one token take in the layer with the most."""
    most = max(layer.elements_per_token for layer in attention_layers(shape).values())
    return most * (1 if kv_cache_dtype == "fp8" else itemsize)


def kv_cache_bytes(shape: Any, itemsize: int, kv_cache_dtype: str, length: int, sequences: int, block: int) -> int:
    """KV cache in which `sequences` reach `length` tokens, in whole blocks, with two to spare."""
    if not has_states(shape):
        pool = KeyPool.of(shape, 1 if kv_cache_dtype == "fp8" else itemsize, block)
        return (pool.blocks(length, max(BATCHED_TOKENS, length)) * sequences + 2) * pool.block_bytes
    page = pages(shape, itemsize, layer_token_bytes(shape, itemsize, kv_cache_dtype), block)
    return (page.blocks(length, STATES_KEPT) * sequences + 2) * page.size


def sampling_bytes(shape: Any, itemsize: int, length: int, sequences: int) -> int:
    """What one step of vLLM takes and gives back: the MLP of a full prefill (the hidden state, the residual, their
    norm, gate, up and their product), or the logits of all sequences."""
    tokens, sizes = max(BATCHED_TOKENS, length), expert_sizes(shape)
    residual = max(4, itemsize) if has_wide_stream(shape) else itemsize
    hidden = tokens * shape.hidden_size * (2 * itemsize + residual)
    prefill = hidden + tokens * 3 * shape.intermediate_size * itemsize
    if sizes is not None:  # every token's rows twice, gate and up and their product, and the dequantised matrices
        rows = tokens * sizes.chosen * (2 * sizes.hidden + 3 * sizes.inner) + sizes.matrices[0][0] * sizes.hidden
        prefill = max(prefill, hidden + rows * itemsize)
    return max(prefill, SAMPLER_BYTES * sequences * shape.vocab_size)
