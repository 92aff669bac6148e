"""Whole GRPO steps, ours and one other trainer's, on the same work, the same GPU and in the same run.

A checkpoint of Llama-3.2-3B's shape with random weights, LoRA of rank 16 on all seven projections, temperature 1, no
reference policy, a reward that costs nothing; prompts of 128 tokens, as many completions as `--size` says, each made to
go on to its end. Ours is in NF4 and corrects the mismatch of sampler and trainer, by its default, from the training
pass itself; Unsloth is in NF4 too; TRL in 16 bit, as it cannot serve a 4-bit base without losing adapters to rounding.
The others' correction costs a forward pass, so they have steps with it and without.

    python -m benchmarks.head_to_head --peer unsloth --tokenizer FOLDER --out head_to_head.json
    python -m benchmarks.head_to_head --peer trl --size long --micro-batches 8,32
    python -m benchmarks.head_to_head --join a.json b.json --out benchmarks/results/head_to_head.json

A system has a process of its own, one after another. Its first step compiles and counts only for how long a start
takes, from the command to that step's end; so does the first of each further size (`--size fixed,long`), which the
other's process goes on with, as its start takes minutes. Memory is the most that torch had allocated in a later step,
the KV cache left out. `ours-lean` recomputes MLPs, in micro-batches that stay below 12 GiB; `ours-fp8` has its KV cache
in FP8. What is measured is written system by system. Prints a table; the last line is one JSON object.

A start may also lie beside other work: `--begin` measures ours, starts the other, which waits after its first step, and
returns; `--finish`, with the same options, lets it go on. The time of such a start means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
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

import psutil

from benchmarks.common.grpo_peers import PHASES, Step
from benchmarks.common.processes import TIME_UP, end_family, wait_or_end, write_result

ROOT = Path(__file__).resolve().parent.parent
PROMPT, RANK = 128, 16
OURS = ("ours", "ours-lean", "ours-fp8")
TOKENS = {"ours": 32768, "ours-lean": 8192, "ours-fp8": 32768}
"""train.tokens_per_micro_batch."""
BEGUN = "head-to-head-begun.json"
"""What `--begin` leaves in the scratch folder."""
BLOCK = 16
"""Tokens of a block of the KV cache."""


class Size(NamedTuple):
    """Of a step."""

    prompts: int
    generations: int
    completion: int


SIZES = {"fixed": Size(16, 8, 512), "long": Size(16, 8, 2048), "short": Size(64, 8, 128), "tiny": Size(2, 4, 8)}
BARS = {"fixed": {"ours": 4.4, "ours-lean": 4.8, "times": 2.3}, "long": {"times": 2.3}}
"""Seconds of a whole step on an H200; times: of the peer's whole step, without its correction."""


# The work


def work_folder(options: argparse.Namespace) -> Path:
    return options.scratch / f"head-to-head-{options.shape}"


def make_work(options: argparse.Namespace) -> Path:
    """A folder with the checkpoint, a tokenizer that has a word for every id, and prompts.jsonl."""
    from benchmarks.common.random_model import checkpoint_folder
    from benchmarks.whole_step import write_tokenizer

    source = checkpoint_folder(options.shape, options.scratch)
    folder = work_folder(options)
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
    questions = [
        "".join(draw.choices(words, k=options.prompt)).strip()
        for _ in range(8 * max(size.prompts for size in options.sizes.values()))
    ]
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


def ours_config(options: argparse.Namespace, name: str, size: Size, folder: Path, run: Path) -> dict[str, Any]:
    """Sections of the configuration; the KV cache holds every sequence of a step and no more."""
    length = options.prompt + size.completion
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
    from grpo.run.importing import lean
    from grpo.run.library_logs import quiet_libraries
    from grpo.train import start_ahead

    quiet_libraries(False)
    sections = json.loads(config.read_text())
    start_ahead(parse_config(sections))
    with lean():
        from grpo.training.run import launch
    metrics = Path(sections["checkpoint"]["output_dir"]) / "metrics.jsonl"

    def watch() -> None:
        while not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        print("FIRST " + json.dumps(time.time()), flush=True)

    threading.Thread(target=watch, daemon=True).start()
    launch(parse_config(sections))


def run_ours(options: argparse.Namespace, name: str, size: Size, left: float) -> dict[str, Any]:
    run, file = options.scratch / f"head-to-head-{name}", options.scratch / f"head-to-head-{name}.json"
    shutil.rmtree(run, ignore_errors=True)
    config = ours_config(options, name, size, work_folder(options), run)
    file.write_text(json.dumps(config))
    log = log_file(options, name)
    process, began = started_process([sys.executable, "-m", "benchmarks.head_to_head", "--train", str(file)], log)
    found = ended(log, began, wait_or_end(process, left))
    kv = 0.0 if options.device == "cpu" else config["rollout"]["kv_cache_memory_bytes"] / 2**30
    from grpo.run.records import read_entries

    names = (*PHASES[:-1], "reward_seconds", "tokens", "peak_memory_gib", "mismatch_kl")
    steps = [{one: entry.get(one) for one in names} for entry in read_entries(run / "metrics.jsonl")]
    first = [float(line.removeprefix("FIRST ")) for line in found.pop("lines") if line.startswith("FIRST ")]
    found |= {"tokens_per_micro_batch": TOKENS[name], "steps": steps, "kv_cache_gib": round(kv, 2)}
    found |= {"mismatch_kl": statistics.median(step["mismatch_kl"] for step in steps)} if steps else {}
    return found | started(found, first) | {"median": medians(steps[1:])} | memory(steps[1:], kv)


# The other


def peer_name(options: argparse.Namespace, micro_batch: int) -> str:
    return f"{options.peer}, {micro_batch}"


def peer_steps(options: argparse.Namespace) -> list[Step]:
    """Of every size a step that compiles, then some without the peer's correction and some with it."""
    kinds = [False] * (1 + options.plain) + [True] * options.corrected
    return [Step(size.completion, corrected) for size in options.sizes.values() for corrected in kinds]


def start_peer(options: argparse.Namespace, micro_batch: int, go_on: Path | None) -> tuple[Any, float]:
    """The peer's process, which waits for `go_on` after its first step, and when it began."""
    size = next(iter(options.sizes.values()))
    work = {
        "folder": str(work_folder(options)), "scratch": str(options.scratch), "micro_batch": micro_batch, "rank": RANK,
        "steps": peer_steps(options), "prompt": options.prompt, "prompts": size.prompts,
        "generations": size.generations, "go_on": go_on and str(go_on), "memory_share": options.peer_memory,
    }  # fmt: skip
    file = options.scratch / "head-to-head-work.json"
    file.write_text(json.dumps(work))
    command = [sys.executable, "-m", "benchmarks.common.grpo_peers", options.peer, str(file)]
    environment = {}
    if options.peer_path:
        environment["PYTHONPATH"] = f"{options.peer_path}:{os.environ.get('PYTHONPATH', '')}"
    return started_process(
        command, log_file(options, peer_name(options, micro_batch)), detached=bool(go_on), **environment
    )


def run_peer(options: argparse.Namespace, micro_batch: int, left: float) -> dict[str, dict[str, Any]]:
    """What the peer did in steps of each size."""
    process, began = start_peer(options, micro_batch, None)
    said = wait_or_end(process, left)
    return peer_found(options, micro_batch, ended(log_file(options, peer_name(options, micro_batch)), began, said))


def peer_found(options: argparse.Namespace, micro_batch: int, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Size -> what `found` has of it."""
    done = [json.loads(line.removeprefix("STEP ")) for line in found.pop("lines") if line.startswith("STEP ")]
    about = found | {"micro_batch": micro_batch} | started(found, [step["ended"] for step in done])
    each, result = 1 + options.plain + options.corrected, {}
    for number, size in enumerate(options.sizes):
        steps = done[number * each : (number + 1) * each]
        kv = steps[-1]["kv_cache_gib"] if steps else None
        # The step at which the correction comes on may compile what it needs.
        with_it = [step for step in steps if step["corrected"]]
        result[size] = about | {
            "steps": steps, "corrected": medians(with_it[1:] or with_it), "kv_cache_gib": kv,
            "median": medians([step for step in steps[1:] if not step["corrected"]]), **memory(steps[1:], kv),
        }  # fmt: skip
    return result


def begin(options: argparse.Namespace) -> int:
    """Measure ours, start the peer and leave it to itself."""
    make_work(options)
    result = empty_result(options)
    measure_ours(options, result, time.monotonic() + options.budget)
    go_on = options.scratch / "head-to-head-go-on"
    go_on.unlink(missing_ok=True)
    process, began = start_peer(options, options.micro_batches[0], go_on)
    state = {"pid": process.pid, "began": began, "result": result | {"peer_started_beside_other_work": True}}
    (options.scratch / BEGUN).write_text(json.dumps(state))
    return 0


def finish_peer(options: argparse.Namespace, left: float) -> dict[str, dict[str, Any]]:
    """Let the peer that `begin` started go on, and wait for its end."""
    begun = json.loads((options.scratch / BEGUN).read_text())
    (options.scratch / "head-to-head-go-on").touch()
    batch, ends, said = options.micro_batches[0], time.monotonic() + left, None
    while psutil.pid_exists(begun["pid"]) and psutil.Process(begun["pid"]).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > ends:
            said = TIME_UP
            end_family(begun["pid"])
        time.sleep(0.1)
    found = peer_found(options, batch, ended(log_file(options, peer_name(options, batch)), begun["began"], said))
    for of_size in found.values():
        of_size.pop("first_step_ended_s", None)
        if said is None and len(of_size["steps"]) < 1 + options.plain + options.corrected:
            of_size |= {"failed": "ended early", "log": log_end(options, batch)}
    return found


# Both


def log_file(options: argparse.Namespace, name: str) -> Path:
    return options.scratch / f"head-to-head-{name.replace(', ', '-')}.log"


def log_end(options: argparse.Namespace, batch: int) -> str:
    return log_file(options, peer_name(options, batch)).read_text(errors="replace")[-2500:]


def started_process(
    command: list[str], log: Path, *, detached: bool = False, **environment: str
) -> tuple[subprocess.Popen[bytes], float]:
    """A process that writes to `log`, and when it began. Detached it outlives this one and its group."""
    began = time.time()
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | environment,
            start_new_session=detached,
        )  # fmt: skip
    return process, began


def ended(log: Path, began: float, said: str | None) -> dict[str, Any]:
    """When a process began, how long ago that is, whether it failed, and its lines."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    found: dict[str, Any] = {"began": began, "wall_seconds": round(time.time() - began, 1), "lines": lines}
    if said:
        found |= {"failed": said, "log": "\n".join(lines)[-2500:]}
    return found


def started(found: dict[str, Any], ends: Sequence[float]) -> dict[str, Any]:
    began = found.pop("began")
    return {"first_step_ended_s": round(ends[0] - began, 1)} if ends else {}


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
            print(f"{name:24} {'' if label == 'median' else '(with its correction) '}{text}", flush=True)
    print(f"{name:24} first step ended after {found.get('first_step_ended_s')} s; "
          f"{found.get('without_kv_gib')} GiB besides the KV cache; mismatch {found.get('mismatch_kl')}",
          flush=True)  # fmt: skip
    if "failed" in found:
        print(f"{name:24} {found['failed']}:\n{found['log']}", flush=True)


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
    parser.add_argument("--size", default="fixed", help=f"some of {', '.join(SIZES)}, of equal batches for a peer")
    parser.add_argument("--peer", default="trl", choices=("trl", "unsloth"))
    parser.add_argument("--peer-path", help="what goes first on the peer's PYTHONPATH")
    parser.add_argument("--ours", default="ours,ours-lean", type=lambda text: [one for one in text.split(",") if one])
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--steps", type=int, default=4, help="ours")
    parser.add_argument("--plain", type=int, default=2, help="steps of the peer without its correction that count")
    parser.add_argument("--corrected", type=int, default=2, help="steps of the peer with it, after those")
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument(
        "--micro-batches", type=lambda text: [int(n) for n in text.split(",")],
        help="per_device_train_batch_size, one run each; by default 8, TRL's, and all of a step for Unsloth, which "
        "chooses its own within it",
    )  # fmt: skip
    parser.add_argument(
        "--peer-memory", type=float, metavar="SHARE",
        help="of the GPU's memory for the peer's vLLM, instead of its default, where other work is beside it",
    )  # fmt: skip
    parser.add_argument("--tokenizer", type=Path, help="a folder with a byte-level BPE tokenizer; Unsloth wants one")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp"))
    parser.add_argument("--budget", type=float, default=580, help="seconds for everything")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--join", type=Path, nargs="+", help="put results of runs into one file")
    parser.add_argument("--train", type=Path, help="train ours in this process")
    parser.add_argument("--begin", action="store_true", help="measure ours, start the peer, end")
    parser.add_argument("--finish", action="store_true", help="let the peer of --begin go on")
    options = parser.parse_args()
    if options.train:
        train_ours(options.train)
        return 0
    if options.join:
        options.out.write_text(json.dumps(joined(options.join), indent=1) + "\n")
        return 0
    if unknown := set(options.size.split(",")) - set(SIZES):
        parser.error(f"--size {', '.join(sorted(unknown))}: choose from {', '.join(SIZES)}")
    options.sizes = {name: SIZES[name] for name in options.size.split(",")}
    batches = {(size.prompts, size.generations) for size in options.sizes.values()}
    if len(batches) > 1:
        parser.error("--size: a peer's steps all have the same prompts and generations; measure these one by one")
    if "tiny" in options.size:
        options.shape, options.prompt, options.device = "tiny", 16, "cpu"
    whole = math.prod(batches.pop())
    options.micro_batches = options.micro_batches or [whole if options.peer == "unsloth" else min(8, whole)]
    return begin(options) if options.begin else measure(options)


def empty_result(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "head_to_head", "shape": options.shape, "prompt": options.prompt}
    result |= {"peer_memory_share": options.peer_memory, "sizes": {}}
    for size, numbers in options.sizes.items():
        result["sizes"][size] = {**numbers._asdict(), "bars": BARS.get(size, {}), "systems": {}}
    return result


def note(options: argparse.Namespace, result: dict[str, Any], size: str, name: str, found: dict[str, Any]) -> None:
    """Enter what was found of a system, show it, and write all there is."""
    entry = result["sizes"][size]
    entry["systems"][name] = found
    entry["ratios"] = ratios(entry["systems"])
    show(f"{size}: {name}", found)
    write_result(options.out, result)


def measure_ours(options: argparse.Namespace, result: dict[str, Any], ends: float) -> None:
    for name in options.ours:
        for size, numbers in options.sizes.items():
            note(options, result, size, name, run_ours(options, name, numbers, ends - time.monotonic()))


def measure(options: argparse.Namespace) -> int:
    """Every system, one after another."""
    ends = time.monotonic() + options.budget
    if options.finish:
        result = json.loads((options.scratch / BEGUN).read_text())["result"]
    else:
        make_work(options)
        result = empty_result(options)
        measure_ours(options, result, ends)
    for batch in options.micro_batches:
        left = ends - time.monotonic()
        found = finish_peer(options, left) if options.finish else run_peer(options, batch, left)
        for size, of_size in found.items():
            note(options, result, size, peer_name(options, batch), of_size)
    summary = {size: entry.get("ratios", {}) for size, entry in result["sizes"].items()}
    print(json.dumps({"benchmark": "head_to_head", "ratios": summary}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
