"""From the command to the end of the first step: seconds, and what they are spent on.

A run of one step in a process of its own, first with empty caches (Triton's, vLLM's, the project's) and the system
asked to forget every installed file, then again with what the first left in all of them. What the process does is seen
by looking at its stack (stack_samples.py); which kernels it compiles itself, Triton says.

    python -m benchmarks.start_up --out benchmarks/results/start_up.json            # the fixed work of whole_step.py
    python -m benchmarks.start_up --config configs/quickstart.toml --device cpu
    python -m benchmarks.start_up --imports                  # only what `import vllm` and the project's modules take

Prints a tree of what took long, with the seconds of each; the last line is one JSON object.
"""

from __future__ import annotations

from benchmarks.common.stack_samples import StackSampler, phases

SAMPLER = StackSampler()  # before whatever else is imported
if __name__ == "__main__":
    SAMPLER.start()

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

ENDS: list[float] = []
FIRST: list[float] = []
BARS = {"cold": 45.0, "warm": 20.0}
"""Seconds to the end of the first step, for the 3B shape."""
PHASES = {
    "read weights": ("model/base_weights.py", "__init__"),
    "build the training graph": ("policy/policy.py", "__init__"),
    "import vLLM": ("vllm/__init__.py", "<module>"),
    "import the engine": ("rollout/engine.py", "<module>"),
    "choose tiles": ("run/tiles.py", "prepare_tiles"),
    "capture graphs": ("gpu_model_runner.py", "capture_model"),
    "start vLLM": ("rollout/engine.py", "__init__"),
    "gate": ("training/self_check.py", "check_start"),
    "first rollout": ("training/trainer.py", "sample"),
    "first update": ("training/trainer.py", "update"),
    "stop": ("grpo/session.py", "close"),
    "other imports": ("", "<module>"),
}
"""Of a start -> where it is to be found on the stack: the end of a file's name, a function. The first that fits."""
MODULES = ("grpo.training.run", "vllm", "grpo.rollout.engine")
"""What a run imports, in this order."""


class CompiledKernels:
    """What Triton compiles in this process: (kernel, seconds, whether from the cache on disk, its end by the clock)."""

    def __init__(self) -> None:
        import triton

        self.found: list[tuple[str, float, bool, float]] = []
        triton.knobs.compilation.listener = self._compiled

    def _compiled(self, *, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        self.found.append((src.name, times.total / 1e6, cache_hit, time.time()))

    def summary(self, began: float) -> dict[str, Any]:
        """Totals, and every kernel that was compiled, in order."""
        new = [(name, round(took, 2), round(end - began, 1)) for name, took, cached, end in self.found if not cached]
        return {
            "compiled": len(new),
            "compiled_s": round(sum(took for _, took, _ in new), 1),
            "from_cache": len(self.found) - len(new),
            "kernels": [f"{end:6.1f} {took:5.2f} {name}" for name, took, end in new],
        }


def child_main(options: argparse.Namespace) -> int:
    """Train in this process and write what it did to `options.out`, or make the work."""
    if options.make:
        fixed_work(options)
        return 0
    from grpo.run.importing import lean

    kernels = None
    if options.imports:
        for module in MODULES:
            with lean():
                __import__(module)
        ended = time.time()
    else:
        from grpo.config.schema import parse_config, read_config
        from grpo.run.library_logs import quiet_libraries

        quiet_libraries(False)
        if options.config:
            overrides = [*options.set, f"checkpoint.output_dir='{options.run}'", "train.max_steps=1"]
            config = read_config(options.config, overrides)
        else:
            sections = json.loads(options.sections.read_text())
            values = sections.pop("") | sections
            values["checkpoint"]["output_dir"] = str(options.run)
            config = parse_config(values)
        from grpo.train import start_ahead

        start_ahead(config, alone=True)
        watch_ahead()
        with lean():
            from grpo.training.run import launch
        kernels = CompiledKernels()
        watch_step(options.run / "metrics.jsonl")
        launch(config)
        ended = first_line(options.run / "metrics.jsonl")
    SAMPLER.stop()
    found = {"first_step_ended_s": round(ended - options.began, 1), "phases": timeline(options.began)}
    if helpers := ahead_ends():
        found["compiled_ahead_until_s"] = [round(end - options.began, 1) for end in helpers]
    found["spent"] = SAMPLER.tree(options.least)
    if kernels is not None:
        found["triton"] = kernels.summary(options.began)
        steps = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
        names = ("step_seconds", "rollout_seconds", "train_seconds", "mismatch_kl", "peak_memory_gib")
        found["steps"] = [{name: step.get(name) for name in names} for step in steps]
    options.out.write_text(json.dumps(found))
    return 0


def timeline(began: float) -> list[dict[str, Any]]:
    """What was done in which order: when it began, and how long it took in all."""
    order = sorted(phases(SAMPLER.looks, PHASES).items(), key=lambda item: item[1][0])
    return [{"what": name, "from_s": round(at - began, 1), "s": round(spent, 1)} for name, (at, spent) in order]


def watch_ahead() -> None:
    """Note when processes that compile ahead end."""
    from grpo.run import compile_ahead

    def wait(process: subprocess.Popen[bytes]) -> None:
        process.wait()
        ENDS.append(time.time())

    for process in compile_ahead._begun:
        threading.Thread(target=wait, args=(process,), daemon=True).start()


def watch_step(metrics: Path) -> None:
    """Note when the first step's figures are written."""

    def wait() -> None:
        while not metrics.exists() or not metrics.stat().st_size:
            time.sleep(0.02)
        FIRST.append(time.time())

    threading.Thread(target=wait, daemon=True).start()


def first_line(metrics: Path) -> float:
    """When that was, by the clock."""
    return FIRST[0] if FIRST else metrics.stat().st_mtime


def ahead_ends() -> list[float]:
    """By the clock, when those that have ended did."""
    return sorted(ENDS)


def one_start(options: argparse.Namespace, folder: Path, name: str, caches: Path) -> dict[str, Any]:
    """What a process of its own finds."""
    found, run = folder / f"{name}.json", folder / f"run-{name}"
    command = [sys.executable, "-m", "benchmarks.start_up", *sys.argv[1:], "--out", str(found), "--run", str(run)]
    if options.sections:
        command += ["--sections", str(options.sections)]
    places = {"TRITON_CACHE_DIR": "triton", "XDG_CACHE_HOME": "xdg", "VLLM_CACHE_ROOT": "vllm"}
    environment = os.environ | {variable: str(caches / place) for variable, place in places.items()}
    log = folder / f"{name}.log"
    began = time.time()
    with open(log, "w") as file:
        code = subprocess.run(
            [*command, "--began", str(began)], env=environment, stdout=file, stderr=subprocess.STDOUT
        ).returncode
    whole = round(time.time() - began, 1)
    if code:
        return {"failed": f"exit code {code}", "log": log.read_text(errors="replace")[-2000:], "process_s": whole}
    return json.loads(found.read_text()) | {"process_s": whole}


def fixed_work(options: argparse.Namespace) -> None:
    """Write the checkpoint and whole_step.py's configuration, of one step, to `options.scratch`."""
    from benchmarks import whole_step

    options.full_finetuning = False
    options.set = [tuple(text.split("=", 1)) for text in options.set]
    options.prompt, options.completion = (16, 8) if options.shape == "tiny" else (128, 512)
    whole_step.ours_command(options, whole_step.make_work(options), options.scratch)


def forget_files(folders: list[Path]) -> int:
    """Ask the system to drop from memory what it keeps of these folders' files; how many there are. What a process has
    mapped stays."""
    count = 0
    for file in (Path(place, name) for folder in folders for place, _, names in os.walk(folder) for name in names):
        try:
            descriptor = os.open(file, os.O_RDONLY)
        except OSError:
            continue
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        count += 1
    return count


def show(name: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        print(f"{name}: {found['failed']}\n{found['log']}", flush=True)
        return
    print(f"{name}: the first step ended after {found['first_step_ended_s']} s; {found.get('steps', [])}", flush=True)
    for phase in found["phases"]:
        print(f"{phase['from_s']:8.1f} {phase['s']:8.1f} s  {phase['what']}")
    if ends := found.get("compiled_ahead_until_s"):
        print(f"processes that compile ahead ended after {', '.join(map(str, ends))} s")
    print("seconds, and those of them in which a processor worked for the thread")
    for line in found["spent"]:
        alone = f" ({line['own_s']:.2f} alone)" if 0.1 < line["own_s"] < line["s"] else ""
        print(f"{line['s']:8.2f} {line['busy_s']:8.2f}  {'  ' * line['depth']}{line['what']}{alone}", flush=True)
    if kernels := found.get("triton"):
        print(f"Triton compiled {kernels['compiled']} kernels in {kernels['compiled_s']} s and took "
              f"{kernels['from_cache']} from its cache; when, how long, which:", *kernels["kernels"], sep="\n  ",
              flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="3b")
    parser.add_argument("--steps", type=int, default=1, help="of the fixed work")
    parser.add_argument("--tokens", type=int, default=32768, help="train.tokens_per_micro_batch of the fixed work")
    parser.add_argument("--caches", type=Path, help="keep Triton's and vLLM's caches here, for a warm start later")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--config", type=Path, help="this configuration instead of the fixed work")
    parser.add_argument(
        "--set", action="append", default=[], help="as of python -m grpo.train; of the fixed work, as of whole_step"
    )
    parser.add_argument("--imports", action="store_true", help="import only")
    parser.add_argument("--starts", default="cold,warm", type=lambda text: text.split(","))
    parser.add_argument("--least", type=float, default=0.2, help="seconds from which something is listed")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sections", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.began or options.make:
        return child_main(options)
    SAMPLER.stop()
    result: dict[str, Any] = {"benchmark": "start_up", "shape": options.shape, "bars": BARS, "starts": {}}
    with tempfile.TemporaryDirectory(prefix="grpo-start-") as name:
        folder = Path(name)
        options.scratch = options.scratch or folder
        if not options.config and not options.imports:
            # In a process of its own, so that this one has nothing mapped that is to be forgotten.
            command = [sys.executable, "-m", "benchmarks.start_up", *sys.argv[1:], "--scratch", str(options.scratch)]
            subprocess.run([*command, "--make"], check=True)
            options.sections = options.scratch / "whole_step.json"
        for start in options.starts:
            if start == "cold":
                packages = [Path(one) for one in sys.path if one.endswith("-packages") or Path(one, "vllm").is_dir()]
                result["files_forgotten"] = forget_files([*packages, options.scratch])
            result["starts"][start] = one_start(options, folder, start, options.caches or folder / "caches")
            show(start, result["starts"][start])
            from benchmarks.common.processes import write_result

            write_result(options.out, result)
    seconds = {start: found.get("first_step_ended_s") for start, found in result["starts"].items()}
    print(json.dumps({"benchmark": "start_up", **seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
