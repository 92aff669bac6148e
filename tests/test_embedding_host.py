"""A token embedding in host memory: loaded there, counted there, read in place by vLLM and the training graph."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tiny import VOCABULARY, save_tiny
from torch import Tensor

from grpo import host_memory, plan
from grpo.base import EMBEDDING, BaseWeights
from grpo.config import Config, Lora, Model, parse_config
from grpo.errors import UserError
from grpo.policy import Policy
from grpo.source import open_source

LLAMA_8B = plan.Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False)
LLAMA_3B = plan.Shape("llama", 3072, 8192, 28, 24, 8, 128, 128256, True)
TABLE = 128256 * 4096 * 2
TIED = "the token embedding of .* is its output head too"
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


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
        assert wanted_by == "model.offload_embedding"
        made.append(torch.zeros(shape, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(host_memory, "has_own_memory", lambda device: True)
    monkeypatch.setattr(host_memory, "pinned_zeros", zeros)
    monkeypatch.setattr(host_memory, "seen_by", lambda device, host: host.view(host.shape))
    return made


def test_the_embedding_alone_is_on_the_host_and_the_training_graph_reads_it_there(
    pinned: list[Tensor], tmp_path: Path
) -> None:
    save_tiny(tmp_path, "llama")
    base, plain = load(tmp_path, offload_embedding=True), load(tmp_path)
    (host,) = pinned
    assert host.shape == (192, 128) and not host[VOCABULARY:].any()
    assert host.equal(plain.tensors[EMBEDDING])
    assert base.host_nbytes() == host.nbytes and plain.host_nbytes() == 0
    assert base.nbytes() + host.nbytes == plain.nbytes()
    policy, reference = Policy(base, Lora(r=2)), Policy(plain, Lora(r=2))
    assert embedding_of(policy).data_ptr() == base.tensors[EMBEDDING].data_ptr() == host.data_ptr()
    assert not embedding_of(policy).requires_grad
    scored, expected = (p.score([[3, 4, 5]], [[6, 7, 8]], temperature=1.0) for p in (policy, reference))
    assert scored.logprobs.equal(expected.logprobs)


def test_on_a_cpu_the_option_changes_nothing(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    base, plain = load(tmp_path, offload_embedding=True), load(tmp_path)
    assert base.nbytes() == plain.nbytes() and base.host_nbytes() == 0
    assert base.tensors[EMBEDDING].equal(plain.tensors[EMBEDDING])


def test_an_embedding_that_is_the_output_head_too_is_refused(tmp_path: Path) -> None:
    """Also on a CPU, and by a dry run: a configuration is not to fail later, on the GPU."""
    save_tiny(tmp_path, "qwen2", tie_word_embeddings=True)
    with pytest.raises(UserError, match=TIED):
        load(tmp_path, offload_embedding=True)
    with pytest.raises(UserError, match=TIED):
        plan.memory_plan(config(tmp_path, model={"offload_embedding": True}))


def test_a_host_without_room_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(UserError, match="^the.key pins 0.0 GB of host memory, and the host has 0.0 GB free; leave it"):
        host_memory.pinned_zeros(10, 128, dtype=torch.float32, wanted_by="the.key")


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory can be pinned here")
def test_a_host_that_cannot_pin_is_told_in_a_sentence() -> None:
    with pytest.raises(UserError, match="the.key pins .* GB free but gives none .*; leave it out"):
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


def test_what_the_embedding_leaves_goes_to_the_kv_cache_or_makes_a_run_fit() -> None:
    settings: dict[str, Any] = {"rollout": {"max_completion_length": 4000, "max_num_seqs": 256}}
    moved = {**settings, "model": {"offload_embedding": True}}
    free = 24 * 10**9
    kv = plan.check_memory(config(**settings), LLAMA_8B, 2, free, free)
    assert plan.check_memory(config(**moved), LLAMA_8B, 2, free, free) - kv == TABLE
    # A run that misses by less than the table.
    tight = int((plan.plan_memory(config(**settings), LLAMA_8B, 2, on_gpu=True).peak(0) + 10**8) / (1 - plan.MARGIN))
    with pytest.raises(UserError, match="set model.offload_embedding = true, or use a smaller model"):
        plan.check_memory(config(**settings), LLAMA_8B, 2, tight, tight)
    assert plan.check_memory(config(**moved), LLAMA_8B, 2, tight, tight)


def test_moving_the_embedding_is_not_advised_where_it_cannot_be_moved() -> None:
    for settings, shape in ((config(), LLAMA_3B), (config(model={"offload_embedding": True}), LLAMA_8B)):
        with pytest.raises(UserError, match="; use a smaller model"):
            plan.check_memory(settings, shape, 2, 3 * 10**9, 3 * 10**9)


def test_a_dry_run_says_what_the_host_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {name: getattr(LLAMA_8B, name) for name in LLAMA_8B.__dataclass_fields__}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setattr(plan, "has_gpu", lambda: True)
    moved = plan.memory_plan(config(tmp_path, model={"offload_embedding": True}))
    assert moved[-1] == "     1.07  of host memory, pinned, for the token embedding"
    assert not any("host" in line for line in plan.memory_plan(config(tmp_path)))


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
@on_gpu
def test_a_gpu_reads_host_memory_in_place_and_in_a_cuda_graph() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    host = host_memory.pinned_zeros(1000, 64, dtype=torch.bfloat16, wanted_by="a test")
    host.copy_(torch.randn(1000, 64, generator=torch.Generator().manual_seed(0)))
    before = torch.cuda.memory_allocated(device)
    view = host_memory.seen_by(torch.device("cuda"), host)
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


def peak_of_training(folder: Path, **keys: Any) -> tuple[int, int, Tensor]:
    """Bytes of the GPU that stay after loading, and at most in a forward and backward; and the logprobs."""
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
    return loaded, requested("peak") - before, scored.logprobs.detach().cpu()


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
@on_gpu
def test_training_takes_the_embedding_less_and_computes_the_same(folder: Path) -> None:
    for _ in range(2):  # tables, workspaces and tuned kernels stay
        peak_of_training(folder)
    loaded, peak, expected = peak_of_training(folder)
    loaded_without, peak_without, logprobs = peak_of_training(folder, offload_embedding=True)
    slack = 1 << 16
    assert abs(loaded - loaded_without - TABLE_ON_GPU) <= slack
    assert abs(peak - peak_without - TABLE_ON_GPU) <= slack
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-3)


@pytest.mark.gpu
@on_gpu
def test_the_memory_is_let_go_with_the_base(folder: Path) -> None:
    gc.collect()
    pinned_before = count_pinned()
    base = load(folder, "cuda", torch.bfloat16, offload_embedding=True)
    assert count_pinned() == pinned_before + 1
    del base
    gc.collect()
    assert count_pinned() == pinned_before
    host_memory.give_back_pinned()


def count_pinned() -> int:
    return sum(type(thing) is host_memory.PinnedBytes for thing in gc.get_objects())


@pytest.fixture(scope="module")
def rollout(folder: Path) -> Iterator[tuple[BaseWeights, Policy, Any]]:
    """Base, training graph and vLLM, which decodes in CUDA graphs."""
    from grpo.engine import Engine, EngineSettings

    base = load(folder, "cuda", torch.bfloat16, offload_embedding=True)
    policy = Policy(base, Lora(r=4, lora_alpha=8), seed=1)
    perturb(policy)
    settings = EngineSettings(max_seq_length=160, max_num_seqs=8, kv_cache_memory_bytes=1 << 28)
    engine = Engine(base, policy, settings)
    yield base, policy, engine
    engine.close()


@pytest.mark.gpu
@pytest.mark.vllm
@on_gpu
def test_vllm_and_the_training_graph_read_one_embedding(rollout: tuple[BaseWeights, Policy, Any]) -> None:
    base, policy, engine = rollout
    served = dict(engine.vllm_model().named_parameters())
    assert served[EMBEDDING].data_ptr() == base.tensors[EMBEDDING].data_ptr() == embedding_of(policy).data_ptr()
    owned = {tensor.untyped_storage().data_ptr() for tensor in base.storages()}
    assert {parameter.untyped_storage().data_ptr() for parameter in served.values()} <= owned
    assert base.host_nbytes() == TABLE_ON_GPU


@pytest.mark.gpu
@pytest.mark.vllm
@on_gpu
def test_decoding_in_cuda_graphs_agrees_with_the_trainer(rollout: tuple[BaseWeights, Policy, Any]) -> None:
    from grpo.engine import Request, SamplingSettings

    base, policy, engine = rollout
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
    """Whether sampling left the embedding where it was."""
    return dict(engine.vllm_model().named_parameters())[EMBEDDING].data_ptr() == base.tensors[EMBEDDING].data_ptr()
