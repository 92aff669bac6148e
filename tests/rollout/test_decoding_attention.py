"""Which of vLLM's layers take our kernel for decoding steps, and when."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.forward_context import override_forward_context  # noqa: E402
from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl  # noqa: E402

from grpo.kernels.decode_attention import _torch  # noqa: E402
from grpo.rollout import decoding_attention  # noqa: E402
from grpo.rollout.decoding_attention import DecodingImpl, LateRotary, serve_decoding  # noqa: E402
from tests.helpers.decode_cases import case  # noqa: E402

HEADS, KV_HEADS, SIZE = 6, 2, 64
PLAIN = {
    "num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": SIZE, "scale": SIZE**-0.5, "attn_type": "decoder",
    "kv_cache_dtype": "auto", "kv_sharing_target_layer_name": None, "alibi_slopes": None, "sinks": None,
    "logits_soft_cap": 0, "sliding_window": (-1, -1), "dcp_world_size": 1,
}  # fmt: skip


class LlamaAttention(nn.Module):
    def __init__(self, **changed):
        super().__init__()
        impl = FlashAttentionImpl.__new__(FlashAttentionImpl)
        impl.__dict__.update(PLAIN | changed)
        self.attn = nn.Module()
        self.attn.impl, self.attn.layer_name, self.attn.head_size = impl, "layers.0.attn", SIZE
        self.attn.kv_cache = torch.empty(0, KV_HEADS, 16, 2 * SIZE)
        self.rotary_emb = Rotary()


class Rotary(decoding_attention.RotaryEmbedding):
    def __init__(self):
        nn.Module.__init__(self)
        self.is_neox_style, self.head_size, self.cos_sin_cache = True, SIZE, torch.ones(96, SIZE)

    def forward(self, positions, query, key):
        return query + 1, key + 1


class OtherAttention(LlamaAttention):
    pass


def step(sequences, **changed):
    """A decoding step's metadata."""
    values = {
        "max_query_len": 1, "use_cascade": False, "causal": True, "num_actual_tokens": sequences,
        "seq_lens": torch.ones(sequences, dtype=torch.int32),
        "block_table": torch.zeros(sequences, 6, dtype=torch.int32),
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def test_a_plain_layer_takes_the_kernel_and_its_rotation():
    layer = LlamaAttention()
    assert serve_decoding(nn.Sequential(layer), torch.bfloat16) == 1
    assert type(layer.attn.impl) is DecodingImpl and layer.attn.impl.cos_sin is layer.rotary_emb.rotary.cos_sin_cache


def test_a_module_of_another_kind_rotates_itself():
    layer = OtherAttention()
    assert serve_decoding(nn.Sequential(layer), torch.bfloat16) == 1
    assert layer.attn.impl.cos_sin is None and isinstance(layer.rotary_emb, Rotary)


@pytest.mark.parametrize(
    "changed",
    [
        {"sliding_window": (127, 0)}, {"sinks": torch.ones(HEADS)}, {"logits_soft_cap": 30.0}, {"head_size": 96},
        {"kv_cache_dtype": "fp8"}, {"alibi_slopes": torch.ones(HEADS)}, {"attn_type": "encoder_only"},
        {"kv_sharing_target_layer_name": "layers.3.attn"}, {"num_heads": 64},
    ],
)  # fmt: skip
def test_what_the_kernel_has_not_stays_with_vllm(changed):
    layer = LlamaAttention(**changed)
    assert serve_decoding(nn.Sequential(layer), torch.bfloat16) == 0
    assert type(layer.attn.impl) is FlashAttentionImpl and isinstance(layer.rotary_emb, Rotary)


def test_float32_stays_with_vllm():
    assert serve_decoding(nn.Sequential(LlamaAttention()), torch.float32) == 0


@pytest.mark.parametrize("mode", [CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL])
@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (step(200), True), (step(8), False), (None, False), (step(200, max_query_len=2), False),
        (step(200, use_cascade=True), False), (step(200, causal=False), False),
        (step(200, num_actual_tokens=201), False),
    ],
)  # fmt: skip
def test_rotation_cache_and_attention_agree_on_a_step(metadata, expected, mode, monkeypatch):
    expected = expected and mode is not CUDAGraphMode.PIECEWISE
    layer = LlamaAttention()
    serve_decoding(nn.Sequential(layer), torch.bfloat16)
    written = []
    monkeypatch.setattr(FlashAttentionImpl, "do_kv_cache_update", lambda *arguments: written.append(1))
    described = {layer.attn.layer_name: metadata} if metadata else None
    with override_forward_context(SimpleNamespace(attn_metadata=described, cudagraph_runtime_mode=mode)):
        turned, _ = layer.rotary_emb(None, torch.zeros(2), torch.zeros(2))
        layer.attn.impl.do_kv_cache_update(layer.attn, None, None, None, None)
        assert layer.attn.impl.decodes(metadata) is expected
    assert bool(turned.any()) is not expected and bool(written) is not expected


@pytest.mark.parametrize("rotates", [False, True])
def test_a_step_is_computed_from_vllms_cache(rotates, monkeypatch):
    monkeypatch.setattr(decoding_attention, "LEAST_PROGRAMS", 1)
    layer = LlamaAttention() if rotates else OtherAttention()
    serve_decoding(nn.Sequential(layer), torch.bfloat16)
    query, cache, new = case([5, 0, 40, 0], HEADS, KV_HEADS, SIZE, torch.bfloat16, "cpu")
    if rotates:
        layer.attn.impl.cos_sin = new.cos_sin
    held = torch.cat([cache.keys, cache.values], -1)
    wanted, out = torch.zeros_like(query), torch.zeros_like(query)
    _torch(query, cache, SIZE**-0.5, wanted, new if rotates else None)
    metadata = step(4, num_actual_tokens=3, seq_lens=cache.lengths, block_table=cache.pages)
    layer.attn.impl.forward(layer.attn, query, new.keys, new.values, held.transpose(1, 2), metadata, out)
    assert torch.equal(out, wanted)


def test_while_vllm_measures_memory_there_is_no_step():
    layer = LlamaAttention()
    serve_decoding(nn.Sequential(layer), torch.bfloat16)
    assert isinstance(layer.rotary_emb, LateRotary)
    with override_forward_context(SimpleNamespace(attn_metadata=None)):
        assert layer.rotary_emb(None, torch.zeros(1), torch.zeros(1))[0].any()
