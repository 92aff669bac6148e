"""Mixtures of experts as their graph tells them: the router's rule, the files' form, the layers that have experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grpo.config.schema import Model, parse_config
from grpo.errors import UserError
from grpo.kernels import mxfp4
from grpo.memory.plan import Shape, weight_bytes
from grpo.model.architectures import check_supported
from grpo.model.base_weights import BaseWeights
from grpo.model.config_keys import complaints
from grpo.model.expert_sizes import expert_sizes
from grpo.model.graph_experts import Routing, routing_of
from grpo.model.layout import Layout, fused_linears
from grpo.model.meta_graph import graph_tensors
from grpo.model.source import open_source
from grpo.model.stored_form import read_whole
from tests.helpers.families import family_config, save_family, save_mxfp4

MIXTURES = ("qwen3_moe", "olmoe", "granitemoe", "mixtral", "gpt_oss")


@pytest.mark.parametrize("family", MIXTURES)
def test_every_matrix_of_the_graph_is_found_in_the_files(family: str, tmp_path: Path) -> None:
    model = save_family(tmp_path, family)
    source = open_source(Model(name=str(tmp_path)))
    for name, tensor in model.state_dict().items():
        assert torch.equal(read_whole(source, name), tensor), name


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_the_one_copy_holds_the_experts_of_the_graph(family: str, load_in_4bit: bool, tmp_path: Path) -> None:
    model = save_family(tmp_path, family)
    settings = Model(name=str(tmp_path), load_in_4bit=load_in_4bit, dtype="float32")
    base = BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=torch.float32)
    assert base.experts
    for name, stack in base.experts.items():
        module = model.get_submodule(name)
        for matrix, kind in ((stack.experts.gate_up, "gate_up_proj"), (stack.experts.down, "down_proj")):
            parameter = kept(getattr(module, kind), family, interleaved=kind == "gate_up_proj")
            if family == "gpt_oss":
                bias = getattr(module, f"{kind}_bias")
                bias = torch.cat([bias[:, ::2], bias[:, 1::2]], 1) if kind == "gate_up_proj" else bias
                assert torch.equal(matrix.bias, bias)
            assert matrix.dense().shape == parameter.shape
            error = float((matrix.dense() - parameter).norm() / parameter.norm())
            assert 0.05 < error < 0.12 if load_in_4bit else error == 0
    config = parse_config(
        {"model": {"name": str(tmp_path), "load_in_4bit": load_in_4bit}, "task": {"name": "arithmetic"}}
    )
    planned = weight_bytes(config, base.config, 4, on_gpu=False)
    assert abs(planned - base.nbytes()) < 0.01 * base.nbytes()
    values = base.config.to_dict()
    assert weight_bytes(config, Shape.of(values), 4, on_gpu=False) == planned


def kept(parameter: Tensor, family: str, interleaved: bool) -> Tensor:
    """A stacked parameter of transformers' as [experts, out, in], gates above ups; gpt-oss alone has it otherwise."""
    if family != "gpt_oss":
        return parameter
    out = parameter.mT
    return torch.cat([out[:, ::2], out[:, 1::2]], 1) if interleaved else out


@pytest.mark.parametrize(("dtype", "load_in_4bit"), [("float32", False), ("bfloat16", True), ("float32", True)])
def test_mxfp4_is_read_exactly(dtype: str, load_in_4bit: bool, tmp_path: Path) -> None:
    model = save_mxfp4(tmp_path)
    settings = Model(name=str(tmp_path), load_in_4bit=load_in_4bit, dtype=dtype)
    source = open_source(settings)
    for name, tensor in model.state_dict().items():
        assert source.shape(name) == tensor.shape
        assert torch.equal(read_whole(source, name).float(), tensor), name
    base = BaseWeights(source, settings, device=torch.device("cpu"), dtype=getattr(torch, dtype))
    for name, stack in base.experts.items():
        module = model.get_submodule(name)
        for matrix, kind in ((stack.experts.gate_up, "gate_up_proj"), (stack.experts.down, "down_proj")):
            graph = stack.graph.rows(kind, getattr(module, kind).mT)
            assert torch.equal(matrix.dense().float(), graph)


def test_on_a_gpu_mxfp4_is_kept_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_mxfp4(tmp_path)
    settings = Model(name=str(tmp_path), load_in_4bit=True, dtype="bfloat16")
    source = open_source(settings)
    base = BaseWeights(source, settings, device=torch.device("cpu"), dtype=torch.bfloat16)
    base.packed = True
    for name, layout in base.layout.experts.items():
        stack = base._load_experts(source, name, layout)
        for matrix, kind in ((stack.experts.gate_up, "gate_up_proj"), (stack.experts.down, "down_proj")):
            assert matrix.weight.dtype == torch.uint8 and matrix.absmax.dtype == mxfp4.SCALES
            values = stack.graph.rows(kind, model.get_submodule(name).get_parameter(kind).mT)
            assert torch.equal(matrix.dense().float(), values) and matrix.dtype == torch.bfloat16


def test_mxfp4_that_bfloat16_cannot_hold_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_mxfp4(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    for broken, said in ((tensors[f"{name}_scales"] * 0 + 253, "bfloat16 cannot hold"), (None, "tensor .* is missing")):
        changed = dict(tensors)
        if broken is None:
            del changed[f"{name}_scales"]
        else:
            changed[f"{name}_scales"] = broken
        save_file(changed, tmp_path / "model.safetensors")
        settings = Model(name=str(tmp_path), load_in_4bit=False, dtype="bfloat16")
        with pytest.raises(UserError, match=said):
            BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=torch.bfloat16)


def test_some_layers_may_be_dense() -> None:
    config = family_config("qwen3_moe")
    layout, sizes = Layout.of(config), expert_sizes(config)
    assert sizes is not None and sizes.layers == 2 and list(layout.experts) == [
        "model.layers.0.mlp.experts", "model.layers.2.mlp.experts",
    ]  # fmt: skip
    of_graph = {fused: list(linear.parts) for fused, linear in layout.linears.items()}
    assert fused_linears(config) == of_graph
    assert fused_linears(Shape.of(config.to_dict())) == of_graph


class TopK(nn.Module):
    """A router of its own kind: `scores` of the logits, the largest `top_k` of them."""

    def __init__(self, scores: Any, renormalize: bool, top_k: int = 3):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 16, device="meta"))
        self.scores, self.renormalize, self.top_k = scores, renormalize, top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = x @ self.weight.t()
        weights, chosen = self.scores(logits).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True) if self.renormalize else weights
        return chosen, logits, weights


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_softmax_is_recognised_and_whether_it_is_renormalised(renormalize: bool) -> None:
    assert routing_of(TopK(lambda x: x.softmax(-1), renormalize), 8, 16) == Routing(3, renormalize)


@pytest.mark.parametrize(
    "scores",
    [torch.sigmoid, lambda x: x.sigmoid().sqrt(), lambda x: x.softmax(-1) * 2.5, lambda x: (2 * x).softmax(-1)],
)
def test_another_router_is_refused_by_its_name(scores: Any) -> None:
    with pytest.raises(UserError, match="transformers' TopK chooses experts in another way than by the largest"):
        routing_of(TopK(scores, renormalize=False), 8, 16)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("qwen3_moe", {"hidden_act": "relu"}, "Qwen3MoeExperts makes of gates something else than is computed"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "GptOssExperts makes of gates something else than is computed"),
    ],
)
def test_gates_that_are_not_computed_are_refused_by_the_experts_name(
    family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=f"here: architecture '{family}' is not supported: .*{said}"):
        check_supported(family_config(family, **changes), "here")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("rms_norm_eps", 1e-6, "vLLM's GptOssForCausalLM computes with 1e-05"),
        ("attention_bias", False, "vLLM's GptOssForCausalLM computes with true"),
        ("layer_types", ["full_attention", "sliding_attention"], "gives the window to layers 0, 2, 4"),
    ],
)
def test_what_vllm_takes_for_granted_of_gpt_oss_is_refused_by_key(key: str, value: Any, said: str) -> None:
    found = {complaint.key: complaint.reason for complaint in complaints(family_config("gpt_oss", **{key: value}))}
    assert key in found and said in found[key], found
    assert not list(complaints(family_config("gpt_oss")))


def test_a_family_with_latent_attention_is_refused_before_its_experts() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("deepseek_v3", num_hidden_layers=1, n_routed_experts=4, n_group=1, topk_group=1)
    with pytest.raises(UserError, match="latent form"):
        check_supported(config, "here")


def test_groups_of_experts_are_refused_by_the_routers_name() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("glm4_moe", num_hidden_layers=2, n_routed_experts=8, first_k_dense_replace=0)
    with pytest.raises(UserError, match="here: architecture 'glm4_moe' is not supported: .*Router chooses experts"):
        check_supported(config, "here")


@pytest.mark.parametrize("family", MIXTURES)
def test_a_router_is_no_linear_layer_that_an_adapter_could_be_on(family: str) -> None:
    tensors = graph_tensors(family_config(family))
    routers = {experts.router for experts in tensors.experts.values()}
    assert routers and not routers & set(tensors.linears)
    assert {f"{router}.weight" for router in routers} <= set(tensors.plain)
