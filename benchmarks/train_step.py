"""Training throughput and memory: this project against transformers + peft + bitsandbytes, TRL and Liger.

    step     forward, backward and AdamW over sequences of 2,048 tokens, 16,384 to a micro-batch, random NF4 weights of
             a 3B or 8B shape, LoRA of rank 16 on all seven linears; kernels on and off, by form of recomputation; and
             the peer with SDPA at every micro-batch size, with and without gradient checkpointing, in the same run
    shared   the same step on groups of 8 completions of 512 tokens after a prompt of 1,024, one or several groups to a
             micro-batch: the prompt computed once, and computed for each; both counted in the tokens of the latter
    logprob  from hidden states to the gradient of a clipped loss, 16,384 tokens, vocabulary 128,256, head frozen

Peak memory is that of torch's allocator over one step, weights included.

    python -m benchmarks.train_step --shape 8b --parts step,shared
    python -m benchmarks.train_step --parts logprob
    python -m benchmarks.train_step --tiny                    # everything, small, on a CPU: tries the script
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.processes import write_result
from benchmarks.common.random_model import SHAPES, RandomSource, shape_config
from benchmarks.common.timing import free_memory, measure, milliseconds, tried
from benchmarks.common.train_peers import Step, liger_logprob_step, peft_model, peft_step, policy_loss, trl_logprob_step
from grpo.config.schema import Lora, Model
from grpo.kernels.logprob import selected_logprobs
from grpo.model.base_weights import BaseWeights
from grpo.policy.policy import Policy

PARTS = ("step", "shared", "logprob")
OURS = ("triton/none", "triton/mlp", "triton/layer", "torch/none", "torch/layer")
"""`train.kernels` / what is recomputed; "mlp": gate and up alone, within the fused MLP."""
GROUP, PROMPT, COMPLETION = 8, 1024, 512


class Figures(dict[str, Any]):
    """Setting -> what was measured of it."""

    def __init__(self, save: Callable[[], None]):
        """`save` is called whenever there is a new figure."""
        super().__init__()
        self.save = save

    def note(self, name: str, found: dict[str, Any]) -> None:
        """Keep `found`, and print it in a line."""
        self[name] = found
        self.save()
        if "error" in found:
            text = found["error"]
        elif "tokens" in found:
            peak = found["peak_bytes"] / 1e9
            text = f"{found['tokens_per_second']:10,.0f} tok/s {found['ms']:10.1f} ms  peak {peak:6.2f} GB"
        else:
            text = f"{found['ms']:10.2f} ms  adds {found['extra_bytes'] / 1e9:6.2f} GB"
        print(f"  {name:48} {text}", flush=True)


def load_base(options: argparse.Namespace) -> BaseWeights:
    device = torch.device(options.device)
    model = Model(name=options.shape, load_in_4bit=True, dtype="bfloat16")
    source = RandomSource(options.shape, device)
    return BaseWeights(source, model, device=device, dtype=torch.bfloat16)  # type: ignore[arg-type]


def our_policy(base: BaseWeights, setting: str, rank: int) -> Policy:
    """`setting`: one of OURS."""
    kernels, form = setting.split("/")
    if base.device.type == "cpu":
        kernels = "torch"  # without a GPU both are the plain graph, or the kernels' torch forms below
    policy = Policy(base, Lora(r=rank, lora_alpha=2 * rank), kernels=kernels)
    if base.device.type == "cpu" and setting.startswith("triton"):
        from grpo.policy.fused_layers import install_fused_layers

        install_fused_layers(policy.decoder, base)
    policy.model.train()
    policy.recompute_layers(form)
    return policy


def our_step(policy: Policy, prompts: list[list[int]], completions: list[list[int]], chunk_tokens: int) -> Step:
    """One optimiser step: logprobs of every completion token, a weighted loss, AdamW."""
    optimizer = adamw(policy.parameters())

    def step() -> None:
        scored = policy.score(prompts, completions, temperature=1.0, chunk_tokens=chunk_tokens)
        weights = torch.linspace(-1, 1, len(scored.logprobs), device=scored.logprobs.device)
        (scored.logprobs * weights).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def adamw(parameters: Any) -> torch.optim.AdamW:
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-5, fused=parameters[0].is_cuda)


def timed_step(step: Step, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens a second, and the allocator's peak during one step."""
    if torch.cuda.is_available():
        step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(step, repeats, warmup=1)
    median = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "ms": round(median, 2),
        "range_ms": [round(min(times), 2), round(max(times), 2)],
        "tokens": tokens,
        "tokens_per_second": round(tokens / median * 1e3, 1),
        "peak_bytes": peak,
    }


def random_tokens(vocabulary: int, count: int, length: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, vocabulary, (count, length), generator=generator).tolist()


def step_part(options: argparse.Namespace, figures: Figures) -> None:
    """Setting -> figures, ours and the peer's."""
    for part in (our_settings, peer_part) if options.peer else (our_settings,):
        failed = tried(lambda part=part: part(options, figures) or {})
        if failed:
            figures.note(part.__name__, failed)


def our_settings(options: argparse.Namespace, figures: Figures) -> None:
    sequences, base = options.tokens // options.length, load_base(options)
    # One prompt token each, and a last completion token that is not fed: `length` tokens a sequence.
    prompts = random_tokens(base.config.vocab_size, sequences, 1, seed=1)
    completions = random_tokens(base.config.vocab_size, sequences, options.length, seed=2)

    def run(setting: str) -> dict[str, Any]:
        step = our_step(our_policy(base, setting, options.rank), prompts, completions, options.chunk)
        return timed_step(step, options.tokens, options.repeats)

    for setting in options.settings:
        figures.note(setting, tried(partial(run, setting)))


def peer_part(options: argparse.Namespace, figures: Figures) -> None:
    config = shape_config(options.shape)
    for checkpointing in (True, False):
        model = peft_model(config, options.rank, torch.device(options.device), checkpointing=checkpointing)
        optimizer = adamw(model.parameters())
        size = 1
        while size * options.length <= options.tokens:
            batch = torch.tensor(random_tokens(config.vocab_size, size, options.length, 3), device=options.device)
            name = f"peft+bitsandbytes, {'checkpointing' if checkpointing else 'no checkpointing'}, batch {size}"
            step = peft_step(model, optimizer, batch)
            found = tried(lambda step=step, batch=batch: timed_step(step, batch.numel(), options.repeats))
            figures.note(name, found)
            optimizer.zero_grad(set_to_none=True)
            if "error" in found:
                break
            size *= 2
        del model, optimizer, step
        free_memory()


def shared_part(options: argparse.Namespace, figures: Figures) -> None:
    """Groups whose prompts are computed once, and the same with prompts that differ in their first token."""
    prompt, completion = (PROMPT, COMPLETION) if not options.tiny else (32, 16)
    base = load_base(options)
    vocabulary = base.config.vocab_size

    def run(form: str, groups: int, shared: bool) -> dict[str, Any]:
        prompts = []
        for common in random_tokens(vocabulary, groups, prompt, seed=4):
            prompts += [common if shared else [10 + index, *common[1:]] for index in range(GROUP)]
        completions = random_tokens(vocabulary, groups * GROUP, completion, seed=5)
        step = our_step(our_policy(base, f"triton/{form}", options.rank), prompts, completions, options.chunk)
        return timed_step(step, groups * GROUP * (prompt + completion - 1), options.repeats)

    for groups in options.groups:
        for form in options.shared_forms:
            place = f"{form}, {groups} groups" if groups > 1 else form
            figures.note(f"plain/{place}", tried(partial(run, form, groups, False)))
            figures.note(f"shared/{place}", tried(partial(run, form, groups, True)))


def logprob_part(options: argparse.Namespace, figures: Figures) -> None:
    """From hidden states to their gradient under a clipped loss: milliseconds and memory added at the peak."""
    vocabulary, width = (128256, 4096) if not options.tiny else (1000, 64)
    sequences = options.tokens // options.length
    shape = (sequences, options.length, width)
    device, dtype = options.device, torch.bfloat16
    hidden = torch.randn(shape, dtype=dtype, device=device).requires_grad_()
    head = torch.randn(vocabulary, width, dtype=dtype, device=device) * 0.02
    targets = torch.randint(0, vocabulary, shape[:2], device=device)
    advantages = torch.linspace(-1, 1, sequences, device=device)

    def ours(chunk: int) -> Step:
        def step() -> None:
            logprobs, _ = selected_logprobs(hidden.flatten(0, 1), head, targets.flatten(), chunk_tokens=chunk)
            policy_loss(logprobs.view(targets.shape), advantages).backward()
            hidden.grad = None

        return step

    makers: dict[str, Callable[[], Step]] = {
        f"grpo, chunks of {chunk}": lambda chunk=chunk: ours(chunk) for chunk in (1024, 2048, 4096)
    }
    makers["trl"] = lambda: trl_logprob_step(hidden, head, targets, advantages)
    makers["liger-kernel"] = lambda: liger_logprob_step(hidden, head, targets, advantages)
    for name, make in makers.items():
        if name in ("trl", "liger-kernel") and not installed(name):
            figures.note(name, {"error": "not installed"})
            continue
        figures.note(name, tried(lambda make=make: measure(make(), options.repeats)))


def installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS), type=lambda text: text.split(","), help="comma-separated")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--settings", default=",".join(OURS), type=lambda text: text.split(","))
    parser.add_argument("--shared-forms", default="none,layer", type=lambda text: text.split(","))
    parser.add_argument("--groups", default="1,3", type=lambda text: [int(n) for n in text.split(",")], help="`shared`")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="ours alone")
    parser.add_argument("--tokens", type=int, default=16384, help="of a micro-batch")
    parser.add_argument("--length", type=int, default=2048, help="of a sequence")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=2048, help="train.logprob_chunk_tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model on a CPU: tries the script")
    parser.add_argument("--out", type=Path, help="write the result there too, as JSON")
    options = parser.parse_args()
    options.device = "cuda"
    if options.tiny:
        options.shape, options.tokens, options.length, options.rank = "tiny", 128, 32, 4
        options.device, options.repeats = "cpu", 1
    return options


def main() -> int:
    options = parse()
    functions = {"step": step_part, "shared": shared_part, "logprob": logprob_part}
    result: dict[str, Any] = {"benchmark": "train_step", "settings": settings_of(options)}
    for name in options.parts:
        print(name, flush=True)
        started = time.monotonic()
        result[name] = figures = Figures(lambda: write_result(options.out, result))
        failed = tried(lambda name=name, figures=figures: functions[name](options, figures) or {})
        if failed:
            figures.note("all", failed)
        result[f"{name}_seconds"] = round(time.monotonic() - started, 1)
        write_result(options.out, result)
    print(json.dumps(result))
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    names = ("shape", "tokens", "length", "rank", "chunk", "repeats")
    return {name: getattr(options, name) for name in names}


if __name__ == "__main__":
    sys.exit(main())
