"""vLLM's scheduler with our short cuts: every step is the one that vLLM's own would have made, and each token has its
logprob.

Two schedulers get the same requests and the same made-up model, with and without asynchronous scheduling: one is vLLM's
class, the other ours. No model runs.
"""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from grpo.config.schema import Model
from grpo.model.source import open_source
from tests.helpers.tiny import save_tiny

pytestmark = pytest.mark.vllm

BLOCK = 16
LONGEST = 150
STEP_TOKENS = 64
"""Most tokens a step computes: prompts are computed in pieces."""
STOP = 7


def sampled(name: str, position: int) -> tuple[int, float]:
    """What the made-up model draws for the token at `position` of request `name`: its id and logprob."""
    number = random.Random(f"{name} {position}")
    return number.randrange(60), -number.random()


def random_requests(seed: int) -> list[dict[str, Any]]:
    """Prompts shared by neighbours, some longer than a step computes; some answers end with the prompt's next token."""
    number = random.Random(seed)
    prompts = [[number.randrange(100) for _ in range(number.choice((5, 16, 33, 100)))] for _ in range(4)]
    return [
        {
            "name": f"{index}-{number.randrange(16**8):08x}",
            "prompt": prompts[index // 3],
            "max_tokens": number.choice((1, 2, 15, 16, 17, 40, 70)),
            "stops": [STOP] if number.random() < 0.5 else [],
        }
        for index in range(12)
    ]


@pytest.fixture(scope="module")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from grpo.model.base_weights import BaseWeights
    from grpo.rollout.vllm_environment import set_environment

    set_environment()
    from grpo.rollout.vllm_model import write_model_folder

    folder = tmp_path_factory.mktemp("model")
    save_tiny(folder)
    section = Model(name=str(folder), load_in_4bit=False, dtype="float32")
    base = BaseWeights(open_source(section), section, device=torch.device("cpu"), dtype=torch.float32)
    write_model_folder(folder, base, None)
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=LONGEST, max_num_seqs=8,
        max_num_batched_tokens=STEP_TOKENS, block_size=BLOCK, enable_prefix_caching=True, enforce_eager=True,
        generation_config="vllm",
    )  # fmt: skip
    return arguments.create_engine_config()


class Driven:
    """A scheduler with requests, stepped as vLLM's engine steps it. `trace`: what every step had to compute."""

    def __init__(self, scheduler_class: type, config: Any, blocks: int, requests: list[dict[str, Any]], ahead: int):
        from vllm.sampling_params import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request
        from vllm.v1.structured_output import StructuredOutputManager

        init_none_hash(sha256)
        config.cache_config.num_gpu_blocks = blocks
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
        cache = KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        )
        self.scheduler = scheduler_class(
            vllm_config=config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK,
        )
        self.prompts = {request["name"]: len(request["prompt"]) for request in requests}
        self.tokens: dict[str, list[int]] = {name: [] for name in self.prompts}
        self.reasons: dict[str, str] = {}
        self.trace: list[Any] = []
        self.parts_of_prompts = self.preemptions = self.handed_on = 0
        self.requests = []
        for request in requests:
            parameters = SamplingParams(
                max_tokens=request["max_tokens"], stop_token_ids=request["stops"], ignore_eos=True, logprobs=0
            )
            hasher = get_request_block_hasher(BLOCK, sha256)
            self.requests.append(
                Request(request["name"], list(request["prompt"]), parameters, None, block_hasher=hasher)
            )
            self.scheduler.add_request(self.requests[-1])
        self.run(ahead)

    def run(self, ahead: int) -> None:
        in_flight: deque[Any] = deque()
        while self.scheduler.has_requests() or in_flight:
            if self.scheduler.has_requests():
                scheduled = self.scheduler.schedule()
                self.record(scheduled)
                in_flight.append((scheduled, self.output(scheduled)))
                if len(in_flight) <= ahead and self.scheduler.has_requests():
                    continue
            for outputs in self.scheduler.update_from_output(*in_flight.popleft()).values():
                for output in outputs.outputs:
                    self.handed_on += 1
                    self.tokens[output.request_id] += output.new_token_ids
                    if output.finish_reason is not None:
                        self.reasons[output.request_id] = str(output.finish_reason)
            assert len(self.trace) < 5000, "the scheduler never ends"

    def record(self, scheduled: Any) -> None:
        cached = scheduled.scheduled_cached_reqs
        self.preemptions += len(scheduled.preempted_req_ids or ())
        self.trace.append(
            (
                dict(scheduled.num_scheduled_tokens),
                [(new.req_id, new.num_computed_tokens, new.block_ids) for new in scheduled.scheduled_new_reqs],
                list(zip(cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True)),
                cached.new_block_ids,
                set(cached.resumed_req_ids),
                set(scheduled.preempted_req_ids or ()),
                set(scheduled.finished_req_ids),
            )
        )

    def output(self, scheduled: Any) -> Any:
        """What the model runner returns: a token for every row that has come to the end of its request's tokens."""
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        cached = scheduled.scheduled_cached_reqs
        known = {
            new.req_id: (new.num_computed_tokens, self.prompts[new.req_id]) for new in scheduled.scheduled_new_reqs
        }
        for name, computed, answered in zip(
            cached.req_ids, cached.num_computed_tokens, cached.num_output_tokens, strict=True
        ):
            known[name] = (computed, self.prompts[name] + answered)
        names = sorted(known)  # an order of the runner's own
        tokens, logprobs = [], []
        for name in names:
            computed, length = known[name]
            end = computed + scheduled.num_scheduled_tokens[name]
            token, logprob = sampled(name, end)
            tokens.append([token] if end >= length else [])
            logprobs.append(logprob)
            self.parts_of_prompts += end < length
        if not names:
            return ModelRunnerOutput(req_ids=[], req_id_to_index={})
        column = np.array(logprobs)[:, None]
        lists = LogprobsLists(np.array([row or [0] for row in tokens]), column, np.zeros(len(names)))
        places = {name: row for row, name in enumerate(names)}
        return ModelRunnerOutput(req_ids=names, req_id_to_index=places, sampled_token_ids=tokens, logprobs=lists)


def drive(
    config: Any, ahead: int, blocks: int, requests: list[dict[str, Any]], deliver_on_finish: bool
) -> tuple[Driven, Any, Any]:
    """vLLM's own scheduler and ours over the same requests, and what ours collected."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    from grpo.rollout.vllm_scheduler import LogprobCollector, rollout_scheduler

    kind = AsyncScheduler if ahead else Scheduler
    config.scheduler_config.async_scheduling = bool(ahead)
    collector = LogprobCollector()
    collector.begin(deliver_on_finish=deliver_on_finish)
    for request in requests:
        collector.enter(request["name"].split("-")[0], request["name"])
    vllms = Driven(kind, config, blocks, requests, ahead)
    ours = Driven(rollout_scheduler(kind, collector), config, blocks, requests, ahead)
    return vllms, ours, collector


@pytest.mark.parametrize("deliver_on_finish", [True, False], ids=["on finish", "token by token"])
@pytest.mark.parametrize("ahead", [0, 1], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("blocks", [200, 14], ids=["roomy", "preempting"])
def test_every_step_is_the_one_that_vllms_scheduler_makes(
    vllm_config: Any, blocks: int, ahead: int, deliver_on_finish: bool
) -> None:
    parts = preemptions = 0
    for seed in range(6):
        vllms, ours, _ = drive(vllm_config, ahead, blocks, random_requests(seed), deliver_on_finish)
        assert ours.trace == vllms.trace
        assert ours.tokens == vllms.tokens and ours.reasons == vllms.reasons
        assert set(ours.reasons.values()) == {"stop", "length"}
        in_flight = [request.num_in_flight_tokens for request in ours.requests]
        assert in_flight == [request.num_in_flight_tokens for request in vllms.requests]
        assert ours.handed_on == (12 if deliver_on_finish else vllms.handed_on)
        parts, preemptions = parts + ours.parts_of_prompts, preemptions + ours.preemptions
    assert parts > 0, "no prompt was computed in pieces"
    assert (preemptions > 0) == (blocks == 14)


@pytest.mark.parametrize("ahead", [0, 1], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("blocks", [200, 14], ids=["roomy", "preempting"])
def test_every_token_has_the_logprob_that_it_was_sampled_with(vllm_config: Any, blocks: int, ahead: int) -> None:
    for seed in range(6):
        requests = random_requests(seed)
        _, ours, collector = drive(vllm_config, ahead, blocks, requests, True)
        for request in requests:
            name, start = request["name"], len(request["prompt"])
            count = len(ours.tokens[name])
            expected = [sampled(name, position) for position in range(start, start + count)]
            assert ours.tokens[name] == [token for token, _ in expected]
            assert collector.take(name.split("-")[0])[0][:count] == [logprob for _, logprob in expected]


def test_a_token_that_vllm_drops_takes_its_logprob_with_it() -> None:
    from types import SimpleNamespace

    from grpo.rollout.vllm_scheduler import collect_logprobs

    request = SimpleNamespace(num_output_tokens=1)
    logprobs = {"a": [-0.5]}

    def step(logprob: float, tokens: list[int]) -> None:
        lists = SimpleNamespace(logprobs=np.array([[logprob], [-9.0]]))
        output = SimpleNamespace(req_ids=["a", "gone"], sampled_token_ids=[tokens, [4]], logprobs=lists)
        collect_logprobs(output, {"a": request}, logprobs)
        assert output.logprobs is None, "vLLM would make its lists"

    step(-1.0, [3])  # sampled, and then dropped: the request has one token still
    step(-2.0, [])  # a part of its tokens computed again
    step(-3.0, [5])
    assert logprobs == {"a": [-0.5, -3.0]}


def test_hashes_that_are_known_are_taken_over_once() -> None:
    from types import SimpleNamespace

    from grpo.rollout.vllm_scheduler import ContinuedHasher

    hasher = ContinuedHasher(lambda request: [f"own {len(request.block_hashes)}".encode()])
    hasher.known = [b"a", b"b"]
    first, second = SimpleNamespace(block_hashes=[]), SimpleNamespace(block_hashes=[])
    assert hasher(first) == [b"own 2"] and first.block_hashes == [b"a", b"b"]
    assert hasher(second) == [b"own 0"] and second.block_hashes == []
