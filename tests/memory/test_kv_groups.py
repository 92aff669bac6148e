"""grpo/memory/kv_groups.py: keys and values of layers that differ take what vLLM takes; weights are as planned."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.config.schema import Model, parse_config
from grpo.memory.kv_groups import KeyPool
from grpo.memory.plan import plan_memory, weight_bytes
from grpo.memory.shapes import model_shape
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from tests.helpers.families import WITH_IMAGES, family_config, save_family, save_with_images

FULL, SLIDING = "full_attention", "sliding_attention"


def decoder(types: list[str], window: int, full_head: int, shared: int = 0) -> Any:
    """A configuration whose full layers may have larger heads, and whose last layers may share keys."""
    sizes = {FULL: SimpleNamespace(head_dim=full_head, num_key_value_heads=2)}
    sizes[SLIDING] = SimpleNamespace(head_dim=64, num_key_value_heads=2)
    return SimpleNamespace(
        num_hidden_layers=len(types),
        layer_types=types,
        sliding_window=window,
        num_attention_heads=4,
        hidden_size=256,
        num_kv_shared_layers=shared,
        is_heterogeneous=True,
        per_layer_config=[sizes[kind] for kind in types],
    )


def by_vllm(shape: Any, length: int, batched: int, block: int) -> int:
    """What vLLM takes for one sequence, in bytes of 16 bit."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    from grpo.model.attention_layers import attention_layers

    specs = {}
    for number, layer in attention_layers(shape).items():
        sizes = {"num_kv_heads": layer.key_heads, "head_size": layer.head_size, "dtype": torch.bfloat16}
        if layer.keys_of == number and layer.window is None:
            specs[f"layers.{number}"] = FullAttentionSpec(block_size=block, **sizes)
        elif layer.keys_of == number:
            specs[f"layers.{number}"] = SlidingWindowSpec(block_size=block, sliding_window=layer.window, **sizes)
    layers_first = SimpleNamespace(is_block_outermost=False)
    config: Any = SimpleNamespace(
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False, max_num_batched_tokens=batched),
        cache_config=SimpleNamespace(get_resolved_kv_cache_layout=lambda: layers_first),
        model_config=SimpleNamespace(max_model_len=length),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        speculative_config=None,
        kv_transfer_config=None,
        max_in_flight_tokens=batched,
    )
    groups = kv_cache_utils._get_kv_cache_groups_uniform_page_size(kv_cache_utils.unify_kv_cache_spec_page_size(specs))
    return kv_cache_utils._max_memory_usage_bytes_from_groups(config, groups)


@pytest.mark.vllm
@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([FULL, SLIDING]), min_size=2, max_size=40),
    st.integers(1, 600),
    st.sampled_from([64, 128, 192, 256]),
    st.integers(0, 6),
    st.integers(1, 4000),
    st.sampled_from([64, 8192]),
)
def test_of_any_decoder_it_is_what_vllm_takes(types, window, full_head, shared, length, batched):
    types[:2] = [FULL, SLIDING]  # of both kinds there is a layer with keys of its own
    shape = decoder(types, window, full_head, min(shared, len(types) - 2))
    pool = KeyPool.of(shape, 2, 16)
    assert pool.blocks(length, batched) * pool.block_bytes == by_vllm(shape, length, batched, 16)


def test_layers_that_share_keys_take_nothing_and_alike_ones_are_one_group():
    alike = KeyPool.of(SimpleNamespace(num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                       hidden_size=32), 2, 16)  # fmt: skip
    assert alike.blocks(100, 64) * alike.block_bytes == 7 * 16 * 3 * 2 * 2 * 8 * 2
    pool = KeyPool.of(family_config("gemma4_text"), 4, 32)
    assert [group.block for group in pool.groups] == [32, 32], "one head of 64 is as large as two of 32"
    assert pool.block_bytes == 32 * 2 * 64 * 4


@pytest.mark.parametrize("family", ["gemma4_text", "gemma4", "gemma4 of keys as values", "gemma4_unified"])
def test_weights_of_layers_that_differ_are_planned_as_they_are_stored(family, tmp_path):
    save_with_images(tmp_path, family) if family in WITH_IMAGES else save_family(tmp_path, family)
    model = Model(name=str(tmp_path), load_in_4bit=False)
    shape = model_shape(model)
    base = BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)
    config = parse_config({"model": {"name": str(tmp_path), "load_in_4bit": False}, "task": {"name": "t"}})
    assert weight_bytes(config, shape, 4, on_gpu=False) == pytest.approx(base.nbytes(), rel=0.02)
    assert plan_memory(config, shape, 4, on_gpu=True).kv_one_sequence > 0
