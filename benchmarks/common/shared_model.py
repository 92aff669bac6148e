"""What benchmarks measure of a loaded model: memory by owner, storage identity, adapter sync, rollout throughput.

Reads only; the caller loads the base, builds the policy and starts the engine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from grpo.kernels.split_k import SHRINK_BYTES, WORKSPACE_BYTES, workspace
from grpo.policy.lora_linear import BaseLinear
from grpo.policy.policy import Policy
from grpo.rollout.engine import Engine, Request, SamplingSettings


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Identity


def vllm_storage(engine: Engine) -> dict[str, Tensor]:
    """Every base tensor as vLLM's modules hold it: parameter name, or `<linear>.absmax`."""
    found: dict[str, Tensor] = {}
    for name, parameter in engine.vllm_model().named_parameters(remove_duplicate=False):
        found[name] = parameter.data
    for module in engine.vllm_model().modules():
        shared = getattr(module, "shared", None)
        if shared is None:
            continue
        for number, segment in enumerate(shared.segments):
            suffix = f".{number}" if number else ""
            found[f"{shared.name}.weight{suffix}"] = segment.weight if number else module.weight.data
            if segment.absmax is not None:
                found[f"{shared.name}.absmax{suffix}"] = segment.absmax
    return found


def trainer_storage(policy: Policy) -> dict[str, Tensor]:
    """Every base tensor as the training graph holds it, by transformers' name; adapters left out."""
    found: dict[str, Tensor] = {}
    for name, module in policy.decoder.named_modules():
        plain = name.removesuffix(".base_layer")
        if isinstance(module, BaseLinear):
            found[f"{plain}.weight"] = module.weight.data
            found |= {f"{plain}.{key}": value for key, value in module.named_buffers() if value is not None}
        elif ".lora_" not in name:
            found |= {f"{name}.{key}": value.data for key, value in module.named_parameters(recurse=False)}
    return found


def identity(engine: Engine, policy: Policy) -> dict[str, Any]:
    """Whether each base tensor of the training graph starts where its rows lie in vLLM's tensor.

    Addresses are compared, not values. `tensors` counts the training graph's; `different` names those that fail.
    """
    served, trained = vllm_storage(engine), trainer_storage(policy)
    place = {
        part: (linear.name, first)
        for linear in engine.base.linears.values()
        for part, (first, _) in linear.parts.items()
    }
    different, unseen = [], set(served)
    for name, tensor in trained.items():
        module, _, kind = name.rpartition(".")
        fused, first = place.get(module, (module, 0))
        whole = served.get(f"{fused}.{kind}", served.get(name))
        if whole is None and name == "lm_head.weight":
            whole = served.get("model.embed_tokens.weight")
        if whole is None:
            different.append(name)
            continue
        unseen -= {f"{fused}.{kind}", name}
        offset = first * whole.stride(0) * whole.element_size()
        same = tensor.data_ptr() == whole.data_ptr() + offset
        if not same or tensor.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            different.append(name)
    owned = {tensor.untyped_storage().data_ptr() for tensor in engine.base.storages()}
    foreign = [name for name in unseen if served[name].untyped_storage().data_ptr() not in owned]
    return {
        "tensors": len(trained),
        "vllm_tensors": len(served),
        "different": different,
        "vllm_only": sorted(foreign),
        "bytes_both_sides": storage_bytes([*served.values(), *trained.values()]),
    }


# Memory


def memory_parts(engine: Engine, policy: Policy | None) -> dict[str, int]:
    """Allocated GPU memory by owner, in bytes. `weights` is what remains: the base, held by both sides together."""
    runner = engine.llm.llm_engine.model_executor.driver_worker.model_runner
    caches = [t for cache in runner.kv_caches for t in (cache if isinstance(cache, list | tuple) else [cache])]
    adapter = storage_bytes(policy.parameters()) if policy is not None else 0
    adapter += sum(storage_bytes([buffers.a, buffers.b]) for buffers in engine.adapter.buffers.values())
    parts = {
        "kv_cache": storage_bytes(caches),
        "cuda_graphs": graph_bytes(),
        "adapter": adapter,
        "product_workspace": sum(
            storage_bytes(workspace(engine.base.device, size)) for size in (WORKSPACE_BYTES, SHRINK_BYTES)
        )
        if engine.base.packed
        else 0,
        "vllm_step_buffers": storage_bytes(step_buffers(runner)) + storage_bytes(rotary_tables(engine.vllm_model())),
    }
    allocated = torch.cuda.memory_allocated()
    return {"allocated": allocated, **parts, "weights": allocated - sum(parts.values())}


def graph_bytes() -> int:
    """Live blocks in private pools: what CUDA graphs keep."""
    return sum(
        block["size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
        for block in segment["blocks"]
        if block["state"].startswith("active")
    )


def step_buffers(runner: Any) -> list[Tensor]:
    """GPU tensors that vLLM's model runner keeps for its inputs."""
    values = [getattr(value, "gpu", value) for value in vars(runner).values()]
    return [value for value in values if isinstance(value, Tensor) and value.is_cuda]


def rotary_tables(model: nn.Module) -> list[Tensor]:
    return [buffer for name, buffer in model.named_buffers() if "cos_sin" in name and buffer.is_cuda]


# Speed and agreement


def sync_times(engine: Engine, policy: Policy, repeats: int = 20) -> dict[str, Any]:
    """Milliseconds of `repeats` adapter syncs, each after a change to the adapter."""
    times = []
    for _ in range(repeats):
        with torch.no_grad():
            torch._foreach_mul_(policy.parameters(), 1.0001)
        synchronize()
        times.append(engine.sync_adapter() * 1e3)
    rounded = [round(time, 3) for time in times]
    return {"median_ms": round(statistics.median(times), 3), "worst_ms": max(rounded), "all_ms": rounded}


def randomize_adapter(policy: Policy, size: float = 0.02) -> None:
    """B ~ N(0, size): an adapter whose absence would show."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            b = layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape, generator=generator) * size)


def random_requests(vocabulary: int, count: int, tokens: int, seed: int) -> list[Request]:
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(10, vocabulary, (count, tokens), generator=generator).tolist()
    return [Request(number, prompt, seed * 10_000 + number) for number, prompt in enumerate(prompts)]


def rollout_seconds(engine: Engine, count: int, prompt_tokens: int, new_tokens: int, seed: int) -> tuple[float, int]:
    """(seconds, sampled tokens) of one rollout of `count` fresh random prompts."""
    requests = random_requests(engine.base.config.vocab_size, count, prompt_tokens, seed)
    synchronize()
    start = time.perf_counter()
    tokens = sum(len(c.token_ids) for c in engine.generate(requests, SamplingSettings(1.0, new_tokens)))
    synchronize()
    return time.perf_counter() - start, tokens


def throughput(engine: Engine, count: int, prompt_tokens: int, new_tokens: int, repeats: int = 3) -> dict[str, Any]:
    """Tokens a second at `count` sequences: of a whole rollout, and of decoding alone (a one-token rollout taken off).

    Medians over `repeats`, after one rollout that does not count, as long as the others: what it meets on its way is
    compiled then.
    """
    rollout_seconds(engine, count, prompt_tokens, new_tokens, seed=1)
    whole, decoding = [], []
    for repeat in range(repeats):
        prefill, first = rollout_seconds(engine, count, prompt_tokens, 1, seed=100 + repeat)
        seconds, tokens = rollout_seconds(engine, count, prompt_tokens, new_tokens, seed=200 + repeat)
        whole.append(tokens / seconds)
        decoding.append((tokens - first) / (seconds - prefill))
    return {
        "sequences": count,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rollout_tokens_per_second": round(statistics.median(whole), 1),
        "decode_tokens_per_second": round(statistics.median(decoding), 1),
    }


@torch.no_grad()
def agreement(
    engine: Engine, policy: Policy, prompts: list[list[int]], new_tokens: int, **sampling: Any
) -> dict[str, Any]:
    """Rollout logprobs against the training graph's for one completion of every prompt, at temperature 1.

    `mismatch_kl` is the mean over tokens of exp(d) - d - 1 with d the trainer's less the rollout's logprob (Schulman's
    k3, an estimate of KL(rollout || trainer)).
    """
    requests = [Request(number, prompt, 5_000 + number) for number, prompt in enumerate(prompts)]
    completions = sorted(
        engine.generate(requests, SamplingSettings(1.0, new_tokens, **sampling)), key=lambda done: done.request_id
    )
    differences = []
    for completion in completions:
        scored = policy.score([prompts[completion.request_id]], [completion.token_ids], temperature=1.0)
        differences.append(scored.logprobs.double().cpu() - torch.tensor(completion.logprobs, dtype=torch.float64))
    return mismatch(differences, new_tokens)


def mismatch(differences: list[Tensor], new_tokens: int) -> dict[str, Any]:
    """Statistics of `differences`, one float64 tensor [tokens] a completion: trainer's less rollout's logprob."""
    d = torch.cat(differences)
    # What a mean over dependent tokens is worth: the standard error counts completions, not tokens.
    means = torch.stack([own.abs().mean() for own in differences])
    return {
        "completions": len(differences),
        "full_length": sum(len(own) == new_tokens for own in differences),
        "tokens": d.numel(),
        "mean_abs": d.abs().mean().item(),
        "mean_abs_standard_error": (means.std() / len(means) ** 0.5).item() if len(means) > 1 else None,
        "max_abs": d.abs().max().item(),
        "mean": d.mean().item(),
        "mismatch_kl": (d.exp() - d - 1).mean().item(),
    }
