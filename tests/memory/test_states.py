"""Pages of keys, values and states: planned as vLLM lays them out, and enough for every sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grpo.config.schema import Lora, parse_config
from grpo.memory import plan
from grpo.memory.shapes import shape_of
from grpo.memory.states import has_states, pages, state_layers
from grpo.model.adapter_layers import adapted_layers
from grpo.model.layout import fused_linears
from tests.helpers.families import family_config, save_family
from tests.helpers.graph_comparison import gate_session

QWEN = {
    "model_type": "qwen3_5_text", "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 248320,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "tie_word_embeddings": True,
}  # fmt: skip


def test_a_block_of_keys_and_values_is_as_large_as_a_state() -> None:
    shape = shape_of(QWEN)
    token = plan.layer_token_bytes(shape, 2, "auto")
    laid_out = pages(shape, 2, token, 16)
    state = 32 * 128 * 128 * 4 + 8192 * 3 * 2
    assert laid_out.block == 528 and 512 * token < state <= 528 * token
    assert laid_out.size == 8 * 528 * token and (laid_out.attention_groups, laid_out.state_groups) == (1, 3)
    assert laid_out.blocks(528) == 4 and laid_out.blocks(529) == 5
    llama = plan.Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, False)
    assert not has_states(llama) and pages(llama, 2, 4096, 16).size == 16 * 4096 * 32


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["qwen3_5_text", pytest.param("lfm2", marks=pytest.mark.wide)])
def test_vllm_lays_its_pages_out_as_planned(family: str, tmp_path: Path) -> None:
    save_family(tmp_path, family)
    session = gate_session(tmp_path, "float32")
    try:
        found = session.engine.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        config = session.base.config
        laid_out = pages(config, 4, plan.layer_token_bytes(config, 4, "auto"), plan.CPU_BLOCK)
        attention = [group for group in found.kv_cache_groups if "Mamba" not in type(group.kv_cache_spec).__name__]
        states = [group for group in found.kv_cache_groups if group not in attention]
        assert (len(attention), len(states)) == (laid_out.attention_groups, laid_out.state_groups)
        assert {group.kv_cache_spec.block_size for group in attention} == {laid_out.block}
        assert found.num_blocks == session.engine.kv_bytes() // laid_out.size
        assert found.num_blocks >= 4 * laid_out.blocks(96)
    finally:
        session.engine.close()


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2"])
def test_the_seven_names_stand_for_all_linear_layers(family: str) -> None:
    config = family_config(family)
    parts = [part for group in fused_linears(config).values() for part in group]
    graph = {name for name, module in meta(config).named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert set(parts) == graph == set(adapted_layers(config, Lora()))
    assert sum(kind.layers for kind in state_layers(config, frozenset({"out_proj"}))) == 2


def meta(config: object) -> torch.nn.Module:
    from grpo.model.meta_graph import meta_graph

    return meta_graph(config)


def test_a_hybrid_is_planned_without_its_weights(tmp_path: Path) -> None:
    config = parse_config({"model": {"name": "m"}, "task": {"name": "arithmetic"}, "lora": {"r": 16}})
    planned = plan.plan_memory(config, shape_of(QWEN), 2, on_gpu=True)
    assert 3.0e9 < planned.weights < 3.3e9
    assert planned.peaks["none"] > planned.peaks["mlp"] > planned.peaks["layer"] > planned.peaks["offload"]
    assert planned.kv_one_sequence - planned.kv_spare == pages(shape_of(QWEN), 2, 4096, 16).blocks(768) * 17_301_504
