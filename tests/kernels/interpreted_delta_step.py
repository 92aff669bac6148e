"""kernels/delta_step.py and its layer for vLLM in Triton's interpreter, on the CPU, against the layer for a CPU.

test_recurrence.py runs this with TRITON_INTERPRET=1.
"""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from grpo.kernels.gated_norm import gated_norm
from grpo.kernels.recurrence import CHUNK
from grpo.rollout import vllm_delta_rule, vllm_recurrence_cpu

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_recurrence.py runs this file"

PAGES, EPS = 9, 1e-6


def layer_of(dtype, key_heads, shared, dim, value_dim, width=4, first=False):
    """vLLM's layer as far as the two that compute it look at it; its pages hold something."""
    torch.manual_seed(0)
    heads = key_heads * shared
    keys, values = key_heads * dim, heads * value_dim
    channels, hidden = 2 * keys + values, 24
    into, gates, out = torch.randn(channels + values, hidden), torch.randn(2 * heads, hidden), torch.randn(16, values)
    weight = torch.rand(value_dim).to(dtype)

    def norm(x, gate):
        return gated_norm(x, gate, weight, EPS)

    conv = torch.randn(PAGES, width - 1, channels).to(dtype)
    held = conv.transpose(1, 2).contiguous() if first else conv
    return SimpleNamespace(
        prefix="layer", activation="silu", key_dim=keys, value_dim=values, num_k_heads=key_heads, num_v_heads=heads,
        head_k_dim=dim, head_v_dim=value_dim, conv1d=SimpleNamespace(weight=torch.randn(channels, 1, width).to(dtype)),
        A_log=torch.randn(heads), dt_bias=torch.randn(heads).to(dtype), norm=Norm(norm, weight),
        kv_cache=(held, torch.randn(PAGES, heads, value_dim, dim)),
        in_proj_qkvz=lambda x: (F.linear(x, into.to(dtype)), None),
        in_proj_ba=lambda x: (F.linear(x, gates.to(dtype)), None),
        out_proj=lambda x: (F.linear(x, out.to(dtype)), None),
        _output_projection=lambda y, z: F.linear(norm(y, z).flatten(1), out.to(dtype)),
    )  # fmt: skip


class Norm:
    def __init__(self, call, weight):
        self.call, self.weight, self.eps, self.activation = call, weight, EPS, "silu"

    def __call__(self, x, gate):
        return self.call(x, gate)


def metadata_of(decodes, prompts, begun):
    """vLLM's of a batch: so many single tokens, then prompts of these lengths."""
    lengths = [1] * decodes + prompts
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    slots = torch.randperm(PAGES - 1, generator=torch.Generator().manual_seed(3))[: len(lengths)].int() + 1
    own = (ends[decodes:] - decodes).contiguous()
    counts = [-(-length // CHUNK) for length in prompts]
    chunks = [(sequence, number) for sequence, count in enumerate(counts) for number in range(count)]
    return SimpleNamespace(
        spec_sequence_masks=None, num_actual_tokens=sum(lengths), num_decodes=decodes, num_prefills=len(prompts),
        non_spec_query_start_loc=ends, non_spec_state_indices_tensor=slots,
        has_initial_state=torch.tensor([True] * decodes + begun), prefill_query_start_loc=own,
        prefill_state_indices=slots[decodes:], prefill_has_initial_state=torch.tensor(begun, dtype=torch.bool),
        chunk_indices=torch.tensor(chunks).view(-1, 2), chunk_offsets=F.pad(torch.tensor(counts).cumsum(0), (1, 0)),
    )  # fmt: skip


def check(monkeypatch, layer, metadata, dtype, *, padding=0):
    context = SimpleNamespace(attn_metadata={"layer": metadata})
    for module in (vllm_delta_rule, vllm_recurrence_cpu):
        monkeypatch.setattr(module, "get_forward_context", lambda: context)
        first = layer.kv_cache[0].shape[1] == layer.conv1d.weight.shape[0]
        monkeypatch.setattr(module, "is_conv_state_dim_first", lambda first=first: first)
    x = torch.randn(metadata.num_actual_tokens + padding, 24).to(dtype)
    before = [page.clone() for page in layer.kv_cache]
    expected = vllm_recurrence_cpu.delta_net(layer, x)
    after = [page.clone() for page in layer.kv_cache]
    for page, old in zip(layer.kv_cache, before, strict=True):
        page.copy_(old)
    found = vllm_delta_rule.delta_net(layer, x)
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    used = metadata.num_actual_tokens
    for one, other in ((found[:used], expected[:used]), *zip(layer.kv_cache, after, strict=True)):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).norm() <= bound * other.float().norm()
    assert not found[used:].any()
    assert not torch.equal(after[1], before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 2, 16, 40), (1, 3, 8, 6), (2, 1, 20, 64)])
def test_tokens(monkeypatch, dtype, sizes):
    check(monkeypatch, layer_of(dtype, *sizes), metadata_of(5, [], []), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_any_length_that_continue_or_begin(monkeypatch, dtype):
    layer = layer_of(dtype, 2, 2, 16, 24)
    check(monkeypatch, layer, metadata_of(0, [1, 2, 130, 64, 3], [True, True, True, False, False]), dtype)


def test_tokens_before_prompts_and_padding_behind(monkeypatch):
    check(
        monkeypatch,
        layer_of(torch.float32, 2, 2, 8, 8),
        metadata_of(3, [70, 2], [False, True]),
        torch.float32,
        padding=2,
    )


@pytest.mark.parametrize("width", [2, 3, 5])
def test_widths(monkeypatch, width):
    layer = layer_of(torch.float32, 1, 2, 8, 8, width)
    check(monkeypatch, layer, metadata_of(2, [1, 9], [True, False]), torch.float32)


def test_pages_with_their_channels_first(monkeypatch):
    layer = layer_of(torch.float32, 1, 2, 8, 8, first=True)
    check(monkeypatch, layer, metadata_of(2, [1, 9], [True, False]), torch.float32)


def test_rows_without_a_page_are_zero_and_touch_none(monkeypatch):
    layer, metadata = layer_of(torch.float32, 1, 2, 8, 8), metadata_of(4, [], [])
    metadata.non_spec_state_indices_tensor[2:] = 0
    before = [page.clone() for page in layer.kv_cache]
    monkeypatch.setattr(
        vllm_delta_rule, "get_forward_context", lambda: SimpleNamespace(attn_metadata={"layer": metadata})
    )
    found = vllm_delta_rule.delta_net(layer, torch.randn(4, 24))
    assert found[:2].any() and not found[2:].any()
    untouched = [page for page in range(PAGES) if page not in metadata.non_spec_state_indices_tensor[:2].tolist()]
    for page, old in zip(layer.kv_cache, before, strict=True):
        assert torch.equal(page[untouched], old[untouched])
