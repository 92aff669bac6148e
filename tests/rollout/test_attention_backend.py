"""grpo/rollout/attention_backend.py: what serves which GPU, and the sentence where nothing does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.rollout import attention_backend
from grpo.rollout.attention_backend import choose_backend

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@pytest.mark.parametrize(
    ("architecture", "plain", "fp8"),
    [
        (75, "triton_attn", None),
        (80, "flash_attn", None),
        (86, "flash_attn", None),
        (89, "flash_attn", "triton_attn"),
        (90, "flash_attn", "flash_attn"),
        (100, "flash_attn", "triton_attn"),
        (120, "flash_attn", "triton_attn"),
    ],
)
def test_the_backend_of_every_architecture(architecture, plain, fp8):
    assert choose_backend("auto", "auto", architecture) == plain
    if fp8 is not None:
        assert choose_backend("auto", "fp8", architecture) == fp8
        return
    with pytest.raises(
        UserError, match=r'kv_cache_dtype = "fp8": no attention backend serves it on .* 8\.9 on; set "auto"'
    ):
        choose_backend("auto", "fp8", architecture)


def test_heads_that_flash_attention_does_not_take_get_triton():
    assert choose_backend("auto", "auto", 90, 256) == "flash_attn"
    assert choose_backend("auto", "auto", 90, 512) == "triton_attn"
    with pytest.raises(UserError, match="FlashAttention takes heads of up to 256, and this model has some of 512; set"):
        choose_backend("flash_attn", "auto", 90, 512)


@pytest.mark.parametrize(
    ("wanted", "cache", "architecture", "says"),
    [
        ("flash_attn", "auto", 75, r"FlashAttention needs compute capability 8\.0 or more, and this GPU has .* 7\.5"),
        ("flash_attn", "fp8", 120, r"FlashAttention takes an fp8 KV cache on compute capability 9\.0 alone"),
        ("triton_attn", "fp8", 86, r"Triton converts to fp8 from compute capability 8\.9 on"),
        ("flex_attention", "fp8", 90, "FlexAttention takes no fp8 KV cache"),
        ("flashinfer", "auto", 75, r"FlashInfer needs compute capability 8\.0 or more"),
        ("flashinfer", "fp8", 89, "FlashInfer compiles its kernels and finds no nvcc here"),
    ],
)
def test_what_cannot_serve_is_refused_by_name(wanted, cache, architecture, says, monkeypatch):
    monkeypatch.setattr(attention_backend, "flashinfer_is_ready", lambda: False)
    with pytest.raises(UserError, match=f'rollout.attention_backend = "{wanted}": {says}.*; set another, or "auto"'):
        choose_backend(wanted, cache, architecture)


@given(st.sampled_from(ARCHITECTURES), st.sampled_from(["auto", "fp8"]))
def test_what_is_chosen_would_be_accepted_by_name(architecture, cache):
    try:
        chosen = choose_backend("auto", cache, architecture)
    except UserError:
        assert all(attention_backend.refusal(name, True, architecture) for name in ("flash_attn", "triton_attn"))
        return
    assert choose_backend(chosen, cache, architecture) == chosen


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

    names = [name for name in Rollout.model_fields["attention_backend"].annotation.__args__ if name != "auto"]
    assert {name.upper() for name in names} <= set(AttentionBackendEnum.__members__)
