"""What a decoding step costs the host in the scheduler alone: vLLM's own, and ours in its place, by how many sequences.

Requests of one prompt each decode side by side; the model's part is made up. What is timed is `schedule` and
`update_from_output`, the median over steps in which no sequence begins or ends. Runs on any machine; what counts is the
ratio within one run.

    python -m benchmarks.scheduler_host --out benchmarks/results/scheduler_host.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.processes import write_result

BLOCK, PROMPT = 16, 32


def engine_config(sequences: int) -> Any:
    """vLLM's configuration for a tiny model."""
    from grpo.rollout.vllm_environment import set_environment

    set_environment()
    from vllm.engine.arg_utils import EngineArgs

    from benchmarks.common.random_model import shape_config

    with tempfile.TemporaryDirectory() as folder:
        shape_config("tiny").save_pretrained(folder)
        arguments = EngineArgs(
            model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=4096, max_num_seqs=sequences,
            max_num_batched_tokens=1 << 16, block_size=BLOCK, enable_prefix_caching=True, enforce_eager=True,
            generation_config="vllm",
        )  # fmt: skip
        return arguments.create_engine_config()


def scheduler(kind: type, config: Any, sequences: int, tokens: int) -> tuple[Any, list[str]]:
    """A scheduler of `kind` with its requests, whose names are returned."""
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    init_none_hash(sha256)
    blocks = sequences * (PROMPT + tokens + BLOCK) // BLOCK + 8
    config.cache_config.num_gpu_blocks = blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=16, dtype=torch.float32)
    cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    made = kind(
        vllm_config=config, kv_cache_config=cache, structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )  # fmt: skip
    names = [str(number) for number in range(sequences)]
    for number, name in enumerate(names):
        parameters = SamplingParams(max_tokens=tokens, stop_token_ids=[1], ignore_eos=True, logprobs=0)
        prompt = [10 + number % 50] * PROMPT
        made.add_request(Request(name, prompt, parameters, None, block_hasher=get_request_block_hasher(BLOCK, sha256)))
    return made, names


def step_milliseconds(made: Any, names: list[str], tokens: int) -> float:
    """CPU time of a step in which all decode, one step ahead of their tokens as on a GPU."""
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    places = {name: row for row, name in enumerate(names)}
    sampled = np.full((len(names), 1), 7)
    logprobs = LogprobsLists(sampled, np.full((len(names), 1), -1.0), np.zeros(len(names)))
    times: list[float] = []
    in_flight: deque[Any] = deque([made.schedule()])
    for _ in range(tokens - 2):
        begun = time.thread_time()
        in_flight.append(made.schedule())
        between = time.thread_time()
        output = ModelRunnerOutput(
            req_ids=list(names), req_id_to_index=places, sampled_token_ids=sampled.tolist(), logprobs=logprobs
        )
        resumed = time.thread_time()
        made.update_from_output(in_flight.popleft(), output)
        times.append(time.thread_time() - resumed + between - begun)
    return statistics.median(times) * 1e3


def measure(sequences: int, tokens: int, repeats: int) -> dict[str, Any]:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from grpo.rollout.vllm_scheduler import LogprobCollector, rollout_scheduler

    config = engine_config(sequences)
    config.scheduler_config.async_scheduling = True
    found: dict[str, list[float]] = {"vllm": [], "ours": []}
    for _ in range(repeats):
        collector = LogprobCollector()
        collector.begin(deliver_on_finish=True)
        for number in range(sequences):
            collector.enter(str(number), str(number))
        for name, kind in (("vllm", AsyncScheduler), ("ours", rollout_scheduler(AsyncScheduler, collector))):
            found[name].append(step_milliseconds(*scheduler(kind, config, sequences, tokens), tokens))
    best = {f"{name}_ms": round(min(times), 3) for name, times in found.items()}
    return {"sequences": sequences, **best, "times_faster": round(best["vllm_ms"] / best["ours_ms"], 2)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sequences", default="128,256,512,1024", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "scheduler_host", "rows": []}
    for sequences in options.sequences:
        result["rows"].append(measure(sequences, options.tokens, options.repeats))
        print(result["rows"][-1], flush=True)
        write_result(options.out, result)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
