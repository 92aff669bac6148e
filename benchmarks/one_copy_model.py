"""Loads a random-weight model as NF4, starts vLLM on it, and measures: start-up, memory, identity, sync, throughput.

One process, one model, one way of serving the adapter; `gpu_one_copy.py` starts several and compares. Start-up counts
from the process's creation, so the imports are timed too: that is why they are inside functions here.

    python -m benchmarks.one_copy_model --shape 3b --measure startup,memory,sync,throughput
    python -m benchmarks.one_copy_model --shape 3b --route vllm --measure sync,throughput
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import psutil

MEASURES = ("startup", "memory", "sync", "throughput", "agreement")


class Clock:
    """Seconds between laps, the first of which starts when the operating system made this process."""

    def __init__(self) -> None:
        self.last = psutil.Process().create_time()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.time()
        self.laps[name] = round(now - self.last, 2)
        self.last = now

    def rest(self) -> None:
        """Leave out the time since the last lap."""
        self.last = time.time()


def timed_imports(clock: Clock) -> None:
    import torch

    clock.lap("import_torch")
    import peft  # noqa: F401
    import transformers  # noqa: F401

    clock.lap("import_transformers_peft")
    import grpo.rollout.engine  # noqa: F401

    clock.lap("import_vllm_grpo")
    if torch.cuda.is_available():
        torch.cuda.init()
        torch.zeros(1, device="cuda")
        clock.lap("cuda_context")


def make_source(options: argparse.Namespace, device: Any) -> tuple[Any, dict[str, Any]]:
    """The checkpoint to load, and what is to be known of it."""
    from benchmarks.common.random_model import RandomSource, write_checkpoint
    from grpo.config.schema import Model
    from grpo.model.safetensors_source import SafetensorsSource

    source = RandomSource(options.shape, device)
    if options.checkpoint == "memory":
        return source, {"checkpoint": "random tensors handed out from memory"}
    folder = options.scratch / f"random-{options.shape}"
    started = time.time()
    size = write_checkpoint(source, folder)
    facts = {"checkpoint": "safetensors", "bytes": size, "written_in_s": round(time.time() - started, 1)}
    return SafetensorsSource(folder, Model(name=str(folder))), facts


def load(options: argparse.Namespace, clock: Clock) -> tuple[Any, Any, Any, dict[str, Any]]:
    """Base, policy, engine, and what loading showed."""
    import torch

    from benchmarks.common.lora_routes import VllmLoraEngine
    from benchmarks.common.random_model import expected_bytes
    from grpo.config.schema import Lora, Model
    from grpo.model.base_weights import BaseWeights
    from grpo.policy.policy import Policy
    from grpo.rollout.engine import Engine, EngineSettings

    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    source, facts = make_source(options, device)
    clock.rest()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    base = BaseWeights(source, Model(name="random", load_in_4bit=True), device=device, dtype=torch.bfloat16)
    if on_gpu:
        torch.cuda.synchronize()
    clock.lap("load_nf4")
    expected = expected_bytes(source.config)
    facts |= {"expected_bytes": expected, "owned_bytes": base.nbytes()}
    if on_gpu:
        facts["load_peak_bytes"] = torch.cuda.max_memory_allocated() - before
        facts["loaded_bytes"] = torch.cuda.memory_allocated() - before
    policy = Policy(base, Lora(r=16, lora_alpha=32), seed=0)
    clock.lap("build_policy")
    settings = EngineSettings(max_seq_length=options.max_seq_length, max_num_seqs=max(options.sequences))
    if options.route == "vllm":
        engine: Engine = VllmLoraEngine(base, policy, settings)
    else:
        engine = Engine(base, policy if options.route == "in_layer" else None, settings)
    clock.lap("start_vllm")
    return base, policy, engine, facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything `--measure` asks for."""
    clock = Clock()
    clock.lap("interpreter")
    timed_imports(clock)
    base, policy, engine, facts = load(options, clock)
    from benchmarks.common import shared_model as shared
    from grpo.run.versions import hardware, versions

    result: dict[str, Any] = {"shape": options.shape, "route": options.route, **facts}
    with_adapter = options.route != "none"
    clock.rest()
    shared.rollout_seconds(engine, 1, options.prompt_tokens, 1, seed=0)
    clock.lap("first_token")
    result["startup"] = {**clock.laps, "total": round(sum(clock.laps.values()), 2)}
    if "memory" in options.measure:
        result["identity"] = shared.identity(engine, policy) if options.route != "vllm" else None
        if base.device.type == "cuda":
            result["memory"] = shared.memory_parts(engine, policy)
    if with_adapter:
        shared.randomize_adapter(policy)
        engine.sync_adapter()
    if "sync" in options.measure and with_adapter:
        result["sync"] = shared.sync_times(engine, policy)
    if "agreement" in options.measure and with_adapter:
        requests = shared.random_requests(base.config.vocab_size, 16, options.prompt_tokens, seed=7)
        result["agreement"] = shared.agreement(engine, policy, [list(r.prompt_ids) for r in requests], 32)
    if "throughput" in options.measure:
        result["throughput"] = [
            shared.throughput(engine, count, options.prompt_tokens, options.new_tokens) for count in options.sequences
        ]
    result |= {"hardware": hardware(), "versions": versions()}
    engine.close()
    if options.checkpoint == "disk":
        shutil.rmtree(options.scratch / f"random-{options.shape}")
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="3b", help="3b, 8b, or tiny")
    parser.add_argument(
        "--route", choices=("in_layer", "vllm", "none"), default="in_layer", help="how the adapter acts"
    )
    parser.add_argument("--measure", default=",".join(MEASURES), type=lambda text: text.split(","))
    parser.add_argument("--checkpoint", choices=("memory", "disk"), default="memory", help="where weights come from")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"), help="folder for --checkpoint disk")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sequences", default="32,128", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--max-seq-length", type=int, default=512)
    options = parser.parse_args()
    unknown = set(options.measure) - set(MEASURES)
    if unknown:
        parser.error(f"--measure {sorted(unknown)[0]}: choose from {', '.join(MEASURES)}")
    result = measure(options)
    print("  ".join(f"{name} {seconds:.1f} s" for name, seconds in result["startup"].items()))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
