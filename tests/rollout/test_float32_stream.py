"""Families whose stream between layers is float32 have it in both graphs, and other families in neither."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from grpo.memory.layer_sizes import OWN_NORMS
from grpo.model.families.table import family_of
from tests.helpers.families import NEWCOMERS, save_family
from tests.helpers.family_tail import TAIL
from tests.helpers.graph_comparison import PROMPTS, load

QUICK = ("qwen3_moe", "gpt_oss", "qwen3_5_text")
"""`make test-wide` has all."""
WIDE = [name for name in {**NEWCOMERS, **TAIL} if family_of(name).float32_stream or name in OWN_NORMS]
OTHERS = ["granitemoe", "smollm3"]
COMPLETION = [(13 * number) % 150 for number in range(30)]


def streams(policy: Any) -> list[torch.dtype]:
    """What the layers of the training graph hand on, and last what the decoder gives."""
    seen: list[torch.dtype] = []
    modules = [*policy.decoder.model.layers, policy.decoder.model.norm]
    hooks = [module.register_forward_hook(lambda module, args, output: seen.append(output.dtype)) for module in modules]
    with torch.no_grad():
        policy.score(PROMPTS, [COMPLETION, COMPLETION], temperature=1.0)
    for hook in hooks:
        hook.remove()
    return seen


def vllms_streams(model: nn.Module, run: Any) -> list[torch.dtype]:
    """Types of what vLLM's norms get beside the result of a layer's part, and give back, while `run()` runs."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    from grpo.rollout.vllm_qwen3_5 import Norm

    seen: list[torch.dtype] = []

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            given = args[1] if len(args) > 1 else kwargs["residual"]
            assert output[0].dtype == torch.bfloat16
            seen.extend((given.dtype, output[1].dtype))

    hooks = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in model.modules()
        if type(module) in (RMSNorm, Norm)
    ]
    run()
    for each in hooks:
        each.remove()
    return seen


def test_the_families_are_hybrids_and_those_of_experts_that_people_train() -> None:
    assert {"qwen3_moe", "gpt_oss", "olmoe", "mixtral", *OWN_NORMS} <= set(WIDE)


@pytest.mark.vllm
@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name in QUICK else pytest.mark.wide) for name in WIDE]
)
def test_both_graphs_hand_on_float32(family: str, tmp_path: Path) -> None:
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    save_family(tmp_path, family)
    base, policy = load(tmp_path, dtype="bfloat16")
    layers = base.config.num_hidden_layers
    assert streams(policy) == [torch.float32] * layers + [torch.bfloat16]
    engine = Engine(base, policy, EngineSettings(max_seq_length=96, max_num_seqs=2))
    done: list[Any] = []
    requests = [Request(number, prompt, number) for number, prompt in enumerate(PROMPTS)]
    try:
        seen = vllms_streams(
            engine.vllm_model(), lambda: done.extend(engine.generate(requests, SamplingSettings(1.0, 20)))
        )
    finally:
        engine.close()
    passes = len(seen) // (4 * layers)
    # Every norm but the first layer's first gets the stream: the first of them as the embedding, all others widened.
    assert passes >= 20 and seen == ([torch.bfloat16] + [torch.float32] * (4 * layers - 1)) * passes
    done.sort(key=lambda completion: completion.request_id)
    with torch.no_grad():
        scored = policy.score(
            PROMPTS, [each.token_ids for each in done], temperature=1.0, routes=[each.routes for each in done]
        )
    gap = scored.logprobs - torch.tensor([logprob for each in done for logprob in each.logprobs])
    assert float((gap.exp() - 1 - gap).mean()) < 0.01


@pytest.mark.parametrize("family", OTHERS)
def test_layers_of_other_families_hand_on_what_they_compute_in(family: str, tmp_path: Path) -> None:
    save_family(tmp_path, family)
    _, policy = load(tmp_path, dtype="bfloat16")
    assert set(streams(policy)) == {torch.bfloat16}


@pytest.mark.parametrize("family", WIDE)
def test_a_layer_that_is_computed_again_gives_the_same_gradients(family: str, tmp_path: Path) -> None:
    save_family(tmp_path, family)
    _, policy = load(tmp_path, dtype="bfloat16")
    policy.model.train()
    grads = []
    for mode in ("none", "layer", "offload"):
        policy.recompute_layers(mode)
        policy.score(PROMPTS, [COMPLETION, COMPLETION], temperature=1.0).logprobs.sum().backward()
        grads.append([parameter.grad.clone() for parameter in policy.parameters()])
        policy.model.zero_grad()
    assert all(torch.equal(grads[0][at], each[at]) for each in grads[1:] for at in range(len(each)))
    assert any(float(grad.abs().max()) > 0 for grad in grads[0])
