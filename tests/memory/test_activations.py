"""The memory formulas against what autograd saves and what is allocated, on tiny models with kernels stubbed out.

Attention is replaced by a function that saves and allocates what flash attention does on a GPU, and the elementwise
kernels by ones that allocate nothing, so that the CPU sees the GPU's allocations.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo.config.schema import Config, parse_config
from grpo.kernels import attention, lora_attention, lora_linear, lora_mlp
from grpo.kernels.rms_norm import Norm
from grpo.memory.activations import CHECKPOINTING_MODES, FREE_SHARE, TrainingMemory, moment_bytes
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy import fused_layers, graph
from grpo.policy.policy import Policy
from tests.helpers.families import save_family
from tests.helpers.tiny import save_tiny

TOKENS, PREDICTED = 400, 21
SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 640,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 1024,
}


class FlashLike(torch.autograd.Function):
    """Saves and allocates as torch's variable-length flash attention; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads, tokens, dim = query.shape
        out = query.new_zeros(tokens, heads, dim)
        ctx.save_for_backward(query, key, value, out, query.new_zeros(heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = [part.new_zeros(part.transpose(0, 1).shape).transpose(0, 1) for part in (query, key, value)]
        query_sum, row_sum = torch.zeros(out.shape, dtype=torch.float32), torch.zeros_like(lse)
        of_every_head = [torch.zeros_like(out) for _ in range(2)] if key.shape != query.shape else []
        del query_sum, row_sum, of_every_head
        return tuple(grads)


class EfficientLike(torch.autograd.Function):
    """Saves and allocates as torch's memory-efficient attention; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = torch.zeros_like(query), query.new_zeros(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grads = tuple(torch.zeros_like(part) for part in (query, key, value))
        sums = [torch.zeros(part.shape, dtype=torch.float32) for part in grads]
        del sums
        return grads


def place(x: Tensor, out: Tensor | None) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype) if out is None else out


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (graph, fused_layers):
        monkeypatch.setattr(module, "packed_attention", lambda q, k, v, packing, **rest: FlashLike.apply(q, k, v))
    monkeypatch.setattr(Norm, "forward", lambda self, x, out=None: place(x.to(self.weight.dtype), out))
    monkeypatch.setattr(Norm, "backward", lambda self, grad, x, residual_grad=None, out=None: place(x, out))
    monkeypatch.setattr(lora_attention, "rotate", lambda x, cos, sin, out=None, inverse=False: place(x, out))
    monkeypatch.setattr(lora_mlp, "glu_forward", lambda gate_up, kind, out=None: place(gate_up.chunk(2, 1)[0], out))
    monkeypatch.setattr(lora_mlp, "glu_backward", lambda grad, gate_up, kind, product, out: None)

    def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
        return torch.zeros(left.shape[0], right.shape[1]) if total is None else total

    monkeypatch.setattr(lora_linear, "add_product", add_product)


def settings(folder: Path, kernels: bool, targets: Sequence[str] | None) -> Config:
    lora: dict[str, Any] = {"r": 4} if targets is None else {"r": 4, "target_modules": list(targets)}
    return parse_config(
        {
            "model": {"name": str(folder), "load_in_4bit": False},
            "task": {"name": "t"},
            "lora": lora,
            "train": {"kernels": "auto" if kernels else "torch", "logprob_chunk_tokens": 8},
        }
    )


def made(
    folder: Path, family: str, *, kernels: bool, dtype: torch.dtype = torch.bfloat16, targets: Any = None
) -> tuple[Policy, TrainingMemory]:
    """A policy in training mode, with gradients allocated, and the plan of a micro-batch of TOKENS."""
    save_tiny(folder, family, **SHAPE)
    config = settings(folder, kernels, targets)
    base = BaseWeights(open_source(config.model), config.model, device=torch.device("cpu"), dtype=dtype)
    policy = Policy(base, config.lora, seed=0)
    if kernels:
        assert fused_layers.install_fused_layers(policy.decoder, base) == 3
    policy.model.train()
    for parameter in policy.parameters():
        parameter.grad = torch.zeros_like(parameter)
    planned = TrainingMemory.of(config, base.config, dtype.itemsize, on_gpu=True, tokens=TOKENS)
    here = {"kernels": kernels, "packed_weights": False}  # as it runs on a CPU
    return policy, replace(planned, predicted=PREDICTED, keys=TOKENS, **here)


def score(policy: Policy) -> Tensor:
    prompt = [3 + token % 90 for token in range(TOKENS - PREDICTED + 1)]
    return policy.score([prompt], [[5] * PREDICTED], temperature=1.0, chunk_tokens=8).logprobs.sum()


def saved_bytes(policy: Policy) -> int:
    """Bytes of the distinct tensors that a forward pass saves, without weights and adapter."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*policy.base.storages(), *policy.model.parameters()]}
    found: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        loss = score(policy)
    del loss
    return sum(found.values())


def saved_outside_of_layers(policy: Policy, memory: TrainingMemory) -> int:
    """By the last norm, and by the head: its gradient, and which rows it took."""
    size, hidden = memory.itemsize, memory.sizes.hidden
    norm = TOKENS * hidden * (memory.stream_itemsize if memory.kernels or memory.sizes.gated else 4)
    norm += 0 if memory.kernels or memory.sizes.gated else 4 * TOKENS
    return norm + PREDICTED * hidden * size + 8 * PREDICTED


CASES = [
    ("llama", True, torch.bfloat16, None),
    ("llama", True, torch.float32, None),
    ("qwen3", True, torch.bfloat16, None),
    ("gemma2", True, torch.bfloat16, None),
    ("phi3", True, torch.bfloat16, None),
    ("llama", False, torch.bfloat16, None),
    ("llama", False, torch.float32, None),
    ("llama", False, torch.bfloat16, ("q_proj", "v_proj")),
    ("llama", False, torch.bfloat16, ("q_proj", "down_proj")),
    ("mistral", False, torch.bfloat16, None),
]


@pytest.mark.parametrize(("family", "kernels", "dtype", "targets"), CASES)
def test_what_layers_keep_is_counted_to_the_byte(
    family: str, kernels: bool, dtype: torch.dtype, targets: Any, tmp_path: Path, as_on_a_gpu: None
) -> None:
    policy, memory = made(tmp_path, family, kernels=kernels, dtype=dtype, targets=targets)
    outside = saved_outside_of_layers(policy, memory)
    found = {}
    for mode in memory.modes:
        policy.recompute_layers(mode)
        found[mode] = saved_bytes(policy) - outside
    rotation = 2 * TOKENS * memory.sizes.head_dim * memory.itemsize
    assert found["none"] == memory.kept("none") + rotation
    if kernels:
        policy.recompute_layers("mlp", 2)
        kept_mlps = 2 * (memory.kept("none") - memory.kept("mlp")) // 3
        assert saved_bytes(policy) - outside == memory.kept("mlp") + kept_mlps + rotation
    assert not kernels or found["mlp"] == memory.kept("mlp") + rotation
    assert found["layer"] == memory.kept("layer")
    assert found["offload"] == 0, "offloaded inputs are not autograd's"


BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IN_EVERY_LAYER: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("family", IN_EVERY_LAYER)
@pytest.mark.parametrize("parameters", [[], BOTH, BOTH[:1], BOTH[1:]])
def test_what_layers_of_experts_keep_is_counted_with_adapters_on_them(
    family: str, parameters: list[str], tmp_path: Path, as_on_a_gpu: None
) -> None:
    save_family(tmp_path, family, **SHAPE, **IN_EVERY_LAYER[family])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = settings(tmp_path, False, targets)
    ranks = {"experts.down_proj": 2} if parameters else {}
    lora = config.lora.model_copy(update={"target_parameters": parameters, "rank_pattern": ranks})
    config = config.model_copy(update={"lora": lora})
    base = BaseWeights(open_source(config.model), config.model, device=torch.device("cpu"), dtype=torch.bfloat16)
    policy = Policy(base, config.lora, seed=0)
    policy.model.train()
    memory = TrainingMemory.of(config, base.config, 2, on_gpu=True, tokens=TOKENS)
    memory = replace(memory, predicted=PREDICTED, keys=TOKENS, kernels=False, packed_weights=False)
    policy.recompute_layers("none")
    found = saved_bytes(policy) - saved_outside_of_layers(policy, memory)
    rotation = 2 * TOKENS * memory.sizes.head_dim * memory.itemsize
    assert found == pytest.approx(memory.kept("none") + rotation, rel=0.005)


@pytest.mark.parametrize("mlp_kernels", [False, True])
def test_what_layers_with_states_keep_is_counted(mlp_kernels: bool, tmp_path: Path, as_on_a_gpu: None) -> None:
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    save_family(tmp_path, "qwen3_5_text", **SHAPE, layer_types=kinds)
    config = settings(tmp_path, mlp_kernels, None)
    base = BaseWeights(open_source(config.model), config.model, device=torch.device("cpu"), dtype=torch.bfloat16)
    policy = Policy(base, config.lora, seed=0)
    if mlp_kernels:
        assert fused_layers.install_fused_layers(policy.decoder, base) == 3
    policy.model.train()
    memory = TrainingMemory.of(config, base.config, 2, on_gpu=True, tokens=TOKENS)
    assert memory.mlp_kernels == mlp_kernels and ("mlp" in memory.modes) == mlp_kernels
    memory = replace(memory, predicted=PREDICTED, keys=TOKENS, kernels=False, packed_weights=False)
    outside = saved_outside_of_layers(policy, memory)
    rotation = 2 * TOKENS * memory.sizes.head_dim // 4 * memory.itemsize  # a quarter of each head is turned
    for mode, beside in (("none", rotation), ("mlp", rotation), ("layer", 0)):
        if mode in memory.modes:
            policy.recompute_layers(mode)
            found = saved_bytes(policy) - outside
            assert found == pytest.approx(memory.kept(mode) + beside, rel=0.005), mode


class Allocations(TorchDispatchMode):
    """Counts the bytes of live storages that torch functions made, and their peak."""

    def __init__(self, known: Sequence[Tensor]):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.live:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.freed, storage._cdata)
        return result

    def freed(self, key: int) -> None:
        self.now -= self.live.pop(key)


def measured_peak(policy: Policy, mode: str) -> int:
    policy.recompute_layers(mode)
    known = [*policy.base.storages(), *policy.model.parameters(), *policy.model.buffers()]
    known += [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    with Allocations(known) as allocations:
        score(policy).backward()
    return allocations.peak


@pytest.mark.parametrize(
    ("family", "kernels", "tolerance"),
    [("llama", True, 0.04), ("qwen3", True, 0.04), ("gemma2", True, 0.06), ("llama", False, 0.06)],
)
def test_the_peak_of_every_form_is_that_of_the_allocations(
    family: str, kernels: bool, tolerance: float, tmp_path: Path, as_on_a_gpu: None
) -> None:
    policy, memory = made(tmp_path, family, kernels=kernels)
    for mode in memory.modes:
        # On a CPU the host's copies count too.
        host = memory.layer_input() * (memory.sizes.layers - 2 if mode == "offload" else 0)
        planned = max(memory.phases(mode).values()) + host
        assert planned == pytest.approx(measured_peak(policy, mode), rel=tolerance), mode


@pytest.mark.parametrize(("family", "kernels"), [("llama", True), ("qwen3", True), ("llama", False)])
def test_attention_that_keeps_no_scores_is_counted_too(
    family: str, kernels: bool, tmp_path: Path, as_on_a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (graph, fused_layers):
        monkeypatch.setattr(module, "packed_attention", attention.packed_attention)
    monkeypatch.setattr(attention, "without_scores", lambda query: True)
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda q, k, v, **rest: EfficientLike.apply(q, k, v)
    )
    policy, memory = made(tmp_path, family, kernels=kernels)
    memory = replace(memory, flash=False)
    policy.recompute_layers("none")
    index = 8 * TOKENS * memory.sizes.layers  # which rows attention's output has
    assert saved_bytes(policy) - saved_outside_of_layers(policy, memory) == pytest.approx(
        memory.kept("none") + 2 * TOKENS * memory.sizes.head_dim * memory.itemsize + index, rel=0.01
    )
    for form in ("none", "layer"):
        planned = max(memory.phases(form).values())
        assert planned >= 0.97 * measured_peak(policy, form), form
        assert planned < 1.35 * measured_peak(policy, form), form


# Choosing


def planned(**changes: Any) -> TrainingMemory:
    from tests.memory.test_plan import LLAMA_8B, config

    return replace(TrainingMemory.of(config(), LLAMA_8B, 2, on_gpu=True), **changes)


def test_a_token_of_llama_8b_costs_what_its_tensors_take() -> None:
    """Kept by a layer: its input, q, k, v, attention's output, the MLP's input, gate, up and 64 columns of their
    adapters, and 32 floats."""
    numbers = 4096 + (4096 + 2 * 1024) + 4096 + 4096 + 2 * 14336 + 64
    assert planned(tokens=1, keys=1).kept_by_layer() == 2 * numbers + 4 * 32
    assert planned(tokens=1).kept("layer") == 32 * 2 * 4096


def test_completions_that_share_a_prompt_each_have_a_copy_of_its_keys() -> None:
    """Eight completions of 512 tokens after 512 of prompt: 4,608 tokens attend to 8 x 512 keys more."""
    shared, alone = planned(tokens=4608), planned(tokens=4608, keys=4608)
    assert planned().keys == 8192 + 8192 * 8 // 9
    shared = replace(shared, keys=4608 + 8 * 512)
    assert shared.kept_by_layer() - alone.kept_by_layer() == 2 * (4608 + 8 * 512) * 1024 * 2
    assert shared.peak("offload") > alone.peak("offload")


def test_the_fastest_form_that_fits_is_chosen() -> None:
    memory = planned(tokens=16_384)
    none, mlp, layer, offload = (memory.peak(mode) / 0.95 for mode in CHECKPOINTING_MODES)
    host = 10**12
    assert none > mlp > layer > offload
    assert memory.first_that_fits(int(none) + 1, host) == "none"
    assert memory.first_that_fits(int(none) - 1, host) == "mlp"
    assert memory.first_that_fits(int(mlp) - 1, host) == "layer"
    assert memory.first_that_fits(int(layer) - 1, host) == "offload"
    assert memory.first_that_fits(1, host) == "offload"
    assert memory.first_that_fits(1, memory.on_host("offload")) == "layer", "the host has no room for the inputs"


def test_layers_keep_gate_and_up_as_far_as_there_is_room() -> None:
    memory = planned()
    one, layers = (memory.kept("none") - memory.kept("mlp")) / memory.sizes.layers, memory.sizes.layers
    for kept in (0, 1, layers - 1, layers):
        free = (memory.peak("mlp") + kept * one) / FREE_SHARE
        assert memory.mlps_that_fit(int(free) + 2) == kept
        assert memory.mlps_that_fit(int(free) - 2) == max(0, kept - 1)
    assert memory.mlps_that_fit(10**14) == layers


def test_on_a_cpu_offloading_saves_nothing() -> None:
    memory = planned(on_gpu=False, kernels=False, packed_weights=False)
    assert memory.peak("offload") >= memory.peak("layer")
    assert memory.first_that_fits(1, 10**12) == "layer"


def test_moments_take_what_the_optimiser_keeps() -> None:
    assert [moment_bytes(name, on_gpu=True) for name in ("adamw", "adamw_8bit", "paged_adamw_8bit")] == [8, 2, 0]
    assert moment_bytes("adamw_8bit", on_gpu=False) == 8
