"""Rollout speed on one GPU: our NF4 base with an adapter, against vLLM's own ways to serve the same shape.

Four systems, each in a process of its own, on random weights with random prompts that groups of 8 share, the sampled
tokens' logprobs on and nothing detokenised:

- `ours`: NF4, the adapter in our linear layers;
- `bnb-lora`: vLLM with bitsandbytes NF4 and its LoRA;
- `bf16-lora` and `bf16`: vLLM unquantised, with and without its LoRA.

vLLM's are compiled as it does by default. What is measured is written after every rollout size, each system's beside
OUT, so that systems can be run apart, on several GPUs, and joined.

    python -m benchmarks.rollout --shape 3b --out benchmarks/results/rollout_3b.json
    python -m benchmarks.rollout --shape 3b --systems ours --counts 128 --new-tokens 512
    python -m benchmarks.rollout --shape 30b_a3b --systems ours,bf16 --counts 32,128 --prompt-tokens 512
    python -m benchmarks.rollout --shape 3b --join a.json b.json --out benchmarks/results/rollout_3b.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.processes import turn, wait_or_end

SYSTEMS = ("ours", "bnb-lora", "bf16-lora", "bf16")
BARS = {32: {"bnb-lora": 2.0, "bf16-lora": 1.0}, 256: {"bnb-lora": 1.4}}
"""Sequences -> system -> how many times its tokens a second ours should reach."""
BARS_OF_EXPERTS = {32: {"bf16": 1.5}, 128: {"bf16": 1.5}}
"""The same of shapes with experts, of which vLLM serves no LoRA and bitsandbytes no experts; ours has an adapter on
attention."""
GROUP = 8
RANK = 16


# The side of one system


def grouped_prompts(vocabulary: int, count: int, tokens: int, seed: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(10, vocabulary, (-(-count // GROUP), tokens), generator=generator).tolist()
    return [prompts[number // GROUP] for number in range(count)]


def our_rollout(options: argparse.Namespace) -> Callable[[list[list[int]], int, int], int]:
    """A function of (prompts, new tokens, seed) that samples and returns how many tokens came."""
    import torch

    from benchmarks.common import shared_model as shared
    from benchmarks.common.decoding import choose
    from benchmarks.common.random_model import RandomSource
    from grpo.config.schema import Lora, Model
    from grpo.model.base_weights import BaseWeights
    from grpo.policy.policy import Policy
    from grpo.rollout.engine import Engine, EngineSettings

    device = torch.device(options.device)
    model = Model(name="random", load_in_4bit=True)
    base = BaseWeights(RandomSource(options.shape, device), model, device=device, dtype=torch.bfloat16)
    policy = Policy(base, Lora(r=RANK, lora_alpha=2 * RANK), seed=0)
    shared.randomize_adapter(policy)
    settings = EngineSettings(
        max_seq_length=options.prompt_tokens + options.new_tokens,
        max_num_seqs=max(options.counts),
        kv_cache_dtype=options.kv_cache_dtype,
        attention_backend=choose(options.backend),
    )
    return sampler_of(Engine(base, policy, settings))


def sampler_of(engine: Any) -> Callable[[list[list[int]], int, int], int]:
    """The same of an engine of ours that runs."""
    from grpo.rollout.engine import Request, SamplingSettings

    def sample(prompts: list[list[int]], new_tokens: int, seed: int) -> int:
        requests = [Request(number, prompt, seed) for number, prompt in enumerate(prompts)]
        return sum(len(done.token_ids) for done in engine.generate(requests, SamplingSettings(1.0, new_tokens)))

    return sample


def vllm_rollout(options: argparse.Namespace) -> Callable[[list[list[int]], int, int], int]:
    """The same of vLLM's own."""
    from grpo.rollout.vllm_environment import set_environment

    set_environment()
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import RequestOutputKind

    quantised, lora, kv = options.system == "bnb-lora", options.system != "bf16", options.peer_kv_gb
    folder = prepare_folder(options)
    arguments: dict[str, Any] = {
        "load_format": "bitsandbytes" if quantised else "dummy",
        "quantization": "bitsandbytes" if quantised else None,
    }
    if lora:
        arguments |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK}
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_num_seqs=max(options.counts),
        max_model_len=options.prompt_tokens + options.new_tokens, max_num_batched_tokens=8192,
        logprobs_mode="processed_logprobs", disable_log_stats=True, generation_config="vllm",
        gpu_memory_utilization=options.peer_memory if kv is None else 0.05,
        kv_cache_memory_bytes=None if kv is None else int(kv * 1e9), **arguments,
        compilation_config={"cudagraph_capture_sizes": sorted(options.counts)}, enforce_eager=options.enforce_eager,
    )  # fmt: skip
    core = llm.llm_engine
    request = LoRARequest("adapter", 1, str(folder / "adapter")) if lora else None

    def sample(prompts: list[list[int]], new_tokens: int, seed: int) -> int:
        params = SamplingParams(
            temperature=1.0, max_tokens=new_tokens, ignore_eos=True, logprobs=0, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY, flat_logprobs=True,
        )  # fmt: skip
        for number, prompt in enumerate(prompts):
            core.add_request(str(number), {"prompt_token_ids": prompt}, params, lora_request=request)
        tokens = 0
        while core.has_unfinished_requests():
            tokens += sum(len(output.outputs[0].token_ids) for output in core.step() if output.finished)
        assert llm.reset_prefix_cache()
        return tokens

    return sample


def one_system(options: argparse.Namespace) -> dict[str, Any]:
    """Every count of `options.counts`: seconds and tokens a second of whole rollouts, the median of `repeats`."""
    started = time.time()
    sample = our_rollout(options) if options.system == "ours" else vllm_rollout(options)
    from benchmarks.common.random_model import shape_config
    from grpo.run.versions import hardware, versions

    vocabulary = shape_config(options.shape).vocab_size
    found: dict[str, Any] = {"system": options.system, "started_in_s": round(time.time() - started, 1), "rollouts": []}
    found |= {"hardware": hardware(), "versions": versions()}
    with turn(options.turns):
        measure_counts(options, sample, vocabulary, found)
    return found


def measure_counts(options: argparse.Namespace, sample: Any, vocabulary: int, found: dict[str, Any]) -> None:
    for count in options.counts:
        try:
            found["rollouts"].append(one_count(options, sample, vocabulary, count))
        except Exception as error:
            traceback.print_exc()
            found.setdefault("errors", {})[str(count)] = f"{type(error).__name__}: {error}"[:300]
        if options.out:
            write(options.out, found)


def one_count(options: argparse.Namespace, sample: Any, vocabulary: int, count: int) -> dict[str, Any]:
    from benchmarks.common.shared_model import synchronize

    sample(grouped_prompts(vocabulary, count, options.prompt_tokens, 1), 16, 1)
    seconds = []
    for repeat in range(options.repeats):
        prompts = grouped_prompts(vocabulary, count, options.prompt_tokens, 100 + repeat)
        synchronize()
        begun = time.perf_counter()
        tokens = sample(prompts, options.new_tokens, 100 + repeat)
        synchronize()
        seconds.append(time.perf_counter() - begun)
        assert tokens == count * options.new_tokens, (tokens, count)
    median = statistics.median(seconds)
    rate = count * options.new_tokens / median
    print(f"{options.system:10} {count:4} sequences: {median:7.3f} s {rate:9,.0f} tokens/s", flush=True)
    return {
        "sequences": count,
        "new_tokens": options.new_tokens,
        "seconds": round(median, 3),
        "all_seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": round(rate, 1),
    }


# All of them


def prepare_folder(options: argparse.Namespace) -> Path:
    """The checkpoint and the adapter that one of vLLM's own systems reads; without weights where it makes them up."""
    import torch
    from safetensors.torch import save_file

    from benchmarks.common.random_model import checkpoint_folder, shape_config
    from grpo.model.sizes import linear_shapes

    config = shape_config(options.shape)
    if options.system == "bnb-lora":
        folder = checkpoint_folder(options.shape, options.scratch)
    else:
        folder = options.scratch / f"rollout-{options.shape}-{options.system}"
        folder.mkdir(exist_ok=True, parents=True)
        config.save_pretrained(folder)
    if options.system == "bf16":
        return folder
    tensors = {}
    for name, (rows, columns) in linear_shapes(config).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = (torch.randn(RANK, columns) * columns**-0.5).bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (torch.randn(rows, RANK) * 0.02).bfloat16()
    (folder / "adapter").mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    about = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in linear_shapes(config)}),
    }  # fmt: skip
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    return folder


def place_of(options: argparse.Namespace, system: str) -> Path:
    """Where the process of `system` writes what it measures."""
    return (options.out or options.scratch / "rollout.json").with_suffix(f".{system}.json")


def start_system(options: argparse.Namespace, system: str) -> subprocess.Popen[bytes]:
    place = place_of(options, system)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.rollout", "--system", system, *options.passed, "--out", str(place)]
    with open(place.with_suffix(".log"), "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def result_of_system(
    options: argparse.Namespace, system: str, process: subprocess.Popen[bytes], ends: float
) -> dict[str, Any]:
    """What the process of `system` measures, and as far as it got if the time was up first."""
    place, begun = place_of(options, system), time.monotonic()
    said = wait_or_end(process, ends - begun)
    text = place.with_suffix(".log").read_text(errors="replace")
    print("\n".join(line for line in text.splitlines() if line.startswith(system)), flush=True)
    found = json.loads(place.read_text()) if place.exists() else {"system": system}
    if said:
        found |= {"error": said, "log": text[-1500:]}
    return {**found, "wall_s": round(time.monotonic() - begun, 1)}


def write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".part").replace(file)


def joined(files: list[Path]) -> dict[str, dict[str, Any]]:
    """System -> what was measured, out of results of this script and of single systems; of two, the longer."""
    systems: dict[str, dict[str, Any]] = {}
    for file in files:
        content = json.loads(file.read_text())
        for system, found in content.get("systems", {content.get("system"): content}).items():
            if len(found.get("rollouts", [])) >= len(systems.get(system, {}).get("rollouts", [])):
                systems[system] = found
    return {system: systems[system] for system in SYSTEMS if system in systems}


def ratios(shape: str, systems: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each other system's tokens a second, with the bar where there is one."""
    bars = BARS_OF_EXPERTS if shape in ("30b_a3b", "tiny_experts") else BARS
    rates = {
        name: {entry["sequences"]: entry["tokens_per_second"] for entry in found.get("rollouts", [])}
        for name, found in systems.items()
    }
    rows = []
    for count, ours in rates.get("ours", {}).items():
        for name in systems:
            if name != "ours" and count in rates[name]:
                bar = bars.get(count, {}).get(name)
                ratio = round(ours / rates[name][count], 3)
                rows.append({"sequences": count, "against": name, "ratio": ratio, "bar": bar})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="3b", help="3b, 8b, or tiny")
    parser.add_argument("--systems", default=",".join(SYSTEMS), type=lambda text: text.split(","))
    parser.add_argument("--system", choices=SYSTEMS, help="run this one alone, in this process")
    parser.add_argument("--counts", default="1,32,128,256", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kv-cache-dtype", default="auto", help="ours: auto or fp8")
    parser.add_argument("--peer-memory", type=float, default=0.8, help="gpu_memory_utilization of vLLM's own systems")
    parser.add_argument("--enforce-eager", action="store_true", help="vLLM's own systems without compilation")
    parser.add_argument(
        "--peer-kv-gb",
        type=float,
        help="KV cache of vLLM's own systems; without, they measure what is left",
    )
    parser.add_argument(
        "--turns", type=Path, metavar="FILE", help="start all systems at once; who has a lock on FILE is measured"
    )
    parser.add_argument("--backend", default="auto", help="ours: see benchmarks/common/decoding.py")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--budget", type=float, default=560, help="seconds for everything")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="measure nothing: results to put together")
    options = parser.parse_args()
    if options.system:
        print(json.dumps(one_system(options)))
        return 0
    options.passed = sys.argv[1:]
    ends = time.monotonic() + options.budget
    systems = joined(options.join) if options.join else {}
    wanted = [] if options.join else options.systems
    running = {system: start_system(options, system) for system in wanted if options.turns}
    for system in wanted:
        process = running.get(system) or start_system(options, system)
        systems[system] = result_of_system(options, system, process, ends)
        if options.out:
            write(options.out, result_of(options.shape, systems))
    result = result_of(options.shape, systems)
    for row in result["ratios"]:
        bar = f" (bar {row['bar']}x)" if row["bar"] else ""
        print(f"ours over {row['against']:10} at {row['sequences']:4}: {row['ratio']:.2f}x{bar}")
    for system, found in systems.items():
        if "error" in found:
            print(f"{system}: {found['error']} {found['log'][-600:]}")
    if options.out:
        write(options.out, result)
    print(json.dumps({"benchmark": "rollout", "shape": options.shape, "ratios": result["ratios"]}))
    return 0


def result_of(shape: str, systems: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"benchmark": "rollout", "shape": shape, "systems": systems, "ratios": ratios(shape, systems)}


if __name__ == "__main__":
    sys.exit(main())
