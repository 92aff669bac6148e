"""Rollout on a CPU: vLLM on the shared weights with an adapter, against plain vLLM without one.

Both generate exactly the same number of tokens from the same prompts, eight completions of each, in eager mode, with
the same KV cache. The adapter has rank 16 on all seven projections and random values. Plain vLLM loads the same
weights from a folder. It is timed twice: with the sampling that training needs (a seed for every request, the sampled
tokens' logprobs), which the ratio refers to, and without either. Repeats of the systems alternate.

    python -m benchmarks.rollout_cpu                                     # about five minutes
    python -m benchmarks.rollout_cpu --sequences 8 --tokens 4 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.cpu_workload import MODEL, Worker, chat_prompts, export_model, peak_rss_gib, serve

SYSTEMS = {"shared": "shared weights, adapter", "plain": "plain vLLM", "bare": "plain vLLM, no seeds or logprobs"}
GENERATIONS = 8
LONGEST_PROMPT = 96


def main() -> int:
    options = parse()
    if options.worker:
        return work(options)
    from grpo.run.versions import hardware, versions

    sizes = [int(size) for size in options.sequences.split(",")]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rollout-cpu-") as folder:
        export_model(Path(folder))
        shape = ("--sequences", max(sizes), "--tokens", options.tokens, "--folder", folder)
        with (
            Worker("benchmarks.rollout_cpu", "shared", *shape) as shared,
            Worker("benchmarks.rollout_cpu", "plain", *shape) as plain,
        ):
            workers = {"shared": shared, "plain": plain, "bare": plain}
            seconds = measure(workers, sizes, options.repeats)
            memory = {name: worker.ask()["peak_rss_gib"] for name, worker in workers.items() if name != "bare"}
    result = {
        "benchmark": "rollout_cpu",
        "hardware": hardware(),
        "versions": versions(),
        "settings": {"model": MODEL, "completion_tokens": options.tokens, "repeats": options.repeats, "lora_rank": 16},
        "seconds_total": round(time.monotonic() - started, 1),
        "peak_rss_gib": memory,
        "sequences": {str(size): summary(seconds, size, options.tokens) for size in sizes},
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sequences", default="16,64", help="comma-separated, multiples of 8")
    parser.add_argument("--tokens", type=int, default=64, help="length of every completion")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each system, after one warm-up")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    parser.add_argument("--worker", choices=["shared", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(workers: dict[str, Worker], sizes: list[int], repeats: int) -> dict[tuple[str, int], list[float]]:
    """Seconds of every repeat by system and number of sequences; the systems take turns."""
    seconds: dict[tuple[str, int], list[float]] = {(name, size): [] for name in workers for size in sizes}
    for repeat in range(repeats + 1):
        for size in sizes:
            for name, worker in workers.items():
                answer = worker.ask(sequences=size, bare=name == "bare", repeat=repeat)
                if repeat:
                    seconds[name, size].append(answer["seconds"])
    return seconds


def summary(seconds: dict[tuple[str, int], list[float]], size: int, tokens: int) -> dict[str, Any]:
    """Median tokens per second of each system, their range, and the ratios to plain vLLM."""
    rates = {name: sorted(size * tokens / each for each in seconds[name, size]) for name in SYSTEMS}
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
        "range": {name: [round(values[0], 1), round(values[-1], 1)] for name, values in rates.items()},
        "ratio_to_plain": round(medians["shared"] / medians["plain"], 3),
        "ratio_to_bare": round(medians["shared"] / medians["bare"], 3),
    }


def show(result: dict[str, Any]) -> None:
    print(f"{'sequences':>9}  {'tokens/s':>9}  {'range':>17}  {'to plain':>8}  system")
    for size, entry in result["sequences"].items():
        for name, label in SYSTEMS.items():
            rate, (low, high) = entry["tokens_per_second"][name], entry["range"][name]
            ratio = rate / entry["tokens_per_second"]["plain"]
            print(f"{size:>9}  {rate:9.1f}  {low:8.1f}-{high:8.1f}  {ratio:8.2f}  {label}")
    print("peak RSS, GiB: " + ", ".join(f"{name} {value:.2f}" for name, value in result["peak_rss_gib"].items()))


def work(options: argparse.Namespace) -> int:
    """A worker: answers `{sequences, bare, repeat}` with seconds, and anything else with its peak memory."""
    generate = (shared_system if options.worker == "shared" else plain_system)(options)

    def answer(command: dict[str, Any]) -> dict[str, Any]:
        if "sequences" not in command:
            return {"peak_rss_gib": round(peak_rss_gib(), 3)}
        start = time.perf_counter()
        counts = generate(command["sequences"], command["bare"], command["repeat"])
        seconds = time.perf_counter() - start
        assert counts == [options.tokens] * command["sequences"], counts
        return {"seconds": seconds}

    serve(answer)
    return 0


def prompt_ids(tokenizer: Any, sequences: int) -> list[list[int]]:
    """Token ids of `sequences` prompts, each one GENERATIONS times."""
    chats = chat_prompts(-(-sequences // GENERATIONS))
    encoded = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    return [list(ids) for ids in encoded for _ in range(GENERATIONS)][:sequences]


def shared_system(options: argparse.Namespace) -> Any:
    """This project's engine: the one copy, an adapter that does something, prefixes forgotten before every rollout."""
    import torch

    from grpo.config.schema import Lora, Model
    from grpo.model.base_weights import BaseWeights
    from grpo.model.source import open_source
    from grpo.policy.policy import Policy
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    model = Model(name=MODEL, load_in_4bit=False)
    source = open_source(model)
    base = BaseWeights(source, model, device=torch.device("cpu"), dtype=torch.bfloat16)
    policy = Policy(base, Lora(r=16))
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            layer.lora_B["default"].weight.normal_(std=0.01)
    length = LONGEST_PROMPT + options.tokens
    engine = Engine(base, policy, EngineSettings(max_seq_length=length, max_num_seqs=int(options.sequences)))
    prompts = prompt_ids(source.tokenizer(), int(options.sequences))

    def generate(sequences: int, bare: bool, repeat: int) -> list[int]:
        engine.sync_adapter()
        requests = [Request(i, ids, 1000 * repeat + i) for i, ids in enumerate(prompts[:sequences])]
        return [len(c.token_ids) for c in engine.generate(requests, SamplingSettings(1.0, options.tokens))]

    return generate


def plain_system(options: argparse.Namespace) -> Any:
    """vLLM as it comes, on a folder of the same weights."""
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    import vllm
    from transformers import AutoTokenizer
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    length = LONGEST_PROMPT + options.tokens
    blocks = -(-length // 32) * int(options.sequences) + 2
    llm = vllm.LLM(
        str(options.folder),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=length,
        max_num_seqs=int(options.sequences),
        max_num_batched_tokens=8192,
        block_size=32,
        kv_cache_memory_bytes=blocks * 32 * 2 * 30 * 3 * 64 * 2,  # 30 layers, 3 KV heads of 64, 2 bytes
        generation_config="vllm",
        disable_log_stats=True,
    )
    prompts = prompt_ids(AutoTokenizer.from_pretrained(options.folder), int(options.sequences))

    def generate(sequences: int, bare: bool, repeat: int) -> list[int]:
        llm.reset_prefix_cache()
        chosen: dict[str, Any] = {"temperature": 1.0, "max_tokens": options.tokens, "ignore_eos": True}
        chosen |= {"detokenize": False, "output_kind": RequestOutputKind.FINAL_ONLY}
        if not bare:
            chosen |= {"logprobs": 0, "flat_logprobs": True}
        sampling = [
            SamplingParams(**chosen, seed=None if bare else 1000 * repeat + number) for number in range(sequences)
        ]
        requests = [{"prompt_token_ids": ids} for ids in prompts[:sequences]]
        return [len(output.outputs[0].token_ids) for output in llm.generate(requests, sampling, use_tqdm=False)]

    return generate


if __name__ == "__main__":
    sys.exit(main())
