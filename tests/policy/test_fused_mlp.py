"""grpo/policy/fused_mlp.py: with the kernels' MLP or transformers', layers give the same loss and gradients."""

from __future__ import annotations

import pytest
import torch

from grpo.memory.layer_sizes import OWN_NORMS
from tests.helpers.families import save_family
from tests.policy.test_fused_layers import DEVICES, build, distance, loss_and_gradients

DENSE = [family for family in OWN_NORMS if "moe" not in family]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("targets", [None, ["q_proj"], ["gate_proj"], ["down_proj", "in_proj_a"]])
@pytest.mark.parametrize("family", DENSE)
def test_both_forms_agree_in_float32(family, targets, device, tmp_path):
    save_family(tmp_path, family)
    lora = {} if targets is None else {"target_modules": targets}
    loss, gradient = loss_and_gradients(build(tmp_path, kernels=False, device=device, **lora))
    policy = build(tmp_path, kernels=True, device=device, **lora)
    for mode in ("none", "mlp", "layer", "offload"):
        result, result_gradient = loss_and_gradients(policy, mode)
        assert abs(result / loss - 1) < 1e-5, mode
        assert distance(result_gradient, gradient) < 2e-5, mode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_forms_agree_in_16_bit(dtype, tmp_path):
    save_family(tmp_path, DENSE[0])
    _, exact = loss_and_gradients(build(tmp_path, kernels=False))
    _, plain = loss_and_gradients(build(tmp_path, kernels=False, dtype=dtype))
    policy = build(tmp_path, kernels=True, dtype=dtype)
    of_modes = [loss_and_gradients(policy, mode)[1] for mode in ("none", "mlp", "layer")]
    assert all(torch.equal(of_modes[0], other) for other in of_modes[1:])
    assert distance(of_modes[0], exact) < 1.2 * distance(plain, exact)


def test_whoever_watches_a_linear_layer_sees_it(tmp_path):
    save_family(tmp_path, DENSE[0])
    policy, seen = build(tmp_path, kernels=True), []
    before = policy.score([[3, 4]], [[5, 6]], temperature=1.0).logprobs
    mlp = policy.decoder.model.layers[0].mlp
    handle = mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    after = policy.score([[3, 4]], [[5, 6]], temperature=1.0).logprobs
    handle.remove()
    assert len(seen) == 1
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)


def test_dropout_and_an_adapter_that_is_off_are_obeyed(tmp_path):
    save_family(tmp_path, DENSE[0])
    with_kernels, without = (build(tmp_path, kernels=kernels, lora_dropout=0.5) for kernels in (True, False))
    assert loss_and_gradients(with_kernels)[0] == pytest.approx(loss_and_gradients(without)[0], rel=1e-5)
    scores = []
    for policy in (with_kernels, without):
        policy.model.eval()
        with policy.model.disable_adapter():
            scores.append(policy.score([[3, 4]], [[5, 6]], temperature=1.0).logprobs)
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)
