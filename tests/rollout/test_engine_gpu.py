"""vLLM on a GPU: NF4 and adapter under CUDA graphs, our sampler, and a KV cache that can be lent to training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.tiny import save_tiny
from tests.helpers.vllms_own import crowded, vllms_own

pytestmark = pytest.mark.gpu

PROMPT = [5, 9, 33, 7, 21, 64, 90, 11, 2, 3] * 7
KV_BYTES = 2 << 30


class OnGpu:
    """A tiny Qwen2 with biases, as NF4 in bfloat16, whose KV cache may be released."""

    def __init__(self, folder: Any):
        from grpo.config.schema import Lora, Model
        from grpo.model.base_weights import BaseWeights
        from grpo.model.source import open_source
        from grpo.policy.policy import Policy
        from grpo.rollout.vllm_environment import set_environment

        set_environment(prompt_graphs=True)
        from grpo.rollout.engine import Engine, EngineSettings

        save_tiny(folder, "qwen2", tie_word_embeddings=False, num_attention_heads=2, num_key_value_heads=1)
        section = Model(name=str(folder), load_in_4bit=True)
        self.base = BaseWeights(open_source(section), section, device=torch.device("cuda", 0), dtype=torch.bfloat16)
        self.policy = Policy(self.base, Lora(r=4, lora_alpha=8), seed=1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in self.policy.adapter_layers().values():
                weight = layer.lora_B["default"].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
        settings = EngineSettings(
            max_seq_length=160, max_num_seqs=8, kv_cache_memory_bytes=KV_BYTES, release_kv_cache=True, graph_tokens=1024
        )
        self.engine = Engine(self.base, self.policy, settings)

    def sample(self, seed: int, adapter: bool = True, **sampling: Any) -> list[Any]:
        from grpo.rollout.engine import Request, SamplingSettings

        self.engine.sync_adapter()  # cached prompts would be rounded otherwise than computed ones
        requests = [Request(number, PROMPT[number:], seed) for number in range(8)]
        settings = SamplingSettings(**{"temperature": 0.9, "max_tokens": 60, **sampling})
        return sorted(self.engine.generate(requests, settings, adapter=adapter), key=lambda done: done.request_id)

    def disagreement(self, completions: list[Any], adapter: bool = True) -> float:
        """Mean difference between the rollout's and the trainer's logprobs."""
        from contextlib import nullcontext

        prompts = [PROMPT[done.request_id :] for done in completions]
        with torch.no_grad(), nullcontext() if adapter else self.policy.reference():
            scored = self.policy.score(prompts, [done.token_ids for done in completions], temperature=0.9)
        rollout = torch.tensor([logprob for done in completions for logprob in done.logprobs], device="cuda")
        return float((rollout - scored.logprobs).abs().mean())


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnGpu]:
    model = OnGpu(tmp_path_factory.mktemp("qwen2"))
    yield model
    model.engine.close()


def test_rollout_and_trainer_agree_with_and_without_the_adapter(on_gpu: OnGpu) -> None:
    """As far as bfloat16 lets a model of random weights, whose logprobs scatter by 0.05 between two kernels."""
    on, off = on_gpu.sample(1), on_gpu.sample(1, adapter=False)
    assert on_gpu.disagreement(on) < 0.06 and on_gpu.disagreement(off, adapter=False) < 0.06
    assert on_gpu.disagreement(off) > 0.12, "the adapter changes logprobs"


def test_filtered_and_greedy_sampling_go_through_vllms_own_sampler(on_gpu: OnGpu) -> None:
    greedy = on_gpu.sample(1, temperature=0.0)
    assert [done.token_ids for done in greedy] == [done.token_ids for done in on_gpu.sample(2, temperature=0.0)]
    assert len(on_gpu.sample(1, top_p=0.5)) == 8


def test_the_seed_of_a_call_decides_its_tokens(on_gpu: OnGpu) -> None:
    first, again, other = (on_gpu.sample(seed) for seed in (3, 3, 4))
    assert [done.token_ids for done in first] == [done.token_ids for done in again]
    assert [done.token_ids for done in first] != [done.token_ids for done in other]
    assert len({tuple(done.token_ids) for done in first}) == 8


def test_requests_that_join_before_the_same_steps_give_the_same_tokens_twice(on_gpu: OnGpu) -> None:
    """As turns of episodes do by the deterministic schedule; and the trainer agrees with them."""
    from grpo.rollout.engine import Request, SamplingSettings

    def played() -> list[Any]:
        on_gpu.engine.sync_adapter()
        on_gpu.engine.begin(SamplingSettings(0.9, 40), seed=11)
        done, steps = [], 0
        with on_gpu.engine.ending():
            while len(done) < 8:
                if steps % 5 == 0 and steps < 40:  # one more every five steps, while the others run
                    on_gpu.engine.add(Request(steps // 5, PROMPT[steps // 5 :], seed=1, max_tokens=12 + steps))
                done += on_gpu.engine.step()
                steps += 1
        return sorted(done, key=lambda one: one.request_id)

    first, again = played(), played()
    assert [(done.token_ids, done.logprobs) for done in first] == [(done.token_ids, done.logprobs) for done in again]
    assert [len(done.token_ids) for done in first] == [12 + 5 * number for number in range(8)]
    assert on_gpu.disagreement(first) < 0.06


@pytest.mark.parametrize("temperature", [0.9, 0.0], ids=["one pass", "vLLM's sampler"])
@pytest.mark.parametrize("blocks", [1000, 24], ids=["roomy", "preempting"])
def test_logprobs_are_those_that_vllm_gives_itself(on_gpu: OnGpu, blocks: int, temperature: float) -> None:
    """With asynchronous scheduling and CUDA graphs: ends at many lengths, requests that wait or are preempted."""
    from grpo.rollout.engine import Request, SamplingSettings

    sampling = SamplingSettings(temperature, 60, stop_token_ids=(4, 15))
    requests = [Request(number, PROMPT[number % 5 :], 7) for number in range(20)]
    on_gpu.engine.sync_adapter()
    with crowded(on_gpu.engine, blocks=blocks, step_tokens=48) as counts:
        ours = list(on_gpu.engine.generate(requests, sampling))
    assert sorted(done.request_id for done in ours) == list(range(20))
    assert (counts["preempted"] > 0) == (blocks == 24) and counts["in pieces"] > 0
    on_gpu.engine.sync_adapter()
    with crowded(on_gpu.engine, blocks=blocks, step_tokens=48):
        expected = vllms_own(on_gpu.engine, requests, sampling)
    for done in ours:
        token_ids, logprobs = expected[done.request_id]
        assert done.token_ids == token_ids
        assert done.logprobs == pytest.approx(logprobs, abs=1e-6)


def test_a_released_kv_cache_is_free_memory_and_comes_back(on_gpu: OnGpu) -> None:
    before = on_gpu.sample(5)
    free = torch.cuda.mem_get_info()[0]
    assert on_gpu.engine.released_bytes() == 0
    on_gpu.engine.release_kv_cache()
    assert on_gpu.engine.released_bytes() >= KV_BYTES // 2
    assert torch.cuda.mem_get_info()[0] - free > 0.95 * KV_BYTES
    taken = torch.ones(KV_BYTES // 2, dtype=torch.uint8, device="cuda")
    on_gpu.disagreement(before)
    del taken
    assert [done.token_ids for done in on_gpu.sample(5)] == [done.token_ids for done in before]
    on_gpu.engine.release_kv_cache()
    on_gpu.engine.release_kv_cache()
    assert on_gpu.disagreement(on_gpu.sample(6)) < 0.05
