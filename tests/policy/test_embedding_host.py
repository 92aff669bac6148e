"""Token embedding and output head in host memory: loaded there, counted there, read there by vLLM and in training."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from grpo.config.schema import Config, Lora, Model, parse_config
from grpo.errors import UserError
from grpo.kernels import host_matmul
from grpo.memory import activations as memory
from grpo.memory import fit, plan, summary
from grpo.model import host_memory
from grpo.model.base_weights import BaseWeights
from grpo.model.layout import EMBEDDING, HEAD
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.tiny import VOCABULARY, save_tiny

LLAMA_8B = plan.Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False)
LLAMA_3B = plan.Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True)
TABLE = 128256 * 4096 * 2
TIED = "the token embedding of .* is its output head too, .* or set model.offload_head = true, which moves both"
BOTH = {"offload_embedding": True, "offload_head": True}


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **keys: Any) -> BaseWeights:
    section = Model(name=str(folder), **keys)
    return BaseWeights(open_source(section), section, device=torch.device(device), dtype=dtype)


def config(name: str | Path = "m", **sections: Any) -> Config:
    model = {"name": str(name), **sections.pop("model", {})}
    return parse_config({"model": model, "task": {"name": "arithmetic"}, **sections})


def embedding_of(policy: Policy) -> Tensor:
    return policy.decoder.get_input_embeddings().weight


# Loading, with a CPU in the GPU's place


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Let the CPU pass for a device with memory of its own; what is then "pinned"."""
    made: list[Tensor] = []

    def zeros(*shape: int, dtype: torch.dtype, wanted_by: str) -> Tensor:
        assert wanted_by.startswith("model.offload_")
        made.append(torch.zeros(shape, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(host_memory, "has_own_memory", lambda device: True)
    monkeypatch.setattr(host_memory, "pinned_zeros", zeros)
    monkeypatch.setattr(host_memory, "device_view", lambda device, host: host.view(host.shape))
    return made


@pytest.mark.parametrize(
    ("family", "keys", "moved"),
    [
        ("llama", {"offload_embedding": True}, [EMBEDDING]),
        ("llama", {"offload_head": True}, [HEAD]),
        ("llama", BOTH, [HEAD, EMBEDDING]),
        ("qwen2", {"offload_head": True}, [EMBEDDING]),
    ],
    ids=["embedding", "head", "both", "tied"],
)
def test_what_is_named_alone_is_on_the_host_and_the_training_graph_reads_it_there(
    pinned: list[Tensor], tmp_path: Path, family: str, keys: dict[str, bool], moved: list[str]
) -> None:
    save_tiny(tmp_path, family)
    base, plain = load(tmp_path, **keys), load(tmp_path)
    policy, reference = Policy(base, Lora(r=2)), Policy(plain, Lora(r=2))
    trained = dict(policy.decoder.named_parameters())
    assert list(base.pinned) == moved
    for name, host in zip(moved, pinned, strict=True):
        assert host.shape == (192, 128) and not host[VOCABULARY:].any()
        assert host.equal(plain.tensors[name])
        assert trained[name].data_ptr() == base.tensors[name].data_ptr() == host.data_ptr()
        assert not trained[name].requires_grad
    on_host = sum(host.nbytes for host in pinned)
    assert base.host_nbytes() == on_host and plain.host_nbytes() == 0
    assert base.nbytes() + on_host == plain.nbytes()
    head = policy.head_weight()
    assert head.shape == (VOCABULARY, 128)
    assert any(head.data_ptr() == host.data_ptr() for host in pinned) == ("offload_head" in keys)
    scored, expected = (p.score([[3, 4, 5]], [[6, 7, 8]], temperature=1.0) for p in (policy, reference))
    assert scored.logprobs.equal(expected.logprobs)


def test_on_a_cpu_the_options_change_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    base, plain = load(tmp_path, **BOTH), load(tmp_path)
    assert base.nbytes() == plain.nbytes() and base.host_nbytes() == 0
    assert all(base.tensors[name].equal(plain.tensors[name]) for name in (EMBEDDING, HEAD))


def test_an_embedding_that_is_the_output_head_too_is_refused(tmp_path: Path) -> None:
    """Also on a CPU, and by a dry run: a configuration is not to fail later, on the GPU."""
    save_tiny(tmp_path, "qwen2", tie_word_embeddings=True)
    for keys in ({"offload_embedding": True}, BOTH):
        with pytest.raises(UserError, match=TIED):
            load(tmp_path, **keys)
        with pytest.raises(UserError, match=TIED):
            summary.memory_plan(config(tmp_path, model=keys))


def test_a_host_without_room_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        UserError, match="^the.key: 0.0 GB .* would be pinned, and the host has 0.0 GB free; do without"
    ):
        host_memory.pinned_zeros(10, 128, dtype=torch.float32, wanted_by="the.key")


def test_a_host_without_room_for_both_is_told_before_anything_is_loaded(
    pinned: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path, "llama")
    one = plan.pinned_bytes(192 * 128 * 4)
    memory = psutil.virtual_memory()._replace(available=2 * one - 1)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    load(tmp_path, offload_head=True)
    monkeypatch.setattr(BaseWeights, "_load_linear", None)
    with pytest.raises(UserError, match="^model.offload_embedding and model.offload_head: .* do without, or free some"):
        load(tmp_path, **BOTH)


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_a_host_that_cannot_pin_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="the.key: .* GB free but gives none .*; do without"):
        host_memory.pinned_zeros(10, 128, dtype=torch.float32, wanted_by="the.key")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_view_is_described_by_its_very_bytes(dtype: torch.dtype) -> None:
    """numpy reads the protocol's CPU twin, which has the same entries."""
    tensor = torch.randn(7, 12).to(dtype)

    class Twin:
        __array_interface__ = host_memory.PinnedBytes(tensor).__cuda_array_interface__

    seen = np.asarray(Twin())
    assert seen.ctypes.data == tensor.data_ptr()
    assert torch.from_numpy(seen).view(dtype).view(7, 12).equal(tensor)


# The plan


def test_the_embedding_counts_as_host_memory_where_there_is_a_gpu() -> None:
    kept, moved = config(), config(model={"offload_embedding": True})
    assert (
        plan.weight_bytes(kept, LLAMA_8B, 2, on_gpu=True) - plan.weight_bytes(moved, LLAMA_8B, 2, on_gpu=True) == TABLE
    )
    assert plan.weight_bytes(kept, LLAMA_8B, 2, on_gpu=False) == plan.weight_bytes(moved, LLAMA_8B, 2, on_gpu=False)
    sixteen = config(model={"offload_embedding": True, "load_in_4bit": False})
    linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14336)
    assert plan.weight_bytes(sixteen, LLAMA_8B, 2, on_gpu=True) == 2 * (linears + 128256 * 4096 + 65 * 4096)
    assert plan.plan_memory(moved, LLAMA_8B, 2, on_gpu=True).host == 1 << 30, "a power of two"
    assert plan.plan_memory(moved, LLAMA_8B, 2, on_gpu=False).host == 0
    assert plan.plan_memory(kept, LLAMA_8B, 2, on_gpu=True).host == 0


def test_head_and_embedding_count_apart_and_a_tied_one_once() -> None:
    kept, head, both = config(), config(model={"offload_head": True}), config(model=BOTH)
    tied = plan.embedding_bytes(LLAMA_3B, 2)
    for shape, chosen, moved, pinned_size in (
        (LLAMA_8B, head, TABLE, 1 << 30),
        (LLAMA_8B, both, 2 * TABLE, 2 << 30),
        (LLAMA_3B, head, tied, 1 << 30),
    ):
        weights = [plan.weight_bytes(c, shape, 2, on_gpu=True) for c in (kept, chosen)]
        assert weights[0] - weights[1] == moved
        assert plan.plan_memory(chosen, shape, 2, on_gpu=True).host == pinned_size
        assert plan.plan_memory(chosen, shape, 2, on_gpu=False).host == 0


def test_the_slices_of_a_head_on_the_host_are_planned_where_logits_are() -> None:
    settings = {"train": {"tokens_per_micro_batch": 2000, "logprob_chunk_tokens": 1000}}
    kept, moved = (
        memory.TrainingMemory.of(config(model=model, **settings), LLAMA_8B, 2, on_gpu=True).phases("layer")
        for model in ({}, {"offload_head": True})
    )
    scratch = (32 << 20) + 1000 * 4096 * 8
    assert {name: moved[name] - kept[name] for name in kept if moved[name] != kept[name]} == {"logits": scratch}


def test_what_the_embedding_leaves_goes_to_the_kv_cache_or_makes_a_run_fit() -> None:
    settings: dict[str, Any] = {"rollout": {"max_completion_length": 4000, "max_num_seqs": 256}}
    moved = {**settings, "model": {"offload_embedding": True}}
    free = 24 * 10**9
    settings["train"] = moved["train"] = {"gradient_checkpointing": "offload"}
    kv = fit.check_memory(config(**settings), LLAMA_8B, 2, free, free)
    assert fit.check_memory(config(**moved), LLAMA_8B, 2, free, free) - kv == TABLE
    # A run that misses by less than the table.
    least = plan.plan_memory(config(**settings), LLAMA_8B, 2, on_gpu=True).peak(0) + 10**8
    tight = next(free for free in range(least, 24 * 10**9, 10**7) if fit.usable_bytes(free, free) >= least)
    advice = (
        "; set model.offload_embedding = true, and if that is not enough model.offload_head = true, which is slow, or"
    )
    with pytest.raises(UserError, match=f"{advice} use a smaller model"):
        fit.check_memory(config(**settings), LLAMA_8B, 2, tight, tight)
    assert fit.check_memory(config(**moved), LLAMA_8B, 2, tight, tight)


@pytest.mark.parametrize(
    ("keys", "shape", "remedy"),
    [
        ({}, LLAMA_3B, "; set model.offload_head = true, which is slow, or use a smaller model"),
        ({"offload_head": True}, LLAMA_3B, "; use a smaller model"),
        ({"offload_embedding": True}, LLAMA_8B, "; set model.offload_head = true, which is slow, or use"),
        ({"offload_head": True}, LLAMA_8B, "; set model.offload_embedding = true, or use a smaller model"),
        (BOTH, LLAMA_8B, "; use a smaller model"),
    ],
)
def test_what_cannot_be_moved_or_is_moved_already_is_not_advised(
    keys: dict[str, bool], shape: plan.Shape, remedy: str
) -> None:
    with pytest.raises(UserError, match=remedy):
        fit.check_memory(config(model=keys), shape, 2, 2 * 10**9, 2 * 10**9)


def test_a_dry_run_says_what_the_host_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {name: getattr(LLAMA_8B, name) for name in LLAMA_8B.__dataclass_fields__}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(summary, "has_gpu", lambda: True)
    moved = summary.memory_plan(config(tmp_path, model={"offload_embedding": True}))
    assert "     1.07  of host memory, pinned, for the token embedding" in moved
    moved = summary.memory_plan(config(tmp_path, model=BOTH))
    assert "     2.15  of host memory, pinned, for the token embedding and the output head" in moved
    assert not any("host" in line for line in summary.memory_plan(config(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"tie_word_embeddings": True}))
    moved = summary.memory_plan(config(tmp_path, model={"offload_head": True}))
    assert "     1.07  of host memory, pinned, for the token embedding, which is the output head too" in moved


# On a GPU

TOKENS = 32000
"""A vocabulary whose embedding shows among what a tiny model takes."""
TABLE_ON_GPU = TOKENS * 128 * 2
PROMPT = [5, 9, 33, 7, 21, 64, 90, 11, 2, 3] * 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a large vocabulary and a head of its own."""
    path = tmp_path_factory.mktemp("llama")
    save_tiny(path, "llama", vocab_size=TOKENS, num_attention_heads=2, num_key_value_heads=1)
    return path


@pytest.mark.gpu
def test_a_gpu_reads_host_memory_in_place_and_in_a_cuda_graph() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    host = host_memory.pinned_zeros(1000, 64, dtype=torch.bfloat16, wanted_by="a test")
    host.copy_(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)))
    before = torch.cuda.memory_allocated(device)
    view = host_memory.device_view(torch.device("cuda"), host)
    assert torch.cuda.memory_allocated(device) == before, "nothing was copied to the GPU"
    assert (view.device, view.dtype, view.shape) == (device, torch.bfloat16, host.shape)
    assert view.data_ptr() == host.data_ptr()

    def rows(ids: list[int]) -> Tensor:
        return torch.nn.functional.embedding(torch.tensor(ids, device=device), view).cpu()

    assert rows([3, 999, 0]).equal(host[[3, 999, 0]])
    host[3] = 7
    assert rows([3]).eq(7).all(), "what the host writes, the GPU reads"

    ids = torch.tensor([1, 2, 3, 4], device=device)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        torch.nn.functional.embedding(ids, view)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.nn.functional.embedding(ids, view)
    ids.copy_(torch.tensor([9, 8, 7, 500]))
    graph.replay()
    torch.cuda.synchronize()
    assert captured.cpu().equal(host[[9, 8, 7, 500]])

    owner = host.data_ptr()
    del host
    gc.collect()
    assert view.data_ptr() == owner and rows([3]).eq(7).all(), "the view keeps the memory"


@pytest.mark.gpu
def test_a_gpu_multiplies_with_host_memory_as_with_its_own() -> None:
    """As vLLM does, rows of a batch after rows, and in a CUDA graph: the same kernels, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    host = host_memory.pinned_zeros(TOKENS, 512, dtype=torch.bfloat16, wanted_by="a test")
    host.copy_(torch.randn(host.shape, generator=generator))
    view, own = host_memory.device_view(torch.device("cuda"), host), host.cuda()
    for rows in (1, 8, 64, 256):
        hidden = torch.randn(rows, 512, generator=generator).bfloat16().cuda()
        expected = torch.nn.functional.linear(hidden, own)
        assert torch.nn.functional.linear(hidden, view).equal(expected), rows
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.nn.functional.linear(hidden, view)
    graph.replay()
    assert captured.equal(expected)


def peak_of_training(folder: Path, **keys: Any) -> tuple[int, int, Tensor, Tensor]:
    """Bytes of the GPU that stay after loading, and at most in a forward and backward; logprobs, and the gradient."""
    gc.collect()
    torch.cuda.synchronize()
    before = requested("current")
    base = load(folder, "cuda", torch.bfloat16, **keys)
    gc.collect()
    loaded = requested("current") - before
    assert loaded >= base.nbytes()
    policy = Policy(base, Lora(r=4, lora_alpha=8), seed=1)
    perturb(policy)
    torch.cuda.reset_peak_memory_stats()
    scored = policy.score([PROMPT] * 4, [[7, 31999, 8, 9, n] for n in range(4)], temperature=1.0)
    scored.logprobs.sum().backward()
    torch.cuda.synchronize()
    assert all(bool(p.grad.isfinite().all()) for p in policy.parameters() if p.grad is not None)
    assert any(p.grad is not None and bool(p.grad.any()) for p in policy.parameters())
    assert embedding_of(policy).grad is None
    peak = requested("peak") - before
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    return loaded, peak, scored.logprobs.detach(), gradient


def requested(when: str) -> int:
    """Bytes asked of torch's allocator: what it hands out depends on the blocks that it has."""
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{when}"])


def perturb(policy: Policy) -> None:
    """An adapter that changes something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{"offload_embedding": True}, {"offload_head": True}, BOTH], ids=", ".join)
def test_training_takes_the_tables_less_and_computes_the_same(
    folder: Path, keys: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the head on the host the products go through slices, so that they may round differently: a logit by a unit
    in the last place, 2^-3 for the largest of this model."""
    monkeypatch.setattr(host_matmul, "HEAD_SLICE_BYTES", 1 << 18)
    for _ in range(2):  # tables, workspaces and tuned kernels stay
        peak_of_training(folder)
    peak_of_training(folder, **keys)
    loaded, peak, expected, gradient = peak_of_training(folder)
    loaded_without, peak_without, logprobs, gradient_without = peak_of_training(folder, **keys)
    slack, scratch = 1 << 16, (1 << 18 if "offload_head" in keys else 0)
    moved = len(keys) * TABLE_ON_GPU
    assert abs(loaded - loaded_without - moved) <= slack
    assert -slack <= peak_without - (peak - moved) <= slack + scratch
    off = (logprobs - expected).abs()
    assert float(off.max()) <= (2**-3 if scratch else 1e-3) and float(off.mean()) <= (0.01 if scratch else 1e-3)
    assert float((gradient_without - gradient).norm() / gradient.norm()) < 0.01


@pytest.mark.gpu
def test_the_memory_is_let_go_with_the_base(folder: Path) -> None:
    gc.collect()
    pinned_before = count_pinned()
    base = load(folder, "cuda", torch.bfloat16, **BOTH)
    assert count_pinned() == pinned_before + 2
    del base
    gc.collect()
    assert count_pinned() == pinned_before
    host_memory.free_pinned_memory()


def count_pinned() -> int:
    return sum(type(thing) is host_memory.PinnedBytes for thing in gc.get_objects())


@dataclass(frozen=True)
class Rollout:
    """Base with both tables on the host, training graph and vLLM, which decodes in CUDA graphs."""

    base: BaseWeights
    policy: Policy
    engine: Any
    plain_tokens: dict[int, list[int]]
    """What vLLM gave greedily when both tables were on the GPU."""


@pytest.fixture(scope="module")
def rollout(folder: Path) -> Iterator[Rollout]:
    base, _, engine = start(folder)
    assert base.host_nbytes() == 0
    plain_tokens = greedy_tokens(engine)
    engine.close()
    started = Rollout(*start(folder, **BOTH), plain_tokens)
    yield started
    started.engine.close()


def greedy_tokens(engine: Any) -> dict[int, list[int]]:
    from grpo.rollout.engine import Request, SamplingSettings

    requests = [Request(number, PROMPT[number:], 1) for number in range(8)]
    done = engine.generate(requests, SamplingSettings(temperature=0.0, max_tokens=40))
    return {completion.request_id: completion.token_ids for completion in done}


def start(folder: Path, **keys: bool) -> tuple[BaseWeights, Policy, Any]:
    from grpo.rollout.engine import Engine, EngineSettings

    base = load(folder, "cuda", torch.bfloat16, **keys)
    policy = Policy(base, Lora(r=4, lora_alpha=8), seed=1)
    perturb(policy)
    settings = EngineSettings(max_seq_length=160, max_num_seqs=8, kv_cache_memory_bytes=1 << 28)
    return base, policy, Engine(base, policy, settings)


@pytest.mark.gpu
@pytest.mark.vllm
def test_vllm_and_the_training_graph_read_one_embedding_and_one_head(rollout: Rollout) -> None:
    base, policy, engine = rollout.base, rollout.policy, rollout.engine
    served = dict(engine.vllm_model().named_parameters())
    assert served_is_intact(base, engine)
    assert embedding_of(policy).data_ptr() == base.tensors[EMBEDDING].data_ptr()
    assert policy.head_weight().data_ptr() == policy.decoder.lm_head.weight.data_ptr() == base.tensors[HEAD].data_ptr()
    owned = {tensor.untyped_storage().data_ptr() for tensor in base.storages()}
    assert {parameter.untyped_storage().data_ptr() for parameter in served.values()} <= owned
    assert base.host_nbytes() == 2 * TABLE_ON_GPU


@pytest.mark.gpu
@pytest.mark.vllm
def test_decoding_in_cuda_graphs_agrees_with_the_trainer(rollout: Rollout) -> None:
    from grpo.rollout.engine import Request, SamplingSettings

    base, policy, engine = rollout.base, rollout.policy, rollout.engine
    requests = [Request(number, PROMPT[number:], 1) for number in range(8)]
    settings = SamplingSettings(temperature=0.9, max_tokens=60)
    done = sorted(engine.generate(requests, settings), key=lambda completion: completion.request_id)
    assert len(done) == 8 and all(len(completion.token_ids) == 60 for completion in done)
    prompts = [PROMPT[completion.request_id :] for completion in done]
    with torch.no_grad():
        scored = policy.score(prompts, [completion.token_ids for completion in done], temperature=0.9)
    sampled = torch.tensor([logprob for completion in done for logprob in completion.logprobs], device="cuda")
    # Logits of so many tokens are large, and bfloat16 rounds large ones coarsely; a wrong row is worth nats.
    assert float((sampled - scored.logprobs).abs().mean()) < 0.25
    assert served_is_intact(base, engine)


def served_is_intact(base: BaseWeights, engine: Any) -> bool:
    """Whether vLLM has the tables where they were loaded."""
    served = dict(engine.vllm_model().named_parameters())
    return all(served[name].data_ptr() == base.tensors[name].data_ptr() for name in (EMBEDDING, HEAD))


@pytest.mark.gpu
@pytest.mark.vllm
def test_greedy_tokens_are_those_of_a_head_on_the_gpu(rollout: Rollout) -> None:
    rollout.engine.sync_adapter()  # forgets the prefixes of other tests
    assert greedy_tokens(rollout.engine) == rollout.plain_tokens
