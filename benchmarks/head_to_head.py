"""Whole GRPO steps, ours and one other trainer's, on the same work, the same GPU and in the same run.

A checkpoint of Llama-3.2-3B's shape with random weights, LoRA of rank 16 on all seven projections, temperature 1, no
reference policy, a reward that costs nothing; prompts of 128 tokens, as many completions as `--size` says, each made to
go on to its end. Ours is in NF4 and corrects the mismatch of sampler and trainer, by its default, from the training
pass itself; Unsloth is in NF4 too; TRL in 16 bit, as it cannot serve a 4-bit base without losing adapters to rounding.
The others' correction costs a forward pass, so they have steps with it and without.

    python -m benchmarks.head_to_head --peer unsloth --tokenizer FOLDER --out head_to_head.json
    python -m benchmarks.head_to_head --peer trl --size long --micro-batches 8,32
    python -m benchmarks.head_to_head --join a.json b.json --out benchmarks/results/head_to_head.json

A system has a process of its own, one after another; its first step compiles and counts only for how long a start
takes, from the command to that step's end. Memory is the most that torch had allocated in a later step, the KV cache
left out. `ours-lean` recomputes MLPs, in micro-batches that stay below 12 GiB; `ours-fp8` has its KV cache in FP8. What
is measured is written system by system. Prints a table; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.grpo_peers import PHASES
from benchmarks.common.processes import wait_or_end, write_result

ROOT = Path(__file__).resolve().parent.parent
PROMPT, RANK = 128, 16
OURS = ("ours", "ours-lean", "ours-fp8")
TOKENS = {"ours": 32768, "ours-lean": 8192, "ours-fp8": 32768}
"""train.tokens_per_micro_batch."""
BLOCK = 16
"""Tokens of a block of the KV cache."""


class Size(NamedTuple):
    """Of a step."""

    prompts: int
    generations: int
    completion: int


SIZES = {"fixed": Size(16, 8, 512), "long": Size(16, 8, 2048), "short": Size(64, 8, 128), "tiny": Size(2, 4, 8)}
BARS = {"fixed": {"ours": 4.4, "ours-lean": 4.8}}
"""Seconds of a whole step on an H200."""
TIMES = {"long": 2.3}
"""Of the peer's whole step, without its correction."""


# The work


def make_work(options: argparse.Namespace) -> Path:
    """A folder with the checkpoint, a tokenizer that has a word for every id, and prompts.jsonl."""
    from benchmarks.common.random_model import checkpoint_folder
    from benchmarks.whole_step import write_tokenizer

    source = checkpoint_folder(options.shape, options.scratch)
    folder = options.scratch / f"head-to-head-{options.shape}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".safetensors", ".json") and not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    if options.tokenizer:
        words = widened_tokenizer(options.tokenizer, folder, config["vocab_size"])
        config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        (folder / "config.json").unlink()
        (folder / "config.json").write_text(json.dumps(config))
    else:
        write_tokenizer(folder, config["vocab_size"])
        words = [f" w{number}" for number in range(10, config["vocab_size"] - 100)]
    draw = random.Random(0)
    questions = ["".join(draw.choices(words, k=options.prompt)).strip() for _ in range(4 * options.size.prompts)]
    lines = [json.dumps({"question": question, "answer": "0"}) for question in questions]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def widened_tokenizer(source: Path, folder: Path, size: int) -> list[str]:
    """Copy a byte-level BPE tokenizer, with words that no text has for the ids up to `size`; returns words that are one
    token each, whatever is before them."""
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder)
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    known: dict[str, int] = tokenizer["model"]["vocab"]
    words = [word.replace("\u0120", " ") for word in known if word[0] == "\u0120" and word[1:].isascii()]
    known |= {f"\u0120<{number}>": number for number in range(len(known), size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    return sorted(word for word in words if word[1:].isalpha() and len(word) > 4)


# Ours


def ours_config(options: argparse.Namespace, name: str, folder: Path, run: Path) -> dict[str, Any]:
    """Sections of the configuration; the KV cache holds every sequence of a step and no more."""
    size, length = options.size, options.prompt + options.size.completion
    shape = json.loads((folder / "config.json").read_text())
    head = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    token = 2 * 2 * shape["num_hidden_layers"] * shape["num_key_value_heads"] * head
    blocks = (size.prompts * size.generations + 2) * (length // BLOCK + 2)
    train = {"learning_rate": 1e-5, "max_steps": options.steps, "tokens_per_micro_batch": TOKENS[name]}
    if name == "ours-lean":
        train["gradient_checkpointing"] = "mlp"
    reward = {"function": f"{ROOT}/benchmarks/common/grpo_peers.py:spread"}
    table = {"path": str(folder / "prompts.jsonl"), "chat": False, "eval_split": ""}
    cache = {"kv_cache_dtype": "fp8"} if name == "ours-fp8" else {}
    return {
        "model": {"name": str(folder), "load_in_4bit": True}, "lora": {"r": RANK, "lora_alpha": 2 * RANK},
        "task": {"name": "table", "options": table}, "rewards": [reward],
        "rollout": {
            "prompts_per_step": size.prompts, "num_generations": size.generations,
            "max_prompt_length": options.prompt, "max_completion_length": size.completion,
            "kv_cache_memory_bytes": blocks * BLOCK * token // (2 if cache else 1), **cache,
        },
        "train": train, "log": {"samples_every": 1000, "adapter_survival_every": None},
        "checkpoint": {"output_dir": str(run), "save_steps": 1000},
    }  # fmt: skip


def train_ours(config: Path) -> None:
    """What `python -m grpo.train` does, from a configuration as JSON; says when the first step has ended."""
    from grpo.config.schema import parse_config
    from grpo.run.importing import uncollected
    from grpo.run.library_logs import quiet_libraries

    quiet_libraries(False)
    with uncollected():
        from grpo.training.run import launch
    sections = json.loads(config.read_text())
    metrics = Path(sections["checkpoint"]["output_dir"]) / "metrics.jsonl"

    def watch() -> None:
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        print("FIRST " + json.dumps(time.time()), flush=True)

    threading.Thread(target=watch, daemon=True).start()
    launch(parse_config(sections))


def run_ours(options: argparse.Namespace, name: str, folder: Path, left: float) -> dict[str, Any]:
    run, file = options.scratch / f"head-to-head-{name}", options.scratch / f"head-to-head-{name}.json"
    shutil.rmtree(run, ignore_errors=True)
    config = ours_config(options, name, folder, run)
    file.write_text(json.dumps(config))
    found = run_logged([sys.executable, "-m", "benchmarks.head_to_head", "--train", str(file)], options, name, left)
    kv = 0.0 if options.device == "cpu" else config["rollout"]["kv_cache_memory_bytes"] / 2**30
    from grpo.run.records import read_entries

    names = (*PHASES[:-1], "reward_seconds", "tokens", "peak_memory_gib", "mismatch_kl")
    steps = [{one: entry.get(one) for one in names} for entry in read_entries(run / "metrics.jsonl")]
    first = [float(line.removeprefix("FIRST ")) for line in found.pop("lines") if line.startswith("FIRST ")]
    found |= {"tokens_per_micro_batch": TOKENS[name], "steps": steps, "kv_cache_gib": round(kv, 2)}
    found |= {"mismatch_kl": statistics.median(step["mismatch_kl"] for step in steps)} if steps else {}
    return found | started(found, first) | {"median": medians(steps[1:])} | memory(steps[1:], kv)


# The other


def run_peer(options: argparse.Namespace, micro_batch: int, folder: Path, left: float) -> dict[str, Any]:
    """A first step that compiles, then half of the others without its correction and half with it."""
    half = 1 + (options.peer_steps - 1 + 1) // 2
    corrected = (half + 1, options.peer_steps)
    work = {
        "folder": str(folder), "scratch": str(options.scratch), "micro_batch": micro_batch, "rank": RANK,
        "steps": options.peer_steps, "corrected": corrected, "prompt": options.prompt, **options.size._asdict(),
    }  # fmt: skip
    file = options.scratch / "head-to-head-work.json"
    file.write_text(json.dumps(work))
    command = [sys.executable, "-m", "benchmarks.common.grpo_peers", options.peer, str(file)]
    found = run_logged(command, options, f"{options.peer}-{micro_batch}", left)
    steps = [json.loads(line.removeprefix("STEP ")) for line in found.pop("lines") if line.startswith("STEP ")]
    found |= {"micro_batch": micro_batch, "steps": steps} | started(found, [step["ended"] for step in steps])
    # The step at which the correction comes on may compile what it needs.
    with_it = [step for step in steps if step["corrected"]]
    found["corrected"] = medians(with_it[1:] or with_it)
    found["median"] = medians([step for step in steps[1:] if not step["corrected"]])
    kv = steps[-1]["kv_cache_gib"] if steps else None
    return found | {"kv_cache_gib": kv} | memory(steps[1:], kv)


# Both


def run_logged(command: list[str], options: argparse.Namespace, name: str, left: float) -> dict[str, Any]:
    """When a command began, how long it took, whether it failed, and its lines."""
    log, began = options.scratch / f"head-to-head-{name}.log", time.time()
    environment = dict(os.environ)
    if name.startswith(f"{options.peer}-") and options.peer_path:
        environment["PYTHONPATH"] = f"{options.peer_path}:{environment.get('PYTHONPATH', '')}"
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
        said = wait_or_end(process, left)
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    found: dict[str, Any] = {"began": began, "wall_seconds": round(time.time() - began, 1), "lines": lines}
    if said:
        found |= {"failed": said, "log": "\n".join(lines)[-2500:]}
    return found


def started(found: dict[str, Any], ends: Sequence[float]) -> dict[str, Any]:
    return {"first_step_ended_s": round(ends[0] - found.pop("began"), 1)} if ends else {}


def medians(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of each phase, over all these steps; nothing without any."""
    names = [name for name in PHASES if steps and all(step.get(name) is not None for step in steps)]
    found = {name: round(statistics.median(step[name] for step in steps), 3) for name in names}
    return found | ({"counted": len(steps)} if steps else {})


def memory(steps: Sequence[dict[str, Any]], kv: float | None) -> dict[str, Any]:
    """The most that was allocated, and that without the KV cache, in GiB."""
    peaks = [step["peak_memory_gib"] for step in steps if step.get("peak_memory_gib") is not None]
    if not peaks or kv is None:
        return {}
    return {"peak_memory_gib": round(max(peaks), 2), "without_kv_gib": round(max(peaks) - kv, 2)}


def show(name: str, found: dict[str, Any]) -> None:
    for label in ("median", "corrected"):
        if found.get(label):
            text = "  ".join(f"{phase.removesuffix('_seconds')} {value:.2f}" for phase, value in found[label].items())
            print(f"{name:16} {'' if label == 'median' else '(with its correction) '}{text}", flush=True)
    print(f"{name:16} first step ended after {found.get('first_step_ended_s')} s; "
          f"{found.get('without_kv_gib')} GiB besides the KV cache; mismatch {found.get('mismatch_kl')}",
          flush=True)  # fmt: skip
    if "failed" in found:
        print(f"{name:16} {found['failed']}:\n{found['log']}", flush=True)


def ratios(systems: dict[str, Any]) -> dict[str, Any]:
    """The other's whole step over ours, without and with its correction."""
    step = {name: one.get("median", {}).get("step_seconds") for name, one in systems.items()}
    found: dict[str, Any] = {}
    for ours in (name for name in OURS if step.get(name)):
        for name, one in systems.items():
            for label in ("median", "corrected") if name not in OURS else ():
                if seconds := one.get(label, {}).get("step_seconds"):
                    key = f"{name} / {ours}" + (", its correction on" if label == "corrected" else "")
                    found[key] = round(seconds / step[ours], 2)
    return found


def joined(files: Sequence[Path]) -> dict[str, Any]:
    """Results of several runs, one entry a run."""
    return {"benchmark": "head_to_head", "runs": [json.loads(file.read_text()) for file in files]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="fixed", choices=SIZES)
    parser.add_argument("--peer", default="trl", choices=("trl", "unsloth"))
    parser.add_argument("--peer-path", help="what goes first on the peer's PYTHONPATH")
    parser.add_argument("--ours", default="ours,ours-lean", type=lambda text: [one for one in text.split(",") if one])
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--steps", type=int, default=4, help="ours")
    parser.add_argument("--peer-steps", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument(
        "--micro-batches", type=lambda text: [int(n) for n in text.split(",")],
        help="per_device_train_batch_size, one run each; by default 8, TRL's, and all of a step for Unsloth, which "
        "chooses its own within it",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="a folder with a byte-level BPE tokenizer; Unsloth wants one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--budget", type=float, default=580, help="seconds for everything")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--join", type=Path, nargs="+", help="put results of runs into one file")
    parser.add_argument("--train", type=Path, help="train ours in this process")
    options = parser.parse_args()
    if options.train:
        train_ours(options.train)
        return 0
    if options.join:
        options.out.write_text(json.dumps(joined(options.join), indent=1) + "\n")
        return 0
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Every system, one after another."""
    ends = time.monotonic() + options.budget
    if options.size == "tiny":
        options.shape, options.prompt, options.device = "tiny", 16, "cpu"
    size, options.size = options.size, SIZES[options.size]
    folder = make_work(options)
    whole = options.size.prompts * options.size.generations
    batches = options.micro_batches or [whole if options.peer == "unsloth" else min(8, whole)]
    result: dict[str, Any] = {"benchmark": "head_to_head", "shape": options.shape, "size": size}
    result |= {"prompt": options.prompt, **options.size._asdict(), "bars": BARS.get(size, {}), "systems": {}}
    first, *others = [(name, 0) for name in options.ours]
    for name, batch in [first, *((f"{options.peer}, {batch}", batch) for batch in batches), *others]:
        left = ends - time.monotonic()
        found = run_peer(options, batch, folder, left) if batch else run_ours(options, name, folder, left)
        result["systems"][name] = found
        result["ratios"] = ratios(result["systems"])
        show(name, found)
        write_result(options.out, result)
    print(json.dumps({"benchmark": "head_to_head", "size": size, "ratios": result["ratios"]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
