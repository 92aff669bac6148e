"""Learning against TRL's GRPOTrainer: the same model, data, rewards, seed and settings, from one configuration.

    python -m benchmarks.learning_vs_trl all --config configs/quickstart.toml --model MODEL --out results/NAME
    python -m benchmarks.learning_vs_trl all --at-once ...                   # every run at the same time, on one GPU
    python -m benchmarks.learning_vs_trl ours --config C.toml --model MODEL --seed 1 --runs /tmp/runs
    python -m benchmarks.learning_vs_trl trl --config C.toml --model MODEL --seed 0 --runs /tmp/runs
    python -m benchmarks.learning_vs_trl plot --runs /tmp/runs --out results/NAME

`all` starts each run in a process of its own: three seeds of ours, one of TRL's by default. What is measured
is kept step by step: a run that the budget ends counts with the steps that it made. Times of runs that share a GPU are
longer than those of a run that has it alone, for both sides. Held-out questions are not asked. MODEL is a
folder of 16-bit safetensors, which both sides train unquantised, since TRL cannot serve a 4-bit base while training it
(`one_copy_mismatch.py export` makes one from a GGUF file). The order of prompts and the random numbers of sampling
differ between the two; so do TRL's own choices that the configuration does not name, as its version has them.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.processes import wait_or_end
from benchmarks.plot_run import mean_and_error, smoothed
from grpo.config.schema import Config, read_config
from grpo.run.records import read_entries

ROOT = Path(__file__).resolve().parent.parent
LAST = 10
"""Steps at the end whose mean is the final reward."""


def settings(options: argparse.Namespace) -> list[str]:
    """Overrides that both sides share."""
    fixed = [
        f'model.name="{options.model}"',
        "model.load_in_4bit=false",
        f"train.seed={options.seed}",
        "eval.every=none",
    ]
    return [*fixed, *options.set]


# Ours


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """Train with grpo, as a user does."""
    folder = options.runs / f"ours-{options.seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was cut off
    command = [sys.executable, "-m", "grpo.train", str(options.config.resolve()), "--output", str(folder.resolve())]
    command += [word for pair in settings(options) for word in ("--set", pair)]
    started = time.time()
    subprocess.run(command, cwd=ROOT, check=True)
    return our_result(folder, options.seed) | {"wall_seconds": round(time.time() - started, 1), "finished": True}


def our_result(folder: Path, seed: int) -> dict[str, Any]:
    """What the run folder of a run that may have been cut off says. Raises IndexError without a step."""
    steps = list(read_entries(folder / "metrics.jsonl"))
    names = [key for key in steps[0] if key.startswith("rewards/") and key.count("/") == 1]
    return {
        "system": "grpo",
        "seed": seed,
        "finished": False,
        "wall_seconds": None,
        "reward": [step["reward"] for step in steps],
        "functions": {name.removeprefix("rewards/"): [step[name] for step in steps] for name in names},
        "step_seconds": [round(step["step_seconds"], 3) for step in steps],
        "rollout_seconds": [round(step["rollout_seconds"], 3) for step in steps],
        "completion_length": [step["completion_length"] for step in steps],
    }


# TRL


def trl_arguments(config: Config, options: argparse.Namespace, gpu: bool) -> dict[str, Any]:
    """`config` in GRPOConfig's words. Raises SystemExit for what TRL has no word for."""
    rollout, loss, train = config.rollout, config.loss, config.train
    if train.max_steps is None or train.optimizer_steps_per_rollout > 1 or loss.loss_type == "gspo":
        raise SystemExit("set train.max_steps, one optimiser step a rollout, and a loss that TRL has")
    batch = min(options.micro_batch, config.completions_per_step)
    warmup = math.ceil(train.warmup_ratio * train.max_steps)
    schedule = "constant_with_warmup" if warmup and train.lr_scheduler_type == "constant" else train.lr_scheduler_type
    correction = loss.importance_sampling_correction
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": config.completions_per_step // batch,
        "num_generations": rollout.num_generations,
        "max_completion_length": rollout.max_completion_length,
        "temperature": rollout.temperature,
        "num_iterations": train.num_iterations,
        "beta": loss.beta,
        "epsilon": loss.epsilon,
        "epsilon_high": loss.epsilon_high,
        "loss_type": loss.loss_type,
        "scale_rewards": loss.scale_rewards,
        "importance_sampling_level": loss.importance_sampling_level,
        "mask_truncated_completions": loss.mask_truncated_completions,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": warmup,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_epsilon": train.adam_epsilon,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "max_steps": train.max_steps,
        "seed": train.seed,
    }
    if gpu:
        arguments |= {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_max_model_length": config.max_seq_length,
            "vllm_gpu_memory_utilization": 0.1,  # of a GPU that others may use; see `name_kv_cache`
            "vllm_importance_sampling_correction": correction != "none",
            "vllm_importance_sampling_clip_max": loss.importance_sampling_clip_max,
        }
        if correction != "none":
            arguments["vllm_importance_sampling_mode"] = correction
    return arguments


def trl_rewards(specs: Sequence[Any]) -> list[Callable[..., list[float | None]]]:
    """The configuration's rewards as functions that TRL calls."""
    from grpo.references import resolve
    from grpo.rewards.builtin import ALIASES, BUILTIN

    functions = []
    for spec in specs:
        function = resolve(ALIASES.get(spec.function, spec.function), "reward", BUILTIN)
        scorer = function(**spec.options) if isinstance(function, type) else function
        extra = {} if isinstance(function, type) else dict(spec.options)

        def score(scorer: Any = scorer, extra: dict[str, Any] = extra, **columns: Any) -> list[float | None]:
            return scorer(**columns, **extra)

        score.__name__ = spec.column
        functions.append(score)
    return functions


def name_kv_cache(size: int) -> None:
    """Let TRL's vLLM take `size` bytes, where it would measure a GPU whose memory other runs take and give back."""
    from trl.generation import vllm_generation

    vllm_generation.LLM = functools.partial(vllm_generation.LLM, kv_cache_memory_bytes=size)


def trl(options: argparse.Namespace) -> dict[str, Any]:
    """Train with TRL."""
    started = time.time()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from grpo.data import load_data

    config = read_config(options.config, settings(options))
    gpu = torch.cuda.is_available()
    if gpu:
        name_kv_cache(int(options.trl_kv_gib * 2**30))
    data = load_data(config, AutoTokenizer.from_pretrained(options.model))
    ends: list[float] = []

    def result(trainer: Any, finished: bool) -> dict[str, Any]:
        logs = [entry for entry in trainer.state.log_history if "reward" in entry]
        return {
            "system": "trl",
            "seed": options.seed,
            "finished": finished,
            "wall_seconds": round(time.time() - started, 1),
            "reward": [float(entry["reward"]) for entry in logs],
            "functions": {s.column: [float(entry[f"rewards/{s.column}/mean"]) for entry in logs] for s in data.rewards},
            "step_seconds": [round(b - a, 3) for a, b in zip(ends, ends[1:], strict=False)],
            "completion_length": [float(entry["completions/mean_length"]) for entry in logs],
        }

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not ends:
                ends.append(time.time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.time())

        def on_log(self, *args: Any, **kwargs: Any) -> None:
            keep(options, result(trainer, finished=False))

    trainer = GRPOTrainer(
        options.model,
        reward_funcs=trl_rewards(data.rewards),
        args=GRPOConfig(
            output_dir=str(options.runs / f"trl-{options.seed}"),
            reward_weights=[spec.weight for spec in data.rewards],
            model_init_kwargs={"dtype": "bfloat16"},
            bf16=gpu,
            use_cpu=not gpu,
            gradient_checkpointing=False,
            logging_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
            **trl_arguments(config, options, gpu),
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt.prompt, **prompt.columns} for prompt in data.train]),
        peft_config=LoraConfig(
            r=config.lora.r,
            lora_alpha=config.lora.lora_alpha,
            target_modules=config.lora.target_modules,
            task_type="CAUSAL_LM",
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return result(trainer, finished=True)


# Both


def keep(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write one run's result, so far, with what it ran on."""
    import torch

    from grpo.run.versions import hardware, versions

    if torch.cuda.is_available():
        torch.cuda.init()  # so that the GPU is named
    result |= {"config": str(options.config.name), "overrides": options.set}
    result |= {"versions": versions(), "hardware": hardware()}
    file = options.runs / f"{result['system']}-{result['seed']}.json"
    file.with_suffix(".part").write_text(json.dumps(result) + "\n")
    file.with_suffix(".part").replace(file)


def record(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Keep a finished run's result, and say what it is."""
    keep(options, result)
    final = mean_and_error(result["reward"][-LAST:])
    print(json.dumps({key: result[key] for key in ("system", "seed", "wall_seconds")} | {"final_reward": final}))


def everything(options: argparse.Namespace) -> None:
    """All runs, one after another or at once, then the picture. A run that has finished already is not repeated."""
    ends = time.monotonic() + options.budget
    wanted = [("ours", "grpo", seed) for seed in options.seeds] + [("trl", "trl", seed) for seed in options.trl_seeds]
    # The first of each come first, so that a short budget still compares.
    wanted.sort(key=lambda run: (options.seeds + options.trl_seeds).index(run[2]))
    running = []
    for mode, system, seed in wanted:
        if finished(options.runs / f"{system}-{seed}.json") or ends - time.monotonic() < 30:
            continue
        running.append((system, seed, begin(options, mode, system, seed)))
        if not options.at_once:
            finish(options, *running.pop(), ends)
    for run in running:
        finish(options, *run, ends)
    plot(options)


def finished(file: Path) -> bool:
    return file.exists() and bool(json.loads(file.read_text())["finished"])


def begin(options: argparse.Namespace, mode: str, system: str, seed: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.learning_vs_trl", mode, "--config", str(options.config)]
    command += ["--model", options.model]
    command += ["--seed", str(seed), "--runs", str(options.runs), "--micro-batch", str(options.micro_batch)]
    command += ["--trl-kv-gib", str(options.trl_kv_gib)]
    command += [word for pair in options.set for word in ("--set", pair)]
    with open(options.runs / f"{system}-{seed}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(options: argparse.Namespace, system: str, seed: int, run: subprocess.Popen[bytes], ends: float) -> None:
    """Wait for a run; what is left of it when the time is up is ended, and what ours had written is kept."""
    said = wait_or_end(run, ends - time.monotonic()) or "finished"
    if system == "grpo" and not (options.runs / f"grpo-{seed}.json").exists():
        try:
            keep(options, our_result(options.runs / f"ours-{seed}", seed))
        except (OSError, IndexError):
            said += ", without a step"
    last = (options.runs / f"{system}-{seed}.log").read_text(errors="replace").splitlines()[-1:]
    print(f"{system} {seed}: {said} {''.join(last)[:300]}", flush=True)


def compare(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rewards by system where the shortest run ends, and where each ends: each run's, and the mean over seeds.

    The difference, in standard errors, is that at the step which all have reached.
    """
    found: dict[str, Any] = {"step": min(len(result["reward"]) for result in results)}
    for system in ("grpo", "trl"):
        own = [result for result in results if result["system"] == system]
        if not own:
            continue
        finals = [mean_and_error(result["reward"][: found["step"]][-LAST:]) for result in own]
        means = [final["mean"] for final in finals]
        over_steps = math.sqrt(sum(final["standard_error"] ** 2 for final in finals)) / len(finals)
        over_seeds = mean_and_error(means)["standard_error"] if len(means) > 1 else 0.0
        steady = sorted(second for result in own for second in result["step_seconds"][1:])
        found[system] = {
            "seeds": [result["seed"] for result in own],
            "steps": [len(result["reward"]) for result in own],
            "finished": [result["finished"] for result in own],
            "rewards": finals,
            "final_rewards": [mean_and_error(result["reward"][-LAST:]) for result in own],
            "mean": round(sum(means) / len(means), 4),
            "standard_error": round(max(over_steps, over_seeds), 4),
            "wall_seconds": [result["wall_seconds"] for result in own],
            "median_step_seconds": steady[len(steady) // 2] if steady else None,
        }
    if "grpo" in found and "trl" in found:
        error = math.hypot(found["grpo"]["standard_error"], found["trl"]["standard_error"])
        difference = found["grpo"]["mean"] - found["trl"]["mean"]
        found["ours_less_trl"] = {
            "difference": round(difference, 4),
            "z": round(difference / error, 2) if error else None,
        }
    return found


def plot(options: argparse.Namespace) -> None:
    """OUT.png and OUT.json from every result in the runs folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = [json.loads(file.read_text()) for file in sorted(options.runs.glob("*-*.json"))]
    results = [result for result in results if len(result["reward"]) >= 2]
    if not results:
        raise SystemExit(f"{options.runs}: no run with two steps")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    labelled = set()
    for result in results:
        colour = {"grpo": "C0", "trl": "C1"}[result["system"]]
        label = result["system"] if result["system"] not in labelled else None
        labelled.add(result["system"])
        curve = smoothed(result["reward"], options.smooth)
        axes[0].plot(range(1, len(curve) + 1), curve, color=colour, label=label, alpha=0.8)
        minutes = [sum(result["step_seconds"][: n + 1]) / 60 for n in range(len(result["step_seconds"]))]
        axes[1].plot(minutes, curve[: len(minutes)], color=colour, alpha=0.8)
    axes[0].set(xlabel="step", ylabel=f"reward, mean of {options.smooth} steps")
    axes[1].set(xlabel="minutes of training, start-up left out")
    axes[0].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out.with_suffix(".png"), dpi=120)
    comparison = compare(results)
    options.out.with_suffix(".json").write_text(
        json.dumps(
            {"benchmark": "learning_vs_trl", "at_once": options.at_once, "comparison": comparison, "runs": results}
        )
        + "\n"
    )
    for system in ("grpo", "trl"):
        if system in comparison:
            own = comparison[system]
            print(f"{system:5} reward up to step {comparison['step']}: {own['mean']:.4f} "
                  f"+- {own['standard_error']:.4f}, seeds {own['seeds']}, "
                  f"wall {own['wall_seconds']} s, step {own['median_step_seconds']} s")  # fmt: skip
    print(json.dumps({"benchmark": "learning_vs_trl", **comparison}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("mode", choices=("all", "ours", "trl", "plot"))
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.toml")
    parser.add_argument("--model", help="folder of 16-bit safetensors")
    parser.add_argument("--runs", type=Path, default=Path("/tmp/learning_vs_trl"), help="where runs are kept")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "learning_vs_trl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", default="0,1,2", type=numbers, help="`all`: of ours")
    parser.add_argument("--trl-seeds", default="0", type=numbers, help="`all`: of TRL's")
    parser.add_argument("--at-once", action="store_true", help="`all`: start every run at the same time")
    parser.add_argument("--trl-kv-gib", type=float, default=6.0, help="TRL's vLLM: KV cache on a GPU")
    parser.add_argument("--micro-batch", type=int, default=64, help="TRL's per_device_train_batch_size, at most")
    parser.add_argument("--smooth", type=int, default=5)
    parser.add_argument("--budget", type=float, default=560, help="`all`: seconds")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for both sides")
    options = parser.parse_args()
    if options.mode != "plot" and not options.model:
        parser.error(f"{options.mode} needs --model")
    options.runs.mkdir(parents=True, exist_ok=True)
    if options.mode in ("ours", "trl"):
        record(options, {"ours": ours, "trl": trl}[options.mode](options))
    else:
        {"all": everything, "plot": plot}[options.mode](options)
    return 0


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


if __name__ == "__main__":
    sys.exit(main())
