"""grpo/rollout/attention_backend.py: what serves which GPU, and the sentence where nothing does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.rollout import attention_backend
from grpo.rollout.attention_backend import Served, choose_backend

FP8 = {"kv_cache_dtype": "fp8"}
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize(
    ("architecture", "plain", "fp8"),
    [
        (75, "triton_attn", None),
        (80, "flash_attn", None),
        (86, "flash_attn", None),
        (89, "flash_attn", "triton_attn"),
        (90, "grpo", "flash_attn"),
        (100, "flash_attn", "triton_attn"),
        (120, "flash_attn", "triton_attn"),
    ],
)
def test_the_backend_of_every_architecture(architecture, plain, fp8):
    assert choose_backend("auto", Served(architecture)) == plain
    if fp8 is not None:
        assert choose_backend("auto", Served(architecture, "fp8")) == fp8
        return
    with pytest.raises(
        UserError, match=r'kv_cache_dtype = "fp8": no attention backend serves it on .* 8\.9 on; set "auto"'
    ):
        choose_backend("auto", Served(architecture, "fp8"))


@pytest.mark.parametrize(
    ("wanted", "served", "architecture", "says"),
    [
        ("flash_attn", {}, 75, r"FlashAttention needs compute capability 8\.0 or more, and this GPU has .* 7\.5"),
        (
            "flash_attn",
            FP8,
            120,
            r"FlashAttention takes an fp8 KV cache on compute capability 9\.0 alone",
        ),
        ("triton_attn", FP8, 86, r"Triton converts to fp8 from compute capability 8\.9 on"),
        ("flex_attention", FP8, 90, "FlexAttention takes no fp8 KV cache"),
        ("flashinfer", {}, 75, r"FlashInfer needs compute capability 8\.0 or more"),
        ("flashinfer", FP8, 89, "FlashInfer compiles its kernels and finds no nvcc here"),
        ("flash_attn", {"dtype": "float32"}, 90, 'FlashAttention computes in 16 bit, and model.dtype is "float32"'),
        ("flashinfer", {"dtype": "float32"}, 90, 'FlashInfer computes in 16 bit, and model.dtype is "float32"'),
        ("flash_attn", {"head_size": 512}, 90, "FlashAttention takes attention heads of up to 256.*have 512"),
        ("flash_attn", {"sinks": True}, 80, r"FlashAttention takes attention sinks on compute capability 9\.0 alone"),
        ("flash_attn", {"sinks": True}, 100, r"FlashAttention takes attention sinks on compute capability 9\.0 alone"),
        ("flex_attention", {"sinks": True}, 90, "FlexAttention takes no attention sinks"),
        ("flashinfer", {"head_size": 80}, 90, "FlashInfer takes attention heads of 64, 128, 256.*have 80"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(wanted, served, architecture, says, monkeypatch):
    monkeypatch.setattr(attention_backend, "flashinfer_is_ready", lambda: False)
    with pytest.raises(UserError, match=f'rollout.attention_backend = "{wanted}": {says}.*; set another, or "auto"'):
        choose_backend(wanted, Served(architecture, **served))


SERVED = st.builds(
    Served,
    st.sampled_from(ARCHITECTURES),
    st.sampled_from(["auto", "fp8"]),
    st.sampled_from(["auto", "bfloat16", "float16", "float32"]),
    st.sampled_from([64, 80, 128, 256, 512]),
    st.booleans(),
)


@given(SERVED)
def test_what_is_chosen_would_be_accepted_by_name(served):
    try:
        chosen = choose_backend("auto", served)
    except UserError:
        assert all(attention_backend.refusal(name, served) for name in ("flash_attn", "triton_attn"))
        return
    assert choose_backend(chosen, served) == chosen
    assert chosen != "triton_attn" or attention_backend.refusal("flash_attn", served)
    assert attention_backend.decodes_by_ours("auto", served) == (chosen == "grpo")


@given(SERVED)
def test_our_kernels_are_chosen_only_where_they_were_measured_and_have_the_head(served):
    from grpo.kernels import decode_attention

    assert attention_backend.OUR_HEADS == decode_attention.HEAD_SIZES
    if attention_backend.decodes_by_ours("auto", served):
        assert served.architecture in attention_backend.OURS_MEASURED and not served.fp8 and not served.sinks
        assert served.head_size in decode_attention.HEAD_SIZES and served.dtype != "float32"


@pytest.mark.vllm
@given(SERVED)
def test_vllm_agrees_about_types_and_heads(served):
    """What vLLM's own classes say of themselves; the compute capability it asks of the GPU that is there."""
    import torch
    from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
    from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

    dtype = torch.bfloat16 if served.dtype == "auto" else getattr(torch, served.dtype)
    for name, backend in (("triton_attn", TritonAttentionBackend), ("flex_attention", FlexAttentionBackend)):
        if attention_backend.refusal(name, served) is None:
            assert backend.supports_dtype(dtype) and backend.supports_head_size(served.head_size), name


def test_flashinfer_needs_a_compiler_or_compiled_kernels(monkeypatch, tmp_path):
    found = {"flashinfer": True}
    monkeypatch.setattr(attention_backend, "find_spec", lambda name: found.get(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert not attention_backend.flashinfer_is_ready()
    found["flashinfer_jit_cache"] = True
    assert attention_backend.flashinfer_is_ready()
    del found["flashinfer_jit_cache"]
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("")
    compiler.chmod(0o755)
    assert attention_backend.flashinfer_is_ready()


@pytest.mark.vllm
def test_vllm_knows_the_names():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from grpo.config.schema import Rollout

    names = [name for name in Rollout.model_fields["attention_backend"].annotation.__args__]
    names = [name for name in names if name not in ("auto", attention_backend.OURS)]
    assert {name.upper() for name in names} <= set(AttentionBackendEnum.__members__)
