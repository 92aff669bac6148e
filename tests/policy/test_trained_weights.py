"""Gradients of all weights, head, norms and embedding among them, against plain transformers in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config.schema import Config, Lora, Loss, parse_config
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.full_policy import FullPolicy
from grpo.policy.fused_layers import install_fused_layers
from grpo.policy.policy import Policy
from grpo.training.reference_policy import set_reference
from tests.helpers.families import NEWCOMERS, save_family
from tests.helpers.tiny import FAMILIES, VOCABULARY, save_tiny

LENGTHS = ((7, 9), (5, 4), (12, 1))
TEMPERATURE, ENTROPY_WEIGHT = 0.7, 0.3


def full_config(folder: Path, **sections: Any) -> Config:
    model = {"name": str(folder), "full_finetuning": True, "dtype": "float32", **sections.pop("model", {})}
    return parse_config({"model": model, "task": {"name": "arithmetic"}, **sections})


def full_policy(folder: Path, kernels: str = "torch", dtype: torch.dtype = torch.float32) -> FullPolicy:
    model = full_config(folder).model
    return FullPolicy(BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=dtype), kernels=kernels)


def sequences() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of random tokens; one token occurs often, so that its embedding's gradient is a sum."""
    generator = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        drawn = torch.randint(3, VOCABULARY, (count,), generator=generator)
        return drawn.where(torch.rand(count, generator=generator) > 0.3, 5).tolist()

    return [tokens(prompt) for prompt, _ in LENGTHS], [tokens(completion) for _, completion in LENGTHS]


def weighted(logprobs: torch.Tensor, entropy: torch.Tensor) -> torch.Tensor:
    """A loss in which every token counts differently."""
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(2))
    return (logprobs * weights).sum() + ENTROPY_WEIGHT * entropy.sum()


def reference_gradients(model: Any) -> dict[str, torch.Tensor]:
    """Of `weighted` over transformers' own model and torch's log_softmax, sequence by sequence."""
    logprobs, entropies = [], []
    for prompt, completion in zip(*sequences(), strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / TEMPERATURE
        logs = logits.log_softmax(-1)
        logprobs.append(logs.gather(-1, torch.tensor(completion)[:, None])[:, 0])
        entropies.append(-(logs.exp() * logs).sum(-1))
    weighted(torch.cat(logprobs), torch.cat(entropies)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradients(policy: FullPolicy, chunk_tokens: int = 5, parts: int = 1) -> dict[str, torch.Tensor]:
    """The same of `policy`, from chunks of logits."""
    policy.model.train()
    scored = policy.score(*sequences(), temperature=TEMPERATURE, chunk_tokens=chunk_tokens, entropy_gradient=True)
    loss = weighted(scored.logprobs, scored.entropy)
    for _ in range(parts):
        (loss / parts).backward(retain_graph=True)
    found = {name: parameter.grad for name, parameter in policy.named_parameters().items()}
    assert all(grad is not None for grad in found.values()), "every weight has a gradient"
    return found  # type: ignore[return-value]


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a weight's gradient."""
    assert found.keys() == expected.keys()
    return max(float((found[name].float() - grad).norm() / grad.norm()) for name, grad in expected.items())


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    expected = reference_gradients(save_tiny(tmp_path, family).train())
    assert worst(gradients(full_policy(tmp_path)), expected) < 2e-5


@pytest.mark.parametrize("family", list(FAMILIES))
def test_gradients_of_the_fused_layers_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """On a CPU the kernels' torch forms compute; with TRITON_INTERPRET=1 the kernels themselves."""
    expected = reference_gradients(save_tiny(tmp_path, family).train())
    policy = full_policy(tmp_path)
    assert install_fused_layers(policy.model, policy.base) == 2
    found = gradients(policy)
    assert worst(found, expected) < 2e-5
    again = gradients(policy)
    assert all(again[name] is found[name] for name in found), "added where it is kept"
    assert worst({name: grad / 2 for name, grad in again.items()}, expected) < 2e-5


@pytest.mark.wide
def test_the_fused_layers_in_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, hence a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    chosen = [f"{__file__}::test_gradients_of_the_fused_layers_are_those_of_transformers"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("mode", ["none", "layer", "offload"])
def test_gradients_do_not_depend_on_what_is_computed_again(mode: str, tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2")
    expected = gradients(full_policy(tmp_path))
    policy = full_policy(tmp_path)
    policy.recompute_layers(mode)
    assert worst(gradients(policy, chunk_tokens=3), expected) < 2e-6


def test_gradients_in_bfloat16_are_near_those_in_float32_and_may_be_kept_wider(tmp_path: Path) -> None:
    model = save_tiny(tmp_path, "qwen2")
    policy = full_policy(tmp_path, dtype=torch.bfloat16)
    rounded = model.to(torch.bfloat16).float().train()  # the same weights
    expected = reference_gradients(rounded)
    for parameter in policy.parameters():
        parameter.grad_dtype = torch.float32
    found = gradients(policy)
    assert all(grad.dtype == torch.float32 for grad in found.values())
    assert worst(found, expected) < 0.1, "the graph rounds its activations to 8 bits"


def test_weights_stay_the_one_copy_and_rows_of_one_tensor_have_counters_of_their_own(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    policy = full_policy(tmp_path)
    fused = policy.base.linears["model.layers.0.self_attn.qkv_proj"].segments[0].weight
    q = policy.decoder.model.layers[0].self_attn.q_proj.weight
    assert q.data_ptr() == fused.data_ptr()
    with torch.no_grad():
        q.add_(1.0)
    assert torch.equal(fused[: len(q)], q)
    assert policy.decoder.model.layers[0].self_attn.k_proj.weight._version == 0


def test_a_head_that_is_the_embedding_is_one_parameter(tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2")
    policy = full_policy(tmp_path)
    assert policy.head_weight() is policy.decoder.model.embed_tokens.weight
    assert "lm_head.weight" not in policy.named_parameters()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"load_in_4bit": True}}, "set load_in_4bit = false"),
        ({"model": {"load_in_8bit": True}}, "set load_in_8bit = false"),
        ({"model": {"offload_head": True}}, "set offload_head = false"),
        ({"model": {"dtype": "float16"}}, 'set dtype = "bfloat16"'),
        ({"lora": {"r": 8}}, "lora.r has no use"),
        ({"train": {"weight_update": "stochastic"}}, "keeps every step"),
    ],
)
def test_what_does_not_go_with_it_is_refused_in_a_sentence(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        full_config(tmp_path, **values)


@pytest.mark.parametrize(
    "values", [{"train": {"weight_update": "float32"}}, {"loss": {"reference_storage": "4bit", "beta": 0.1}}]
)
def test_its_keys_are_refused_without_it(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"is for model\.full_finetuning"):
        parse_config({"model": {"name": "none"}, "task": {"name": "arithmetic"}, **values})


def test_an_adapter_policy_over_the_same_base_has_the_same_logprobs(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    full = full_policy(tmp_path)
    adapted = Policy(full.base, Lora())
    one, other = (policy.score(*sequences(), temperature=1.0).logprobs for policy in (full, adapted))
    torch.testing.assert_close(one, other, atol=2e-5, rtol=0)  # one of them adds an adapter of zeros


@pytest.mark.parametrize(("storage", "most"), [("16bit", 1e-6), ("8bit", 0.3), ("4bit", 5.0)])
def test_the_frozen_reference_is_the_model_of_the_start(storage: str, most: float, tmp_path: Path) -> None:
    save_tiny(tmp_path, "qwen2")
    policy = full_policy(tmp_path)
    with torch.no_grad():
        start = policy.score(*sequences(), temperature=1.0).logprobs
        set_reference(policy, Loss(beta=0.1, reference_storage=storage), tmp_path, resume=False)  # type: ignore[arg-type]
        for parameter in policy.parameters():
            parameter.mul_(1.5)
        moved = policy.score(*sequences(), temperature=1.0).logprobs
        with policy.reference():
            reference = policy.score(*sequences(), temperature=1.0).logprobs
        again = policy.score(*sequences(), temperature=1.0).logprobs
    assert torch.equal(moved, again) and float((moved - start).abs().max()) > 1.0
    assert float((reference - start).abs().mean()) < most
    if storage != "16bit":
        assert not torch.equal(reference, start), "it is rounded"
    set_reference(policy, Loss(), tmp_path, resume=False)
    assert policy.frozen is None


REFUSED = {
    "qwen3_moe",
    "olmoe",
    "granitemoe",
    "mixtral",
    "gpt_oss",
    "gemma4_text",
    "qwen3_5_text",
    "qwen3_5_moe_text",
    "lfm2",
}


@pytest.mark.wide
@pytest.mark.parametrize("family", sorted(set(NEWCOMERS) - {"phi3"}))  # whose rotation depends on the run's longest
def test_every_further_family_is_trained_as_transformers_does_or_refused(family: str, tmp_path: Path) -> None:
    changes = {"residual_dropout": 0.0, "attention_dropout": 0.0} if family == "seed_oss" else {}
    model = save_family(tmp_path, family, **changes)
    if family in REFUSED:
        with pytest.raises(UserError, match="whose weights get no gradient here"):
            full_policy(tmp_path)
        return
    assert worst(gradients(full_policy(tmp_path)), reference_gradients(model.float().train())) < 2e-5
