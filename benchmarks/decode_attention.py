"""Attention of a decoding step: our kernel, by its cuts, against vLLM's FlashAttention and its Triton kernel.

One layer's shape, a paged bf16 cache, groups of 8 sequences that share a prompt's pages, several caches in turn so
that none is found in the L2 cache, CUDA graphs. `floor`: the distinct bytes of keys and values at 4.3 TB/s (H200) or
3.0 (H100). The kernel with the new token coming in replaces rotation and cache write too (`fused`); these are timed
apart for vLLM (`before`).

    python -m benchmarks.decode_attention --shape 3b --out benchmarks/results/decode_attention.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.kernels import nf4_tuner
from grpo.kernels.cards import overlaps
from grpo.kernels.compile_only import compiling_for
from grpo.kernels.decode_attention import Cache, Cut, NewToken, _torch, launch_decode
from grpo.kernels.split_k import workspace
from grpo.run.versions import hardware, versions

SHAPES = {"3b": (24, 8, 128), "8b": (32, 8, 128), "tiny": (6, 2, 64)}
"""Heads, key-value heads, head size."""
CASES = (
    (16, 128, 128), (32, 128, 128), (64, 128, 128), (128, 128, 128), (256, 128, 128), (128, 1024, 128),
    (128, 128, 448), (32, 1024, 1024),
)  # fmt: skip
"""(sequences, tokens of a shared prompt, tokens of a completion so far)."""
CUTS = tuple(
    Cut(*each) for each in (
        (16, 1, 4), (16, 2, 4), (32, 1, 3), (32, 2, 2), (32, 2, 3), (32, 2, 4), (32, 4, 3), (32, 4, 4),
        (64, 2, 2), (64, 2, 3), (64, 4, 2), (64, 4, 3), (64, 4, 4), (128, 4, 2), (128, 4, 3), (128, 8, 3),
    )
)  # fmt: skip
GROUP, PAGE, CACHES = 8, 16, 4
BANDWIDTH = {"H200": 4.3e12, "H100": 3.0e12}


def make_case(
    shape: tuple[int, int, int], sequences: int, prompt: int, completion: int, longest: int, device: str
) -> tuple[Tensor, list[Cache], NewToken]:
    heads, kv_heads, size = shape
    each = -(-longest // PAGE)
    shared = prompt // PAGE
    groups = -(-sequences // GROUP)
    own = torch.arange(sequences * (each - shared)).view(sequences, each - shared) + groups * shared
    prompts = torch.arange(groups * shared).view(groups, shared).repeat_interleave(GROUP, 0)[:sequences]
    pages = torch.cat([prompts, own], 1)
    pages = torch.randperm(int(pages.max()) + 1)[pages].int().to(device)
    lengths = torch.full((sequences,), prompt + completion, dtype=torch.int32, device=device)
    caches = []
    for _ in range(CACHES):
        held = torch.randn(int(pages.max()) + 1, PAGE, kv_heads, 2 * size, device=device, dtype=torch.bfloat16)
        caches.append(Cache(held[..., :size], held[..., size:], pages, lengths))
    projected = torch.randn(sequences, heads + 2 * kv_heads, size, device=device, dtype=torch.bfloat16)
    query, keys, values = projected.split([heads, kv_heads, kv_heads], 1)
    angles = torch.arange(longest)[:, None] * 5e5 ** -(torch.arange(size // 2) / (size // 2))[None]
    cos_sin = torch.cat([angles.cos(), angles.sin()], 1).bfloat16().to(device)
    return query, caches, NewToken(keys, values, cos_sin)


def longest_of(case: tuple[int, int, int]) -> int:
    """Of the sequences that such an engine takes."""
    return 640 if case[1] + case[2] <= 640 else 2048


def compile_ahead(shape: tuple[int, int, int], cuts: tuple[Cut, ...], architecture: int) -> None:
    """Compile what will be timed on all cores. Before CUDA starts: processes are forked."""
    with ProcessPoolExecutor(min(15, os.cpu_count() or 1), get_context("fork")) as pool:
        jobs = [pool.submit(compile_one, shape, cut, case, architecture) for cut in cuts for case in CASES[-2:]]
        for job in jobs:
            job.result()


def compile_one(
    shape: tuple[int, int, int], cut: Cut, case: tuple[int, int, int], architecture: int
) -> list[tuple[str, int]]:
    """[(kernel, bytes of shared memory)] of one cut, with and without the new token."""
    torch.set_num_threads(1)
    sizes: list[tuple[str, int]] = []
    _, prompt, completion = case
    query, caches, new = make_case(shape, GROUP, prompt, completion, longest_of(case), "cpu")
    with compiling_for(architecture, loaded=lambda name, binary, shared: sizes.append((name, shared))):
        for given in (None, new):
            out, overlapped = torch.empty(query.shape, dtype=query.dtype), overlaps(architecture)
            launch_decode(query, caches[0], 1.0, out, given, cut, overlapped=overlapped)
    return sizes


def vllms(query: Tensor, caches: list[Cache], new: NewToken, scale: float) -> dict[str, Callable[[Cache], Any]]:
    """vLLM's own kernels, each a call with one cache."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_scheduler_metadata
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    sequences, heads, size = query.shape
    pages, lengths = caches[0].pages, caches[0].lengths
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=query.device)
    longest = pages.shape[1] * PAGE
    kv_heads = caches[0].keys.shape[2]
    schedule = get_scheduler_metadata(
        batch_size=sequences, max_seqlen_q=1, max_seqlen_k=longest, num_heads_q=heads, num_heads_kv=kv_heads,
        headdim=size, cache_seqlens=lengths, qkv_dtype=query.dtype, cu_seqlens_q=starts, page_size=PAGE, causal=True,
        window_size=(-1, -1), num_splits=32,
    )  # fmt: skip
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    positions = (lengths - 1).long()
    slots = (pages.gather(1, (positions // PAGE)[:, None])[:, 0] * PAGE + positions % PAGE).long()
    one = torch.ones(1, device=query.device)

    def flash(cache: Cache) -> None:
        flash_attn_varlen_func(
            q=query, k=cache.keys, v=cache.values, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=longest, softmax_scale=scale, causal=True, window_size=[-1, -1], block_table=pages,
            scheduler_metadata=schedule, fa_version=3, num_splits=32,
        )  # fmt: skip

    def flash_unsplit(cache: Cache) -> None:
        flash_attn_varlen_func(
            q=query, k=cache.keys, v=cache.values, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=longest, softmax_scale=scale, causal=True, window_size=[-1, -1], block_table=pages,
            fa_version=3, num_splits=1,
        )  # fmt: skip

    def triton(cache: Cache) -> None:
        unified_attention(
            q=query, k=cache.keys, v=cache.values, out=out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=lengths,
            max_seqlen_k=longest, softmax_scale=scale, causal=True, window_size=(-1, -1), block_table=pages,
            softcap=0.0, q_descale=None, k_descale=None, v_descale=None,
        )  # fmt: skip

    def before(cache: Cache) -> None:
        flat_q, flat_k = query.flatten(1), new.keys.flatten(1)
        ops.rotary_embedding(positions, flat_q, flat_k, size, new.cos_sin, True)
        ops.reshape_and_cache_flash(new.keys, new.values, cache.keys, cache.values, slots, "auto", one, one)

    return {"flash": flash, "flash_unsplit": flash_unsplit, "triton": triton, "before": before}


def microseconds(caches: list[Cache], call: Callable[[Cache], Any]) -> float:
    return round(nf4_tuner.microseconds(caches * 2, call, 4.0), 2)


def attend(query: Tensor, scale: float, out: Tensor, new: NewToken | None, cut: Cut, cache: Cache) -> None:
    launch_decode(query, cache, scale, out, new, cut)


def examine(shape: tuple[int, int, int], case: tuple[int, int, int], cuts: tuple[Cut, ...]) -> dict[str, Any]:
    sequences, prompt, completion = case
    longest = longest_of(case)
    query, caches, new = make_case(shape, sequences, prompt, completion, longest, "cuda")
    scale, out = shape[2] ** -0.5, torch.empty(query.shape, dtype=query.dtype, device="cuda")
    unique = sequences // GROUP * prompt + sequences * completion
    bytes_each = 4 * shape[1] * shape[2]
    card = torch.cuda.get_device_name()
    speed = next((value for key, value in BANDWIDTH.items() if key in card), 3.0e12)
    entry: dict[str, Any] = {
        "sequences": sequences, "prompt": prompt, "completion": completion,
        "floor": round(unique * bytes_each / speed * 1e6, 2),
        "floor_if_nothing_is_shared": round(sequences * (prompt + completion) * bytes_each / speed * 1e6, 2),
    }  # fmt: skip
    wanted, wanted_new = torch.empty_like(out), torch.empty_like(out)
    for cache in caches:
        _torch(query[:2], cache, scale, wanted_new[:2], NewToken(new.keys[:2], new.values[:2], new.cos_sin))
    _torch(query[:2], caches[0], scale, wanted[:2], None)
    for cut in cuts:
        key = f"{cut.tokens}x{cut.warps}x{cut.stages}"
        try:
            for name, cache, given, right in (
                ("ours", caches[0], None, wanted),
                ("fused", caches[-1], new, wanted_new),
            ):
                call = partial(attend, query, scale, out, given, cut)
                call(cache)
                error = float((out[:2].float() - right[:2].float()).norm() / right[:2].float().norm())
                if error > 0.01:
                    entry[f"wrong {name} {key}"] = error
                else:
                    entry[f"{name} {key}"] = microseconds(caches, call)
        except Exception as problem:
            entry[f"failed {key}"] = f"{type(problem).__name__}: {problem}"[:200]
    for key, call in vllms(query, caches, new, scale).items():
        try:
            entry[key] = microseconds(caches, call)
        except Exception as problem:
            entry[f"failed {key}"] = f"{type(problem).__name__}: {problem}"[:200]
    return entry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", default="3b", choices=SHAPES)
    parser.add_argument("--cuts", help="TOKENSxWARPSxSTAGES,...; all if left out")
    parser.add_argument(
        "--architecture", type=int, default=90, help="of the GPU: kernels are compiled before it is used"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuts = CUTS
    if options.cuts:
        cuts = tuple(Cut(*map(int, text.split("x"))) for text in options.cuts.split(","))
    compile_ahead(SHAPES[options.shape], cuts, options.architecture)
    workspace(torch.device("cuda"))
    found: dict[str, Any] = {"benchmark": "decode_attention", "shape": options.shape, "cases": []}
    found |= {"hardware": hardware(), "versions": versions()}
    for case in CASES:
        entry = examine(SHAPES[options.shape], case, cuts)
        found["cases"].append(entry)
        ours = sorted((value, key) for key, value in entry.items() if key.startswith(("ours", "fused")))
        rest = {key: value for key, value in entry.items() if not key.startswith(("ours", "fused"))}
        print(json.dumps(rest), ours[:3], [each for each in ours if each[1].startswith("fused")][:3], flush=True)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    best = [min(v for k, v in entry.items() if k.startswith("fused")) for entry in found["cases"]]
    print(json.dumps({"benchmark": "decode_attention", "shape": options.shape, "median_us": statistics.median(best)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
