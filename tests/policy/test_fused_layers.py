"""grpo/policy/fused_layers.py: with kernels or without, the training graph gives the same loss and the same
gradients."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.errors import UserError
from grpo.kernels import attention
from grpo.kernels.launch import interpreter_enabled
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.fused_layers import FusedLayer, install_fused_layers, wants_kernels
from grpo.policy.policy import Policy
from grpo.training.optim import LossScaler
from tests.helpers.paths import ROOT
from tests.helpers.tiny import FAMILIES, save_tiny

PROMPTS = [[5, 9, 33], [5, 9, 33], [12, 140]]
COMPLETIONS = [[8, 15, 99], [3, 4], [9, 8, 7, 6]]
MANY = [[(7 * i * i + 13 * i * j + 5 * j) % 150 + 5 for i in range(20)] for j in range(1, 6)]
"""Completions enough for rounding errors to average out."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CHECKPOINTING_MODES = ["none", "layer"]


def build(folder, *, kernels, dtype=torch.float32, device="cpu", four_bit=True, **lora):
    """A policy whose adapter does something; `kernels` installs them on a CPU too, where their torch forms run."""
    model = Model(name=str(folder), load_in_4bit=four_bit, dtype=str(dtype).removeprefix("torch."))
    base = BaseWeights(open_source(model), model, device=torch.device(device), dtype=dtype)
    policy = Policy(base, Lora(**{"r": 4, "lora_alpha": 8, **lora}), seed=1, kernels="torch")
    if kernels:
        assert install_fused_layers(policy.decoder, base) == base.config.num_hidden_layers
    torch.manual_seed(2)
    for layer in policy.adapter_layers().values():
        b = layer.lora_B["default"].weight
        b.data.copy_(torch.randn(b.shape) * 0.1)
    return policy


def loss_and_gradients(policy, mode="none", prompts=PROMPTS, completions=COMPLETIONS):
    """A loss with a different weight for every token; gradients as one vector, in the order of the names."""
    policy.model.train()
    policy.recompute_layers(mode)
    torch.manual_seed(3)
    logprobs = policy.score(prompts, completions, temperature=0.7).logprobs
    loss = (logprobs * torch.linspace(0.5, 1.5, len(logprobs), device=logprobs.device)).sum()
    loss.backward()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    gradient = torch.cat([trained[name].grad.flatten() for name in sorted(trained)]).double().cpu()
    for parameter in trained.values():
        parameter.grad = None
    return float(loss.detach()), gradient


def distance(result, expected):
    return float((result - expected).norm() / expected.norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_and_torch_agree_in_float32(family, device, tmp_path):
    changes = {"num_hidden_layers": 1} if interpreter_enabled() else {}
    save_tiny(tmp_path, family, **changes)
    loss, gradient = loss_and_gradients(build(tmp_path, kernels=False, device=device))
    policy = build(tmp_path, kernels=True, device=device)
    for mode in CHECKPOINTING_MODES[-1:] if interpreter_enabled() else CHECKPOINTING_MODES:
        result, result_gradient = loss_and_gradients(policy, mode)
        assert abs(result / loss - 1) < 1e-5
        assert distance(result_gradient, gradient) < 2e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_are_as_near_to_float32_as_torch_is(family, dtype, device, tmp_path):
    """The reference is float32 arithmetic over the same weights."""
    completions = MANY[::3] if interpreter_enabled() else MANY
    many = {"prompts": [[5, 9]] * len(completions), "completions": completions}
    if interpreter_enabled() and dtype == torch.float16:
        return
    save_tiny(tmp_path, family, num_hidden_layers=1)
    reference = build(tmp_path, kernels=False, four_bit=False)
    settle(reference, dtype)
    expected, expected_gradient = loss_and_gradients(reference, **many)
    policies = {kernels: build(tmp_path, kernels=kernels, dtype=dtype, device=device, four_bit=False)
                for kernels in (False, True)}  # fmt: skip
    plain, fused = (loss_and_gradients(policies[kernels], **many) for kernels in (False, True))
    unit = 2**-8 if dtype == torch.bfloat16 else 2**-11
    assert distance(fused[1], expected_gradient) < 1.2 * distance(plain[1], expected_gradient) + unit
    assert abs(fused[0] - expected) < abs(plain[0] - expected) + unit * abs(expected)


@pytest.mark.parametrize("mode", ["none", "layer"])
def test_layers_of_other_ranks_and_scales_train_the_same(mode, tmp_path):
    save_tiny(tmp_path, "llama")
    lora = {
        "exclude_modules": ["0.mlp.up_proj"],
        "rank_pattern": {"k_proj": 7, r"layers\.1\.mlp.*": 1},
        "alpha_pattern": {"q_proj": 20, "1.mlp.down_proj": 3},
    }
    loss, gradient = loss_and_gradients(build(tmp_path, kernels=False, **lora), mode)
    fused_loss, fused_gradient = loss_and_gradients(build(tmp_path, kernels=True, **lora), mode)
    assert abs(fused_loss / loss - 1) < 1e-5
    assert distance(fused_gradient, gradient) < 2e-5


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("kernels", [False, True])
def test_attention_of_a_gpu_without_flash_trains_the_same(family, kernels, tmp_path, monkeypatch):
    save_tiny(tmp_path, family)
    loss, gradient = loss_and_gradients(build(tmp_path, kernels=kernels))
    monkeypatch.setattr(attention, "without_scores", lambda query: True)
    result, result_gradient = loss_and_gradients(build(tmp_path, kernels=kernels))
    assert abs(result / loss - 1) < 1e-5
    assert distance(result_gradient, gradient) < 2e-5


def test_a_scaled_loss_gives_its_float16_gradients_there(tmp_path, monkeypatch):
    save_tiny(tmp_path, "llama")
    expected = loss_and_gradients(build(tmp_path, kernels=True))[1]
    monkeypatch.setattr(attention, "without_scores", lambda query: True)
    policy, scaler = build(tmp_path, kernels=True, dtype=torch.float16), LossScaler(torch.float16)
    policy.model.train()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    overflows = 0
    while True:
        logprobs = policy.score(PROMPTS, COMPLETIONS, temperature=0.7).logprobs
        scaler.backward((logprobs * torch.linspace(0.5, 1.5, len(logprobs))).sum())
        scaler.unscale([p.grad for p in trained.values()])
        gradient = torch.cat([trained[name].grad.flatten() for name in sorted(trained)]).double()
        assert overflows < 16, "the loss scale ends at 1"
        scaler.update(overflowed=not gradient.isfinite().all())
        if gradient.isfinite().all():
            break
        overflows += 1
        policy.model.zero_grad()
    assert overflows > 0 and distance(gradient, expected) < 0.02


def settle(policy, dtype):
    """Round the base's float32 values to `dtype`, which the policies compared with hold."""
    for tensor in policy.base.storages():
        tensor.copy_(tensor.to(dtype))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
def test_dropout_is_that_of_the_plain_graph(family, tmp_path):
    save_tiny(tmp_path, family)
    plain, fused = (
        loss_and_gradients(build(tmp_path, kernels=kernels, lora_dropout=0.3), mode)
        for kernels, mode in ((False, "none"), (True, "layer"))
    )
    without = loss_and_gradients(build(tmp_path, kernels=True))
    assert distance(fused[1], plain[1]) < 2e-5 and distance(fused[1], without[1]) > 0.05


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["up_proj"]])
def test_modules_without_an_adapter_take_part(targets, tmp_path):
    save_tiny(tmp_path, "llama")
    plain, fused = (
        loss_and_gradients(build(tmp_path, kernels=kernels, target_modules=targets), "layer")
        for kernels in (False, True)
    )
    assert distance(fused[1], plain[1]) < 2e-5


def test_keeping_less_of_the_mlp_changes_no_bit(tmp_path):
    save_tiny(tmp_path, "llama")
    policy = build(tmp_path, kernels=True)
    kept = loss_and_gradients(policy)
    for layer in policy.decoder.model.layers:
        layer.keep_mlp = False
    assert torch.equal(loss_and_gradients(policy)[1], kept[1])


def test_a_kept_16bit_part_of_a_fused_layer_takes_part(tmp_path):
    save_tiny(tmp_path, "llama")
    model = Model(name=str(tmp_path), keep_16bit=["layers.0.self_attn.k_proj", "up_proj"], dtype="float32")
    found = []
    for kernels in (False, True):
        base = BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)
        policy = Policy(base, Lora(r=2), seed=1, kernels="torch")
        if kernels:
            install_fused_layers(policy.decoder, base)
        found.append(loss_and_gradients(policy)[1])
    assert distance(found[1], found[0]) < 2e-5


def test_reference_pass_ignores_the_adapter(tmp_path):
    save_tiny(tmp_path, "llama")
    scored = []
    for kernels in (False, True):
        policy = build(tmp_path, kernels=kernels)
        with policy.reference():
            scored.append(policy.score(PROMPTS, COMPLETIONS, temperature=1.0).logprobs)
        assert not torch.allclose(scored[-1], policy.score(PROMPTS, COMPLETIONS, temperature=1.0).logprobs)
    torch.testing.assert_close(scored[1], scored[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_names_stay_those_of_the_plain_graph(family, tmp_path):
    save_tiny(tmp_path, family)
    plain, fused = build(tmp_path, kernels=False), build(tmp_path, kernels=True)
    assert list(fused.model.state_dict()) == list(plain.model.state_dict())
    assert set(fused.adapter_layers()) == set(plain.adapter_layers())
    assert [p.shape for p in fused.parameters()] == [p.shape for p in plain.parameters()]
    assert all(isinstance(layer, FusedLayer) for layer in fused.decoder.model.layers)


def test_a_layer_that_the_kernels_do_not_know_stays(tmp_path):
    save_tiny(tmp_path, "gemma3_text", hidden_activation="gelu")
    model = Model(name=str(tmp_path), load_in_4bit=False, dtype="float32")
    base = BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=torch.float32)
    policy = Policy(base, Lora(r=2), kernels="torch")
    layers = list(policy.decoder.model.layers)
    assert install_fused_layers(policy.decoder, base) == 0
    assert list(policy.decoder.model.layers) == layers


def test_the_switch():
    assert not wants_kernels("auto", torch.device("cpu")) and wants_kernels("auto", torch.device("cuda"))
    assert not wants_kernels("torch", torch.device("cuda")) and wants_kernels("triton", torch.device("cuda"))
    if not interpreter_enabled():
        with pytest.raises(UserError, match="needs a GPU"):
            wants_kernels("triton", torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        "(agree and (qwen2 or gemma2 or phi3)) or (near and dtype0 and llama)",
        pytest.param("(agree and qwen3) or (near and dtype0 and (gemma3_text or phi3))", marks=pytest.mark.wide),
    ],
    ids=["few", "more"],
)
def test_graph_in_the_interpreter(chosen):
    """Triton reads TRITON_INTERPRET when it is imported, hence a process of its own. The families that differ in what
    they give the kernels: biases, norms, activations, fused weights."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", chosen],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout and "skipped" not in result.stdout
