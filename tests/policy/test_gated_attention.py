"""What goes from layer to layer of Qwen 3.5 in the training graph: float32 sums, whatever is computed in."""

from pathlib import Path

import pytest
import torch

from grpo.config.schema import Lora, Model
from grpo.kernels.launch import unrounded
from grpo.memory.layer_sizes import OWN_NORMS
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from tests.helpers.families import save_family


@pytest.mark.parametrize("recomputed", ["none", "layer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", OWN_NORMS)
def test_the_sum_of_all_layers_is_not_rounded(family: str, dtype: torch.dtype, recomputed: str, tmp_path: Path) -> None:
    save_family(tmp_path, family)
    model = Model(name=str(tmp_path), load_in_4bit=False)
    base = BaseWeights(open_source(model), model, device=torch.device("cpu"), dtype=dtype)
    policy = Policy(base, Lora(r=4), seed=0)
    policy.recompute_layers(recomputed)
    policy.model.train()
    decoder = policy.decoder.model
    added: list[list[torch.Tensor]] = []
    reached: list[torch.Tensor] = []
    for layer in decoder.layers:
        layer.register_forward_pre_hook(lambda module, args: added.append([args[0].detach()]))
        for part in (getattr(layer, "linear_attn", None) or layer.self_attn, layer.mlp):
            part.register_forward_hook(
                lambda module, args, output: added[-1].append((output[0] if type(output) is tuple else output).detach())
            )
    last = decoder.norm.register_forward_hook(lambda module, args, output: reached.extend([args[0], output]))
    loss = policy.score([[3, 4, 5]], [[6, 7, 8]], temperature=1.0).logprobs.sum()
    last.remove()
    stream, normed = reached
    assert stream.dtype == torch.float32 and normed.dtype == dtype
    layers = added[: len(decoder.layers)]
    total = unrounded(layers[0][0])
    for x, mixed, through_mlp in layers:
        assert mixed.dtype == through_mlp.dtype == dtype
        assert torch.equal(unrounded(x), total)
        total = total + mixed + through_mlp
    assert torch.equal(total, stream)
    loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
