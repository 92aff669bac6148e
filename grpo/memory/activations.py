"""Bytes that a training step takes beside what is always there: what layers keep, and the peak of each phase.

The formulas count what autograd really saves, tensor by tensor, for the layers of `fused_layers.py` ("triton") and
for transformers' own ("torch"); tests compare them with the saved tensors of tiny models. Nothing here imports torch
or allocates. Counted in tokens of one micro-batch; weights, adapter, KV cache and what vLLM needs are in `plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from grpo.config.schema import Config
from grpo.kernels.sizes import (
    CPU_BLOCK_BYTES,
    EXPERTS_BYTES,
    HEAD_SLICE_BYTES,
    MLP_TILE,
    MLP_TILES,
    QKV_TILE,
    WEIGHT_SLICE_BYTES,
    largest_tile,
)
from grpo.memory.layer_sizes import (
    DOWN,
    GATE_UP,
    MLP,
    QKV,
    LayerSizes,
    has_kernels,
    has_mlp_kernels,
    mean_of,
)
from grpo.model.expert_sizes import ExpertSizes

CHECKPOINTING_MODES = ("none", "mlp", "layer", "offload")
"""Modes of gradient checkpointing, from the fastest to the one that needs least memory on the device. "mlp", which
computes gate and up again and keeps the rest, needs the kernels, if only for the MLP."""
LIBRARIES = 36 << 20
"""Workspaces that cuBLAS takes from torch's allocator on a GPU (32 MiB on Hopper, 8 MiB before)."""
INDEXED_IN_32_BITS = 2**31 - 1
"""Bytes of the largest tensor that torch's reductions address with 32 bits."""
INDEX_BYTES = 64
"""Per token: ids, positions, targets and the like, as int64."""
FREE_SHARE = 0.95
"""Of a GPU's free memory that activations may take: the allocator loses some to fragments."""
HOST_SHARE = 0.8
"""Of the host's available memory that offloaded inputs may take."""
CPU_SHARE = 0.5
"""Of the available memory that activations on a CPU may take: other processes want some too."""


def moment_bytes(optim: str, *, on_gpu: bool) -> int:
    """Bytes per trained number that `train.optim` keeps on the device."""
    if optim == "adamw" or not on_gpu:
        return 8
    return 0 if optim.startswith("paged") else 2


def copied_keys(config: Config, tokens: int) -> int:
    """Copies of prompts' keys in a micro-batch of so many tokens, made of groups at their full length."""
    rollout = config.rollout
    group = rollout.max_prompt_length + rollout.num_generations * rollout.max_completion_length
    return tokens * rollout.num_generations * rollout.max_prompt_length // group


@dataclass(frozen=True)
class TrainingMemory:
    """One micro-batch: sizes of the model, of the batch, and of the arithmetic."""

    sizes: LayerSizes
    itemsize: int
    tokens: int
    predicted: int
    """Completion tokens among them."""
    keys: int
    """Keys that attention sees: more than `tokens` where completions share a prompt, whose keys each gets a copy of."""
    chunk: int
    """Tokens whose logits exist at once."""
    entropy_gradient: bool
    on_gpu: bool
    kernels: bool
    packed_weights: bool
    """Whether linear layers dequantise their weight at each use."""
    head_on_host: bool
    """Whether the output head is in host memory, of which slices come to the GPU."""
    flash: bool = True
    """Whether attention is flash attention's; on a GPU before Ampere it is torch's memory-efficient one."""
    mean_sizes: LayerSizes | None = None
    """Of all layers, where they differ and `sizes` are the largest's."""
    mlp_kernels: bool = False
    """Whether layers without `kernels` have them for their MLP."""

    @classmethod
    def of(
        cls, config: Config, shape: Any, itemsize: int, *, on_gpu: bool, tokens: int | None = None, flash: bool = True
    ) -> TrainingMemory:
        """Of the largest micro-batch of `config`, or of one of `tokens` tokens."""
        tokens = tokens or max(config.train.tokens_per_micro_batch, config.max_seq_length)
        lora = None if config.model.full_finetuning else config.lora
        kernels = config.train.kernels != "torch" and on_gpu and not config.lora.lora_dropout
        return cls(
            sizes=LayerSizes.of(shape, lora),
            itemsize=itemsize,
            tokens=tokens,
            predicted=tokens,
            keys=tokens + copied_keys(config, tokens),
            chunk=config.train.logprob_chunk_tokens,
            entropy_gradient=bool(config.loss.entropy_coef),
            on_gpu=on_gpu,
            kernels=kernels and has_kernels(shape),
            mlp_kernels=kernels and has_mlp_kernels(shape),
            packed_weights=config.model.quantized and on_gpu,
            head_on_host=on_gpu and config.model.offload_head,
            flash=flash,
            mean_sizes=LayerSizes.of(shape, lora, mean_of),
        )

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of CHECKPOINTING_MODES that the layers have."""
        kernels = self.kernels or self.mlp_kernels
        return CHECKPOINTING_MODES if kernels else tuple(mode for mode in CHECKPOINTING_MODES if mode != "mlp")

    # What layers keep

    def kept_by_layer(self) -> int:
        """Bytes that one layer saves, its input among them, where nothing is computed again; the kind with the most."""
        return max(self.kept_by_attention(), *self.kept_by_states(), 0)

    def kept_by_attention(self) -> int:
        """The same of a layer of attention."""
        per_token = self._fused_per_token() if self.kernels else self._plain_per_token()
        return self.tokens * per_token + self._attention() + self._factors()

    def kept_by_states(self) -> list[int]:
        """The same of a layer of every kind that has states."""
        s = self.sizes
        of_mlp = 0 if self.mlp_kernels else s.rank * len(s.adapted & {*MLP}) * self.itemsize
        common = self.tokens * (self._common_per_token() + of_mlp) + self._factors()
        return [common + self.tokens * kind.kept(self.itemsize, s.rank) for kind in s.states]

    def _all_layers(self) -> int:
        """Bytes that all layers save."""
        with_states = sum(kind.layers for kind in self.sizes.states)
        of_states = zip(self.sizes.states, self.kept_by_states(), strict=True)
        attention = (self.sizes.layers - with_states) * self.kept_by_attention()
        return attention + sum(kind.layers * size for kind, size in of_states)

    def _attention(self) -> int:
        """q, k, v, the output and its log-sum-exp (float32), which flash attention saves, and keys and values laid out
        anew where completions have a copy of their prompt's. Without flash attention all of it laid out anew, with
        keys and values for every head, and the output in the order of the row."""
        s = self.sizes
        if not self.flash:
            return self.keys * (4 * s.query * self.itemsize + 4 * s.heads) + self.tokens * s.query * self.itemsize
        gathered = 2 * self.keys * s.key * self.itemsize if self.keys > self.tokens else 0
        return self.tokens * ((2 * s.query + 2 * s.key) * self.itemsize + 4 * s.heads) + gathered

    def _fused_per_token(self) -> int:
        """Layer input, attention, MLP input, gate and up; inputs of the norms that follow attention and MLP."""
        s = self.sizes
        numbers = 2 * s.hidden + 2 * s.inner + s.beside(GATE_UP) + (2 * s.hidden if s.norms == 4 else 0)
        if s.normed_heads:
            # Beside the rotated q and k, the stacked product stays; the v that flash attention saves is a view of it.
            numbers += s.query + s.key * (1 if self.flash else 2)
        return numbers * self.itemsize

    def _plain_per_token(self) -> int:
        """transformers' modules with LoRA: each norm keeps its input in float32, and every linear layer its own."""
        s = self.sizes
        size = 4 * (s.query + s.key) + 4 * (s.query + s.key) // s.head_dim if s.normed_heads and not s.gated else 0
        # With a gate: queries and gates as they come from their product, keys, the gates' sigmoid, and the result.
        numbers = s.hidden * s.has(*QKV) + (4 * s.query + s.key if s.gated else 0)
        adapters = len(s.adapted) - max((kind.adapted for kind in s.states), default=0)
        adapters -= len(s.adapted & {*MLP}) if self.mlp_kernels else 0
        return self._common_per_token() + size + (numbers + s.rank * adapters) * self.itemsize

    def _common_per_token(self) -> int:
        """The norms and the MLP of a plain layer, whatever its kind."""
        s = self.sizes
        size = s.norms * self._norm_input()
        if s.input_of_layer:
            size += 4 * s.hidden + 4 + 4 * s.input_of_layer * self.itemsize
        if s.experts is not None:
            return size + self._experts_per_token(s.experts)
        if self.mlp_kernels:
            return size + (s.hidden + 2 * s.inner + s.beside(GATE_UP)) * self.itemsize
        return size + (s.hidden * s.has(*GATE_UP) + 3 * s.inner + s.inner * s.has(*DOWN)) * self.itemsize

    def _norm_input(self) -> int:
        """Bytes that a norm over the hidden state keeps of a token: its input, by transformers' in float32."""
        if self.sizes.gated:
            return self.sizes.hidden * self.stream_itemsize
        return self.sizes.hidden * self.itemsize if self.kernels else 4 * self.sizes.hidden + 4

    def _experts_per_token(self, experts: ExpertSizes) -> int:
        """Gate and up of every row, its place both ways, its expert and weight; the softmax over all experts. With
        adapters the results too, and what each multiplies and makes of it."""
        row = 2 * experts.inner * self.itemsize + 3 * 8 + 4 + 2 * self.itemsize
        above, below = self.sizes.expert_ranks
        if above or below:
            inputs = (experts.hidden + above) * bool(above) + (experts.inner + below) * bool(below)
            row += (experts.hidden + inputs) * self.itemsize + 8
        return experts.chosen * row + 4 * experts.experts

    def _expert_factors(self) -> tuple[int, int]:
        """Numbers in one layer's A, and in its B, of adapters on experts."""
        if (experts := self.sizes.experts) is None:
            return 0, 0
        above, below = self.sizes.expert_ranks
        a = above * experts.hidden + below * experts.inner
        return experts.experts * a, experts.experts * (above * 2 * experts.inner + below * experts.hidden)

    def _experts_backward(self, experts: ExpertSizes) -> int:
        """Rows of the gradient, of gates and ups and their gradients, and what of the weights is dequantised."""
        row = experts.hidden + 2 * experts.inner
        if any(self.sizes.expert_ranks):  # every step is a function of its own, which keeps what it was given
            row = max(experts.hidden + 5 * experts.inner, 2 * experts.hidden + 2 * experts.inner)
        pieces = [min(EXPERTS_BYTES, rows * columns * self.itemsize) for rows, columns in experts.matrices]
        rows = self.tokens * experts.chosen * row * self.itemsize
        gradients = (self.itemsize + 4) * sum(self._expert_factors())
        return rows + gradients + (max(pieces) if self.packed_weights else 0)

    def _factors(self) -> int:
        """A and B as they are multiplied, which plain layers keep: in 16 bit, or s B in float32."""
        if self.kernels:
            return 0
        a, b = self._expert_factors()
        if self.itemsize == 2:
            kept = self.sizes.adapter - (self.sizes.adapter_of_mlp if self.mlp_kernels else 0)
            return (kept + a + b) * self.itemsize
        return (self.sizes.adapter_b + b) * self.itemsize

    def _absent_in_first_layer(self) -> int:
        """The embedding needs no gradient, so the first plain layer saves neither its norm's input nor the A behind
        it. (Without an adapter on q, k or v it saves less still, which is not counted.)"""
        if self.kernels or self.sizes.all_trained:
            return 0
        s = self.sizes
        before = len(s.adapted & set(QKV)) * s.rank * s.hidden
        return self.tokens * self._norm_input() + (before * self.itemsize if self.itemsize == 2 else 0)

    def _gate_and_up(self) -> int:
        beside = self.sizes.beside(GATE_UP) if self.kernels or self.mlp_kernels else 0
        return self.tokens * (2 * self.sizes.inner + beside) * self.itemsize

    @property
    def stream_itemsize(self) -> int:
        """Bytes of a number of what layers hand on."""
        return 4 if self.sizes.float32_stream else self.itemsize

    def layer_input(self) -> int:
        """Bytes of what a layer gets and gives."""
        return self.tokens * self.sizes.hidden * self.stream_itemsize

    def _normed(self) -> int:
        """Bytes of a norm of it."""
        return self.tokens * self.sizes.hidden * self.itemsize

    def _layer_inputs(self) -> int:
        """Of all layers: the first one's is the embeddings, in the model's dtype."""
        return (self.sizes.layers - 1) * self.layer_input() + self._normed()

    def kept(self, mode: str) -> int:
        """Bytes that all layers keep on the device between their forward and their backward."""
        usual = self if self.mean_sizes is None else replace(self, sizes=self.mean_sizes, mean_sizes=None)
        inputs = self._inputs_of_layers()
        if mode == "none":
            return usual._all_layers() - self._absent_in_first_layer() + inputs
        if mode == "mlp":
            return self.kept("none") - self.sizes.layers * usual._gate_and_up()
        if mode == "layer":
            return self._layer_inputs() + inputs
        # Offloaded, one is still here when the backward begins, and later one is on its way.
        return 2 * self.layer_input() + inputs

    def _inputs_of_layers(self) -> int:
        """What all layers get beside the hidden state, made at once: the sum, and its projection's norm in float32."""
        return self.tokens * self.sizes.layers * self.sizes.input_of_layer * (self.itemsize + 4)

    def on_host(self, mode: str) -> int:
        """Bytes of host memory."""
        return self._layer_inputs() - self.layer_input() if mode == "offload" else 0

    # Peaks

    def peak(self, mode: str) -> int:
        """Most bytes that the forward and backward of this micro-batch hold at once on the device."""
        return max(self.phases(mode).values()) + (LIBRARIES if self.on_gpu else self.on_host(mode))

    def phases(self, mode: str) -> dict[str, int]:
        """Bytes at the moments that may be the peak: the head, and the backward through the last layer."""
        index = INDEX_BYTES * self.tokens + 2 * self.tokens * self.sizes.head_dim * self.itemsize
        moments = self._head(mode) | (self._fused_backward(mode) if self.kernels else self._plain_backward(mode))
        return {name: size + index for name, size in moments.items()}

    def logits(self) -> int:
        """One chunk of logits, a second one where the entropy has a gradient, and a CPU's workspace."""
        chunk = min(self.chunk, self.predicted) * self.sizes.vocabulary * self.itemsize
        return chunk * (1 + self.entropy_gradient) + (0 if self.on_gpu else 2 * CPU_BLOCK_BYTES)

    def _head(self, mode: str) -> dict[str, int]:
        """The last norm's input, its output, the rows of it that predict, and their gradients, made with the logits."""
        s = self.sizes
        rows = self.predicted * s.hidden * self.itemsize
        before = self.kept(mode) + self.tokens * self._norm_input()
        if s.all_trained:  # logits are made again in the backward pass, and with them both gradients
            again = self.logits() + self._slice(s.vocabulary * s.hidden)
            return {
                "logits": before + self._normed() + rows + self.logits(),
                "head backward": before + 2 * rows + again,
            }
        gradients = rows * (1 + self.entropy_gradient)
        return {
            "logits": before + self._normed() + rows + gradients + self.logits() + self._head_slices(),
            "head backward": before + gradients + rows,
        }

    def _slice(self, numbers: int) -> int:
        """Of a weight's gradient in float32 that is added where it is kept."""
        return min(WEIGHT_SLICE_BYTES, 4 * numbers)

    def _weight_gradients(self, *numbers: int) -> int:
        """Sums in float32 for weights of so many numbers that are trained, over a layer's tiles, and a slice of one."""
        return 4 * sum(numbers) + self._slice(max(numbers)) if self.sizes.all_trained else 0

    def _head_slices(self) -> int:
        """A slice of a head on the host, and its part and the sum of all parts of a chunk's gradient, in float32."""
        s = self.sizes
        slice_bytes = min(HEAD_SLICE_BYTES, s.vocabulary * s.hidden * self.itemsize)
        return slice_bytes + 8 * min(self.chunk, self.predicted) * s.hidden if self.head_on_host else 0

    def _attention_backward(self) -> int:
        """What the backward of attention allocates."""
        return self._flash_backward() if self.flash else self._efficient_backward()

    def _efficient_backward(self) -> int:
        """Gradients of the output, q, k and v as they are laid out, and torch's sums of the last three in float32; then
        those three in the order of the row."""
        s = self.sizes
        laid_out = self.keys * (4 * s.query * self.itemsize + 12 * s.query + 4 * s.heads)
        return laid_out + self.tokens * (2 * s.query + 2 * s.key) * self.itemsize

    def _flash_backward(self) -> int:
        """Gradients of the output, q, k and v, and what the kernel allocates: dq in float32, and where heads share
        keys, dk and dv of every head. Those are added up with a float32 buffer where torch needs 64 bits to index
        them."""
        s = self.sizes
        every_head = self.keys * s.query * self.itemsize if s.key != s.query else 0
        buffer = 4 * self.keys * s.key if every_head > INDEXED_IN_32_BITS else 0
        of_keys = 2 * self.keys * s.key * self.itemsize + 2 * every_head + buffer
        return of_keys + self.tokens * (2 * s.query * self.itemsize + 4 * s.query + 4 * s.heads)

    @property
    def _weights_copied(self) -> bool:
        """Whether a product's weights are laid out anew: dequantised, or copied beside their adapters' factors."""
        return self.packed_weights or bool(self.sizes.adapted and not self.sizes.all_trained)

    def _matrix(self, rows: int, columns: int, endings: Sequence[str]) -> int:
        """A weight of that size as the kernels lay it out, with the factors of its adapters beside it."""
        beside = self.sizes.beside(endings)
        return (rows + beside) * (columns + beside) * self.itemsize if self.packed_weights or beside else 0

    def _mlp_tile(self, mode: str) -> int:
        """What the backward of a tile of the kernels' MLP allocates."""
        s, rows = self.sizes, min(self.tokens, largest_tile(MLP_TILE * MLP_TILES.get(mode, 1)))
        # Beside the gradient of the product: the normed input and, where adapters multiply with W, a wider gradient.
        numbers = s.inner + (1 + self._weights_copied) * s.hidden
        numbers += 0 if mode == "none" else 2 * s.inner + s.beside(GATE_UP)
        matrices = self._matrix(2 * s.inner, s.hidden, GATE_UP) + self._matrix(s.hidden, s.inner, DOWN)
        return (
            rows * numbers * self.itemsize
            + matrices
            + self._weight_gradients(2 * s.inner * s.hidden, s.inner * s.hidden)
        )

    def _fused_backward(self, mode: str) -> dict[str, int]:
        s, one = self.sizes, self.layer_input()
        replayed = mode in ("layer", "offload")
        attention = self.kept_by_layer() - self._gate_and_up() - 2 * one
        mlp_tile, qkv_rows = self._mlp_tile(mode), min(self.tokens, largest_tile(QKV_TILE))
        qkv = s.query + 2 * s.key
        qkv_tile = qkv_rows * (qkv + 2 * s.hidden) * self.itemsize + self._matrix(qkv, s.hidden, QKV)
        qkv_tile += self._weight_gradients(qkv * s.hidden)
        # A layer that keeps everything has its part in `kept`; one that is replayed adds what its replay keeps, and
        # the gradient of its output stays in the caller's frame to the end.
        before = self.kept(mode) + (attention + 2 * one if replayed else 0)
        # Gone by then: the MLP's input, and the inputs of norms behind attention and MLP.
        mlp_gone = one + (self._gate_and_up() if mode == "none" else 0) + (2 * one if s.norms == 4 else 0)
        return {
            "mlp backward": before + (1 if replayed else 2) * one + mlp_tile + 8 * s.adapter,
            "attention backward": before - mlp_gone + one + self._attention_backward(),
            "projection backward": before - mlp_gone - attention + 2 * one
            + self.tokens * qkv * self.itemsize + qkv_tile + 8 * s.adapter,
        }  # fmt: skip

    def _packed_weight(self) -> int:
        """The largest of the MLP's weights, dequantised."""
        return self.sizes.inner * self.sizes.hidden * self.itemsize if self.packed_weights else 0

    def _plain_backward(self, mode: str) -> dict[str, int]:
        s, one = self.sizes, self.layer_input()
        inner, wide = self.tokens * s.inner * self.itemsize, self.tokens * self._norm_input()
        layer_bytes = self.kept_by_layer() - (self._gate_and_up() if self.mlp_kernels else 0)
        # What our norm keeps is the layer's input itself, which is in `kept`.
        again = layer_bytes + (0 if s.gated else one)
        before = self.kept(mode) + (again if mode in ("layer", "offload") else 0)
        mlp, freed = 2 * inner + self._packed_weight() + self._weight_gradients(s.inner * s.hidden), 4 * inner
        if self.mlp_kernels:  # the result's gradient and the input's, in 16 bit beside a float32 stream, and a tile
            narrow = self._normed()
            mlp, freed = 2 * narrow + self._mlp_tile(mode) + 8 * s.adapter_of_mlp, narrow
            freed += self._gate_and_up() if mode == "none" else 0
        given, kernels = (self.tokens, self.itemsize), self.on_gpu and self.flash and self.itemsize == 2
        if s.experts is not None:
            mlp, freed = self._experts_backward(s.experts), self.tokens * self._experts_per_token(s.experts)
        return {
            "last norm backward": self.kept(mode) + (3 if s.gated else 6) * wide,
            "mlp backward": before + one + mlp,
            "attention backward": before - freed - wide + self._attention_backward(),
            **{
                f"states backward {number}": before - freed - wide + kind.backward(*given, kernels=kernels)
                for number, kind in enumerate(s.states)
            },
        }

    # Choosing

    def first_that_fits(self, free: int, host: int) -> str:
        """The first mode whose peak is within `free` bytes of the device and `host` bytes of the host, or that
        with the lowest peak for which the host has room."""
        share = FREE_SHARE if self.on_gpu else CPU_SHARE
        hosted = [mode for mode in self.modes if self.on_host(mode) <= HOST_SHARE * host]
        fitting = [mode for mode in hosted if self.peak(mode) <= share * free]
        return fitting[0] if fitting else min(hosted, key=self.peak)

    def mlps_that_fit(self, free: int) -> int:
        """Under "mlp", how many layers can keep gate and up after all within `free` bytes of the device."""
        return max(0, min(self.sizes.layers, (int(FREE_SHARE * free) - self.peak("mlp")) // self._gate_and_up()))
