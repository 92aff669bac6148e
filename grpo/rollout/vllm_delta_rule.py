"""The gated delta rule over prompts while sampling, by the kernels that training has, in the place of vLLM's.

vLLM's keep what lies between their steps in bfloat16, the states at the chunks' ends above all. A sequence begins with
such a state, and its tokens' logprobs carry the difference from training's, which has float32 there. And there is
nothing to tune at the first start of a machine. Single tokens are left to vLLM, which has their states in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grpo.kernels import delta_rule
from grpo.kernels.gated_delta import EPS
from grpo.kernels.recurrence import CHUNK, Order, Run


class PromptRule(nn.Module):
    """Called as vLLM's ChunkGatedDeltaRule, which `others` is: it has what our kernels do not compute."""

    _latest: tuple[Tensor | None, Run | None] = (None, None)
    """Of all layers: the chunks of the batch that was computed last."""

    def __init__(self, others: nn.Module):
        super().__init__()
        self.others = others

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        output_final_state: bool,
        cu_seqlens: Tensor,
        chunk_indices: Tensor | None = None,
        chunk_offsets: Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = True,
        core_attn_out: Tensor | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor]:
        """(y [1, tokens, heads, value dim], the states after the sequences [sequences, heads, value dim, key dim]).

        q, k [1, tokens, key heads, key dim], of any length, v like y; g, beta [1, tokens, heads]; cu_seqlens
        [sequences + 1]; chunk_indices [chunks, 2]: sequence and number in it; chunk_offsets [sequences + 1].
        """
        inputs = delta_rule.Inputs(*(part[0] for part in (q, k, v, g, beta)))
        if not delta_rule.serves(inputs):
            return self.others(
                q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state, output_final_state=output_final_state,
                cu_seqlens=cu_seqlens, chunk_indices=chunk_indices, chunk_offsets=chunk_offsets,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, core_attn_out=core_attn_out, **more,
            )  # fmt: skip
        run = self.run_of(cu_seqlens, chunk_indices, chunk_offsets)
        begin = initial_state.transpose(-1, -2).float().contiguous()
        out = torch.empty(inputs.value.shape, dtype=v.dtype, device=v.device)
        after = delta_rule.along(inputs, run, delta_rule.prepare(inputs, run, EPS), EPS, out, begin=begin)
        if core_attn_out is not None:
            core_attn_out.reshape(-1)[: out.numel()].copy_(out.reshape(-1))
        return out[None], after.transpose(-1, -2)

    @classmethod
    def run_of(cls, ends: Tensor, chunk_indices: Tensor | None, chunk_offsets: Tensor | None) -> Run:
        """The chunks of sequences, made once for all layers where vLLM has counted them."""
        if chunk_indices is None or chunk_offsets is None:
            return run_of_sequences(ends, *counted(ends))
        indices, run = cls._latest
        if indices is not chunk_indices or run is None:
            run = run_of_sequences(ends, chunk_indices, chunk_offsets)
            PromptRule._latest = chunk_indices, run
        return run


def counted(ends: Tensor) -> tuple[Tensor, Tensor]:
    """chunk_indices and chunk_offsets of sequences that end at `ends`."""
    chunks = [-(-length // CHUNK) for length in ends.diff().tolist()]
    indices = [(sequence, number) for sequence, count in enumerate(chunks) for number in range(count)]
    offsets = torch.tensor([0, *chunks]).cumsum(0)
    return torch.tensor(indices).to(ends.device), offsets.to(ends.device)


def run_of_sequences(ends: Tensor, chunk_indices: Tensor, chunk_offsets: Tensor) -> Run:
    """The chunks of sequences side by side, each of which continues the state of its number."""
    sequence, number = chunk_indices.long().unbind(1)
    starts = ends[sequence] + CHUNK * number
    counts = (ends[sequence + 1] - starts).clamp(max=CHUNK)
    own = torch.arange(len(ends) - 1, device=ends.device)
    spans = torch.stack([ends[:-1], ends.diff(), chunk_offsets[:-1].to(ends), own.to(ends)], 1)
    return Run(starts.int(), counts.int(), [Order(spans.int().contiguous(), None)])
