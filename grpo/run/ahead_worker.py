"""A process that compiles launches of a run into Triton's cache on disk: python -m grpo.run.ahead_worker CLAIMS WORK

Makes the launches of a decoder's layer, forward and backward, of its output head and of a decoding step, by the same
host functions as the run, on tensors without memory. Several such processes share the work: whoever first puts a
kernel's name into the folder CLAIMS compiles it. WORK is JSON, of `compile_ahead.launches_of`. No GPU is used.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from grpo.kernels import (
    decode_attention,
    glu,
    logprob,
    lora_attention,
    lora_linear,
    lora_mlp,
    lora_shrink,
    nf4,
    residual_norm,
    rms_norm,
    sample,
    stored_weight,
)
from grpo.kernels.cards import Card, overlaps
from grpo.kernels.lora_factors import Adapter, LowRank
from grpo.kernels.nf4_gemm import fused_serves
from grpo.kernels.pretended import pretended
from grpo.run import tiles
from grpo.run.tied import DONE, PARTLY

CHUNK = 1024
"""Tokens whose logits exist at once."""
PROMPT_ROWS = 2048
"""Of products with a prompt, for which weights are dequantised."""


class Launches:
    """Those of a run, in the order in which it needs them."""

    def __init__(self, work: dict[str, Any], dtype: torch.dtype, decodes: bool):
        self.work, self.dtype, self.decodes = work, dtype, decodes
        self.linears: dict[str, dict[str, Any]] = work["linears"]

    def all(self) -> Iterator[Callable[[], None]]:
        """Each of them by itself, so that one that fails leaves the others."""
        if self.work["packed"]:
            yield self.quantize
        for rows in self.work["rows"]:
            if self.decodes:
                yield partial(self.decode, rows)
            if self.work["own_decoding"]:
                yield partial(self.between, rows)
                yield partial(self.attend, rows)
        yield partial(self.decode, PROMPT_ROWS)
        yield self.sample
        yield partial(self.head, False)
        yield partial(self.head, True)
        yield self.attention
        yield self.mlp
        yield self.last_norm

    def empty(self, *size: int, grad: bool = False) -> Tensor:
        return torch.empty(size, dtype=self.dtype, requires_grad=grad)

    def stored(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A linear layer's weight as the base holds it."""
        rows, columns = sum(self.linears[name]["rows"]), self.linears[name]["columns"]
        return (
            nf4.allocate(rows, columns, self.dtype, "cpu") if self.work["packed"] else (self.empty(rows, columns), None)
        )

    def bias(self, name: str) -> Tensor | None:
        return self.empty(sum(self.linears[name]["rows"])) if self.work["bias"] and name == "qkv_proj" else None

    def quantize(self) -> None:
        for name, linear in self.linears.items():
            packed, absmax = self.stored(name)
            assert absmax is not None
            for rows in linear["rows"]:
                nf4.quantize_rows(packed, absmax, 0, self.empty(rows, linear["columns"]))

    def decode(self, rows: int) -> None:
        """vLLM's linear layers, and what stands before an adapter's second half."""
        on = self.empty()
        early = self.work["own_decoding"] and lora_shrink.serves(self.empty(rows, 1))
        for name, linear in self.linears.items():
            weight, absmax = self.stored(name)
            x, features, ranks = self.empty(rows, linear["columns"]), sum(linear["rows"]), linear["ranks"]
            low_rank = None
            if ranks:
                a = self.empty(ranks, linear["columns"])
                x_lora_a = lora_shrink.lora_shrink(x, a, on, overlapped=early)
                low_rank = LowRank(x_lora_a, self.empty(features, ranks), early)
            stored_weight.linear(x, weight, absmax, self.bias(name), low_rank, self.empty(rows, features))

    def between(self, rows: int) -> None:
        """Norms and gates of a decoding step, as grpo/rollout/decoding_layers.py has them."""
        work = self.work
        x, weight = self.empty(rows, work["hidden"]), self.empty(work["hidden"])
        if not work["unit_offset"] and residual_norm.serves(x, x, weight):
            residual_norm.add_and_norm(x, self.empty(rows, work["hidden"]), weight, 1e-5)
        if work["activation"] in ("silu", "swish") and rows <= residual_norm.MOST_ROWS:
            gate_up = self.empty(rows, sum(self.linears["gate_up_proj"]["rows"]))
            early = overlaps(work["card"]["architecture"])
            glu.launch_forward(gate_up, "silu", self.empty(rows, gate_up.shape[1] // 2), overlapped=early)

    def attend(self, rows: int) -> None:
        """Attention of a decoding step, as grpo/rollout/decoding_attention.py has it."""
        work = self.work
        heads, pairs, size, page = work["heads"], work["key_value_heads"], work["head"], decode_attention.PAGE
        if not decode_attention.serves(heads, pairs, size, self.dtype, self.dtype):
            return
        if rows * pairs < decode_attention.LEAST_PROGRAMS:
            return
        query, keys, values = self.empty(rows, heads + 2 * pairs, size).split([heads, pairs, pairs], 1)
        pages = torch.empty(rows, -(-work["longest"] // page), dtype=torch.int32)
        if not decode_attention.fits(rows, heads, pairs, size, pages.shape[1] * page):
            return
        held_keys, held_values = self.empty(64, page, pairs, 2 * size).split(size, -1)
        new = decode_attention.NewToken(keys, values, self.empty(1024, size)) if work["rotates_last"] else None
        cache = decode_attention.Cache(held_keys, held_values, pages, torch.empty(rows, dtype=torch.int32))
        decode_attention.decode_attention(query, cache, 1.0, self.empty(rows, heads, size), new)

    def sample(self) -> None:
        width = -(-self.work["vocabulary"] // 64) * 64
        for dtype in (torch.float32, self.dtype):
            for rows in (2, 1, 16):
                logits = torch.empty(rows, width, dtype=dtype)[:, : self.work["vocabulary"]]
                sample.sample_tokens(logits, torch.empty(rows), 3)

    def group(self, *names: str) -> list[lora_linear.LinearGroup]:
        return [lora_linear.LinearGroup((self.stored(name),), self.bias(name), self.dtype) for name in names]

    def adapters(self, *names: str) -> tuple[list[list[Adapter]], list[Tensor]]:
        """Of each layer, and the A, B of all."""
        listed: list[list[Adapter]] = []
        factors: list[Tensor] = []
        for name in names:
            linear, first = self.linears[name], 0
            listed.append([])
            for rows in linear["rows"] if linear["ranks"] else ():
                listed[-1].append(Adapter(first, rows, 1.0))
                first += rows
                for size in ((self.work["r"], linear["columns"]), (rows, self.work["r"])):
                    factors.append(torch.empty(*size, requires_grad=True))
        return listed, factors

    def norm(self, columns: int) -> rms_norm.Norm:
        return rms_norm.Norm(self.empty(columns), 1e-5, self.work["unit_offset"])

    @property
    def tokens(self) -> int:
        return min(self.work["tokens"], 8192)

    def attention(self) -> None:
        """The way into attention and the projection behind it, forward and backward."""
        work, (qkv, out) = self.work, self.group("qkv_proj", "o_proj")
        head_norms = [self.norm(work["head"]) for _ in range(2)] if work["head_norms"] else [None, None]
        projection = lora_attention.QkvProjection(
            qkv, work["heads"], work["key_value_heads"], self.norm(work["hidden"]), *head_norms
        )
        x = self.empty(self.tokens, work["hidden"], grad=True)
        cos, sin = (torch.empty(self.tokens, work["head"]) for _ in range(2))
        (adapters,), factors = self.adapters("qkv_proj")
        for part in (cos, cos.to(self.dtype)):
            torch.autograd.backward(
                parts := lora_attention.lora_qkv(x, part, part, projection, adapters, factors),
                [torch.empty(each.shape, dtype=self.dtype) for each in parts],
            )
        (adapters,), factors = self.adapters("o_proj")
        attended = self.empty(self.tokens, out.in_features, grad=True)
        y = lora_linear.lora_linear(attended, out, adapters, factors)
        y.backward(torch.empty_like(y))

    def mlp(self) -> None:
        names = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
        gate_up, down = self.group("gate_up_proj", "down_proj")
        gated = lora_mlp.GatedMlp(
            gate_up, down, names[self.work["activation"]], self.norm(self.work["hidden"]), residual=True
        )
        adapters, factors = self.adapters("gate_up_proj", "down_proj")
        for keep in (True, False):
            x = self.empty(self.tokens, self.work["hidden"], grad=True)
            y = lora_mlp.lora_mlp(x, gated, (adapters[0], adapters[1]), factors, keep=keep)
            y.backward(torch.empty_like(y))

    def last_norm(self) -> None:
        x = self.empty(self.tokens, self.work["hidden"], grad=True)
        y = rms_norm.rms_norm(x, self.norm(self.work["hidden"]))
        y.backward(torch.empty_like(y))

    def head(self, gradient: bool) -> None:
        x = self.empty(CHUNK, self.work["hidden"], grad=gradient)
        weight, targets = (
            self.empty(self.work["vocabulary"], self.work["hidden"]),
            torch.empty(CHUNK, dtype=torch.int64),
        )
        for temperature in (1.0, self.work["temperature"]):
            logprob.selected_logprobs(x, weight, targets, temperature=temperature, softcap=self.work["softcap"])


class Claims:
    """Which kernels this process compiles: those that it is the first to name."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.taken: list[str] = []

    def __call__(self, *, key: Any, fn: Any, **others: Any) -> bool:
        """Triton's hook before it compiles: whether to leave it."""
        try:
            (self.folder / hashlib.sha256(f"{fn.module}.{fn.name} {key}".encode()).hexdigest()).touch(exist_ok=False)
        except FileExistsError:
            return True
        self.taken.append(fn.name)
        return False


def launcher(source: Any, metadata: Any) -> Callable[..., None]:
    """What launches a compiled kernel: nothing; but Triton has a C compiler make its launcher where it needs one for
    every kind of arguments, and finds it on disk later."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(source, metadata)
    except Exception:  # no driver, no compiler, or a Triton that makes none
        pass
    return lambda *arguments: None


def run(work: dict[str, Any], claims: Path) -> tuple[list[str], list[str]]:
    """Names of the kernels that were compiled here, and what failed."""
    card = Card(**work["card"])
    dtype = work["dtype"]
    if dtype == "auto":
        dtype = "bfloat16" if card.architecture >= 80 else "float16"
    hook, failed = Claims(claims), []
    tiles.load_measured(card)
    shapes = [(sum(linear["rows"]), linear["columns"]) for linear in work["linears"].values()]
    triton.knobs.runtime.jit_cache_hook = hook
    with pretended(card):
        triton.runtime.driver.active.launcher_cls = launcher
        kind = getattr(torch, dtype)
        measured = fused_serves(kind, torch.device("cuda", 0)) and not tiles.unmeasured(card, shapes)
        for launch in Launches(work, kind, measured or not work["packed"]).all():
            try:
                launch()
            except Exception as error:  # the run compiles it itself
                failed.append(f"{type(error).__name__}: {error}")
    return hook.taken, failed


def main(arguments: list[str]) -> int:
    taken, failed = run(json.loads(arguments[1]), Path(arguments[0]))
    print(json.dumps({"compiled": taken, "failed": failed}))
    return PARTLY if failed else DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
