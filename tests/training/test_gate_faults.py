"""The gate at the start tells apart what rounding does and what a fault does, in every precision, and names the fault.

Each fault is planted in one of the two graphs, as a family that one of them computes otherwise would have it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.kernels.attention import Span
from grpo.kernels.recurrence import Preceding, Recurrence
from grpo.model.checks import BEYOND_FLOAT16
from grpo.model.source import open_source
from grpo.policy import recurrent
from grpo.session import find_layout
from grpo.training.self_check import check_start, gate_prompt
from tests.helpers.families import NEWCOMERS, save_family
from tests.helpers.family_tail import TAIL
from tests.helpers.graph_comparison import gate_session
from tests.helpers.tiny import FAMILIES, save_tiny

pytestmark = pytest.mark.vllm


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute has another value."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Gemma 3: a window in its first layer, scaled embeddings, norms of q and k, rotary factors by kinds of layers."""
    folder = tmp_path_factory.mktemp("gemma3")
    save_tiny(folder, "gemma3_text", sliding_window=40)
    session = gate_session(folder, request.param)
    yield session
    session.engine.close()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def multiplied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Granite: multipliers of the embedding, the residuals, attention's scores and the logits."""
    folder = tmp_path_factory.mktemp("granite")
    save_family(folder, "granite")
    session = gate_session(folder, request.param)
    yield session
    session.engine.close()


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def stateful(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Qwen 3.5: layers with a state before and after one of attention."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    save_family(folder, "qwen3_5_text")
    session = gate_session(folder, request.param)
    yield session
    session.engine.close()


def decoder(session: Any) -> nn.Module:
    return session.policy.decoder.model


def window_one_longer(session: Any) -> Any:
    attention = decoder(session).layers[0].self_attn
    return changed(attention, "sliding_window", attention.sliding_window + 1)


def window_one_shorter(session: Any) -> Any:
    attention = decoder(session).layers[0].self_attn
    return changed(attention, "sliding_window", attention.sliding_window - 1)


def no_window(session: Any) -> Any:
    return changed(decoder(session).layers[0].self_attn, "sliding_window", None)


def a_rotary_factor(session: Any) -> Any:
    frequencies = decoder(session).rotary_emb.sliding_attention_inv_freq
    return changed(decoder(session).rotary_emb, "sliding_attention_inv_freq", frequencies / 1.25)


def scores_without_their_scale(session: Any) -> Any:
    return changed(decoder(session).layers[1].self_attn, "scaling", 1.0)


def embeddings_without_their_scale(session: Any) -> Any:
    embedding = decoder(session).embed_tokens
    return changed(embedding, "embed_scale", torch.ones_like(embedding.embed_scale))


def a_norm_that_does_not_add_one(session: Any) -> Any:
    norm = decoder(session).layers[1].self_attn.k_norm
    return changed(norm, "weight", nn.Parameter(norm.weight.detach() - 1, requires_grad=False))


def dropout_in_training(session: Any) -> Any:
    mlp = decoder(session).layers[1].mlp
    return changed(mlp, "act_fn", nn.Sequential(mlp.act_fn, nn.Dropout(0.05)).eval())


def vllm_without_the_adapter_of_a_module(session: Any) -> Any:
    return changed(session.engine.vllm_model().model.layers[1].mlp.down_proj, "adapter", None)


def the_graph_without_the_adapter_of_a_module(session: Any) -> Any:
    return changed(decoder(session).layers[0].self_attn.k_proj, "_disable_adapters", True)


@pytest.mark.parametrize(
    ("fault", "module"),
    [
        (window_one_longer, "layers.0.self_attn.o_proj"),
        (window_one_shorter, "layers.0.self_attn.o_proj"),
        (no_window, "layers.0.self_attn.o_proj"),
        (a_rotary_factor, "layers.0.self_attn.o_proj"),
        (scores_without_their_scale, "layers.1.self_attn.o_proj"),
        (embeddings_without_their_scale, "layers.0.self_attn.o_proj|layers.0.mlp.gate_proj"),
        (a_norm_that_does_not_add_one, "layers.1.self_attn.o_proj"),
        (dropout_in_training, "layers.1.mlp.down_proj"),
        (vllm_without_the_adapter_of_a_module, "result of model.layers.1.mlp.down_proj differs"),
        (the_graph_without_the_adapter_of_a_module, "result of model.layers.0.self_attn.k_proj differs"),
    ],
)
def test_a_fault_in_one_graph_is_a_sentence_that_names_the_module(
    windowed: Any, fault: Callable[[Any], Any], module: str
) -> None:
    assert len(gate_prompt(windowed).ids) > windowed.base.config.sliding_window
    with fault(windowed), pytest.raises(UserError, match=f"self-test: .*({module})") as error:
        check_start(windowed)
    assert "\n" not in str(error.value)


def test_without_a_fault_gemma_passes(windowed: Any) -> None:
    assert check_start(windowed) is None


def embeddings_without_a_multiplier(session: Any) -> Any:
    return changed(decoder(session), "embedding_multiplier", 1.0)


def residuals_without_a_multiplier(session: Any) -> Any:
    return changed(decoder(session).layers[1], "residual_multiplier", 1.0)


def scores_without_a_multiplier(session: Any) -> Any:
    attention = decoder(session).layers[0].self_attn
    return changed(attention, "scaling", attention.head_dim**-0.5)


def logits_without_a_divisor(session: Any) -> Any:
    return changed(session.engine.vllm_model().logits_processor, "scale", 1.0)


@pytest.mark.parametrize(
    ("fault", "module"),
    [
        (embeddings_without_a_multiplier, "layers.0"),
        (residuals_without_a_multiplier, "layers.1.mlp.gate_proj"),
        (scores_without_a_multiplier, "layers.0.self_attn.o_proj"),
        (logits_without_a_divisor, "the last norm or the output head"),
    ],
)
def test_a_multiplier_left_out_is_a_sentence_that_names_the_module(
    multiplied: Any, fault: Callable[[Any], Any], module: str
) -> None:
    with fault(multiplied), pytest.raises(UserError, match=f"self-test: .*{module}"):
        check_start(multiplied)


def test_without_a_fault_granite_passes(multiplied: Any) -> None:
    assert check_start(multiplied) is None


def states_that_run_on(session: Any) -> Any:
    """From one sequence of a row into the next."""
    return changed(Recurrence, "of", lambda packing: Recurrence([Span(0, packing.tokens)], packing.device))


def states_that_no_completion_continues(session: Any) -> Any:
    def of(packing: Any) -> Recurrence:
        return Recurrence([Span(span.start, span.length) for span in packing.spans], packing.device)

    return changed(Recurrence, "of", of)


def convolutions_that_no_completion_continues(session: Any) -> Any:
    def preceding(recurrence: Recurrence, count: int) -> Preceding:
        return Preceding([Span(span.start, span.length) for span in recurrence.spans], count, recurrence.device)

    return changed(Recurrence, "preceding", preceding)


def vllms_states_that_are_not_emptied(session: Any) -> Any:
    from grpo.rollout import vllm_recurrence_cpu

    recur = vllm_recurrence_cpu.recur

    def begun(layer: Any, sequences: Any, *more: Any) -> None:
        everywhere = torch.ones(len(sequences.non_spec_query_start_loc) - 1, dtype=torch.bool)
        recur(layer, replace(sequences, has_initial_state=everywhere), *more)

    return changed(vllm_recurrence_cpu, "recur", begun)


def decays_without_their_bias(session: Any) -> Any:
    layer = decoder(session).layers[0].linear_attn
    return changed(layer, "dt_bias", nn.Parameter(torch.zeros_like(layer.dt_bias), requires_grad=False))


def vllm_without_the_adapter_of_a_gate(session: Any) -> Any:
    return changed(session.engine.vllm_model().model.layers[0].linear_attn.in_proj_ba, "adapter", None)


def a_gate_left_out(session: Any) -> Any:
    one, ours = decoder(session).layers[2].linear_attn.norm.weight, recurrent.gated_norm
    neutral = 1.2785  # whose SiLU is 1

    def without(x: Any, gate: Any, weight: Any, eps: float) -> Any:
        return ours(x, torch.full_like(gate, neutral) if weight is one else gate, weight, eps)

    return changed(recurrent, "gated_norm", without)


@pytest.mark.parametrize(
    ("fault", "module"),
    [
        (states_that_run_on, "layers.0.linear_attn.out_proj"),
        (states_that_no_completion_continues, "layers.0.linear_attn.out_proj"),
        (convolutions_that_no_completion_continues, "layers.0.linear_attn.out_proj"),
        (vllms_states_that_are_not_emptied, "layers.0.linear_attn.out_proj"),
        (decays_without_their_bias, "layers.0.linear_attn.out_proj"),
        (a_gate_left_out, "layers.2.linear_attn.out_proj"),
        (vllm_without_the_adapter_of_a_gate, "result of model.layers.0.linear_attn.in_proj_[ab] differs"),
    ],
)
def test_a_state_that_one_graph_has_otherwise_is_a_sentence(
    stateful: Any, fault: Callable[[Any], Any], module: str
) -> None:
    with fault(stateful), pytest.raises(UserError, match=f"self-test: .*{module}"):
        check_start(stateful)


def test_without_a_fault_qwen3_5_passes(stateful: Any) -> None:
    assert check_start(stateful) is None


@pytest.mark.wide
@pytest.mark.parametrize("family", list(dict.fromkeys([*FAMILIES, *NEWCOMERS, *TAIL])))
def test_every_family_passes(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, family) if family not in NEWCOMERS | TAIL else save_family(tmp_path, family)
    session = gate_session(tmp_path, "float32")
    try:
        assert check_start(session) is None
    finally:
        session.engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("four_bit", [False, True], ids=["plain", "nf4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", list(dict.fromkeys([*FAMILIES, *NEWCOMERS])))
def test_on_a_gpu_every_family_passes(family: str, dtype: str, four_bit: bool, tmp_path: Path) -> None:
    if dtype == "float16" and family in BEYOND_FLOAT16:
        pytest.skip("refused")
    save_family(tmp_path, family) if family in NEWCOMERS else save_tiny(tmp_path, family)
    find_layout(open_source(Model(name=str(tmp_path))).config, str(tmp_path))
    session = gate_session(tmp_path, dtype, load_in_4bit=four_bit, device="cuda")
    try:
        assert check_start(session) is None
    finally:
        session.engine.close()
