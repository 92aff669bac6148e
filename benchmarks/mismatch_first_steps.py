"""How far vLLM and the training graph are apart over an adapter's first six steps, by rank, dtype and kernels.

SmolLM2-135M-Instruct learns sums at lr 3e-4; a case is a process of its own, some at a time on one GPU. Random
adapters hide what this shows: theirs are large.

    python -m benchmarks.mismatch_first_steps --model SmolLM2-135M-Instruct.Q4_1.gguf --out $OUT/mismatch.json
    python -m benchmarks.mismatch_first_steps --cases nf4-r24,nf4-r24-fp16 --at-once 2
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def lora(rank: int, *targets: str) -> dict[str, Any]:
    return {"lora": {"r": rank, "lora_alpha": 2 * rank} | ({"target_modules": list(targets)} if targets else {})}


CASES: dict[str, dict[str, Any]] = {
    **{f"nf4-r{rank}": lora(rank) for rank in (4, 8, 16, 24, 64, 128)},
    **{f"16bit-r{rank}": lora(rank) | {"load_in_4bit": False} for rank in (8, 24)},
    **{f"nf4-r{rank}-fp16": lora(rank) | {"dtype": "float16"} for rank in (8, 24)},
    **{f"nf4-r{rank}-torch": lora(rank) | {"kernels": "torch"} for rank in (8, 24)},
    "nf4-fp32": lora(8) | {"dtype": "float32"},
    "nf4-qkv": lora(8, "q_proj", "k_proj", "v_proj"),
    "nf4-gate-up": lora(8, "gate_proj", "up_proj"),
    "nf4-o-down": lora(8, "o_proj", "down_proj"),
    "nf4-r24-lr1e-4": lora(24) | {"learning_rate": 1e-4},
    "nf4-64-prompts": lora(8) | {"prompts_per_step": 64},
}
LOADING = ("lora", "dtype", "kernels", "load_in_4bit")
TRAINING = {"max_steps": 6, "max_completion_length": 16, "prompts_per_step": 32, "learning_rate": 3e-4}


def brevity(completion_ids, **kwargs):
    return [1 - len(ids) / 16 for ids in completion_ids]


def measure(model: str, case: str, folder: str) -> list[dict[str, Any]]:
    """The metrics of each step; the difference is None in a step that had nothing to learn from."""
    import grpo

    settings = {"load_in_4bit": True} | CASES[case]
    policy = grpo.load(model, max_seq_length=256, **{key: settings[key] for key in LOADING if key in settings})
    training = TRAINING | {key: value for key, value in settings.items() if key not in LOADING}
    rollout = {"kv_cache_memory_bytes": 2_000_000_000}
    policy.train("arithmetic", rewards=["numeric_answer", brevity], output_dir=folder, rollout=rollout, **training)
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in ("mismatch_kl", "mismatch_logp_mean")} for line in lines]


def in_a_process(options: argparse.Namespace, case: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.mismatch_first_steps", "--model", options.model, "--case", case]
    done = subprocess.run(words, capture_output=True, text=True, timeout=options.budget)
    if done.returncode:
        return {"variant": case, "error": done.stderr[-400:]}
    steps = json.loads(done.stdout.strip().splitlines()[-1])
    found = {"variant": case} | {key: [step[key] for step in steps] for key in steps[0]}
    print(json.dumps(found), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="/tmp/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--cases", default=",".join(CASES), type=lambda text: text.split(","))
    parser.add_argument("--at-once", type=int, default=6)
    parser.add_argument("--budget", type=float, default=300, help="seconds for a case")
    parser.add_argument("--case", choices=CASES, help="this one, in this process")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.case:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(options.model, options.case, folder)))
        return 0
    with ThreadPoolExecutor(options.at_once) as pool:
        runs = list(pool.map(lambda case: in_a_process(options, case), options.cases))
    if options.out:
        options.out.write_text(json.dumps({"settings": TRAINING, "runs": runs}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
