"""LoRA on experts is peft's: the same logits, gradients and files, and merged weights that compute the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.export.merge import MergedSource
from grpo.model.adapter_config import read_adapter_config
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.model.stored_form import read_whole
from grpo.policy.adapter_files import AdapterFile
from grpo.policy.policy import Policy
from grpo.rollout.lora_buffers import RolloutAdapter
from tests.helpers.families import save_family
from tests.helpers.graph_comparison import largest_difference

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
SETTINGS: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"],
    "rank_pattern": {"experts.gate_up_proj": 2}, "alpha_pattern": {"experts.down_proj": 4},
}  # fmt: skip
TOKENS = [5, 9, 33, 7, 21, 64, 90, 11, 2, 3, 77, 12, 140, 8, 100, 31]


def made(folder: Path, family: str, parameters: list[str], dtype: str = "float32") -> tuple[Any, Policy]:
    """transformers' model, and our policy with an adapter that does something."""
    model = save_family(folder, family, **({"mlp_only_layers": []} if family == "qwen3_moe" else {}))
    settings = Model(name=str(folder), load_in_4bit=False, dtype=dtype)
    base = BaseWeights(open_source(settings), settings, device=torch.device("cpu"), dtype=getattr(torch, dtype))
    policy = Policy(base, Lora(**SETTINGS, target_parameters=parameters), seed=1)
    torch.manual_seed(2)
    for each in policy.all_adapters():
        torch.nn.init.normal_(each.lora_B["default"].weight, std=0.1)
    return model, policy


def logprobs(model: Any) -> Tensor:
    logits = model(torch.tensor([TOKENS])).logits[0, 4:-1]
    return torch.log_softmax(logits, -1)[range(len(TOKENS) - 5), TOKENS[5:]]


@pytest.mark.parametrize(
    ("family", "parameters"),
    [("qwen3_moe", BOTH), ("granitemoe", BOTH[1:]), ("olmoe", BOTH[:1]), ("gpt_oss", BOTH), ("gpt_oss", BOTH[:1])],
)
def test_values_gradients_files_and_merged_weights_are_pefts(
    family: str, parameters: list[str], tmp_path: Path
) -> None:
    model, policy = made(tmp_path / "model", family, parameters)
    ours = policy.score([TOKENS[:5]], [TOKENS[5:]], temperature=1.0).logprobs
    ours.sum().backward()
    policy.save_adapter(tmp_path / "adapter")
    torch.manual_seed(0)
    fresh = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_parameters=parameters, **SETTINGS))
    names = {name.replace(".default", "") for name, _ in fresh.named_parameters() if "lora_" in name}
    file = AdapterFile(read_adapter_config(tmp_path / "adapter"))
    assert file.names == names
    theirs = PeftModel.from_pretrained(fresh.unload(), tmp_path / "adapter", is_trainable=True)
    expected = logprobs(theirs)
    torch.testing.assert_close(ours, expected, atol=3e-5, rtol=1e-5)
    expected.sum().backward()
    grads = {name: each.grad for name, each in theirs.named_parameters() if each.grad is not None}
    mine = {name: each.grad for name, each in policy.model.named_parameters() if each.grad is not None}
    assert mine.keys() == grads.keys()
    for name, grad in grads.items():
        assert float((mine[name] - grad).norm()) < 1e-4 * float(grad.norm()) + 1e-6, name
    with policy.reference():
        plain = policy.score([TOKENS[:5]], [TOKENS[5:]], temperature=1.0).logprobs
    with theirs.disable_adapter():
        torch.testing.assert_close(plain, logprobs(theirs).detach(), atol=3e-5, rtol=1e-5)

    merged = MergedSource(open_source(Model(name=str(tmp_path / "model"))), file)
    whole = theirs.merge_and_unload()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(read_whole(merged, name), tensor, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_read_back_and_its_buffers_are_planned(tmp_path: Path) -> None:
    from grpo.config.schema import parse_config
    from grpo.memory.plan import Shape, adapter_bytes

    _, policy = made(tmp_path / "model", "qwen3_moe", BOTH)
    policy.save_adapter(tmp_path / "adapter")
    other = Policy(policy.base, policy.lora, seed=5)
    other.load_adapter(tmp_path / "adapter")
    for one, same in zip(policy.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, same)
    tables = {"model": {"name": "m"}, "task": {"name": "arithmetic"}, "lora": SETTINGS | {"target_parameters": BOTH}}
    served = RolloutAdapter(policy.base, policy)
    copies = sum(each.a.nbytes + each.b.nbytes for each in served.buffers.values())
    for each in served.experts.values():
        copies += sum(one.a.nbytes + one.b.nbytes for one in (each.gate_up, each.down) if one is not None)
    trained = sum(parameter.numel() for parameter in policy.parameters())
    for shape in (policy.base.config, Shape.of(policy.base.config.to_dict())):
        assert adapter_bytes(parse_config(tables), shape, 4, on_gpu=False) == 16 * trained + copies


def test_what_are_no_experts_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"names 'gate.weight', which are no experts; this model has experts.gate_up_proj"
    ):
        made(tmp_path, "qwen3_moe", ["gate.weight"])


@pytest.mark.vllm
@pytest.mark.parametrize(("family", "parameters"), [("qwen3_moe", BOTH), ("qwen3_moe", BOTH[1:]), ("gpt_oss", BOTH)])
def test_vllm_samples_with_adapters_on_experts(family: str, parameters: list[str], tmp_path: Path) -> None:
    _, policy = made(tmp_path, family, parameters)
    assert largest_difference(policy.base, policy) < 1e-4
