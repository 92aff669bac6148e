"""Experts that sampling chose are recorded by place in the KV cache, and training can use them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.policy.experts import Router
from grpo.rollout.types import Completion
from tests.helpers.families import save_family
from tests.helpers.graph_comparison import PROMPTS, load

SAMPLED = 40


def rollout(base: Any, policy: Any) -> list[Completion]:
    """Completions of both prompts in turns, so that prompts are shared and blocks fill at different times."""
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    engine = Engine(base, policy, EngineSettings(max_seq_length=96, max_num_seqs=3))
    try:
        requests = [Request(index, prompt_of(index), seed=index) for index in range(8)]
        done = list(engine.generate(requests, SamplingSettings(0.9, SAMPLED)))
    finally:
        engine.close()
    return sorted(done, key=lambda completion: completion.request_id)


def prompt_of(index: int) -> list[int]:
    return PROMPTS[index % 2] * 4  # more than a block of the cache


def chosen_by(policy: Any, tokens: list[int]) -> Tensor:
    """What the training graph's routers choose for a sequence [tokens, layers, top_k]."""
    seen: dict[int, Tensor] = {}
    routers = [module for module in policy.decoder.modules() if isinstance(module, Router)]
    hooks = [
        router.register_forward_hook(
            lambda module, args, output: seen.__setitem__(module.number, output[module.order.index("chosen")])
        )
        for router in routers
    ]
    with torch.no_grad():
        policy.score([tokens[:1]], [tokens[1:]], temperature=1.0)
    for hook in hooks:
        hook.remove()
    return torch.stack([seen[number] for number in range(len(routers))], 1)


def difference(policy: Any, done: list[Completion], replay: bool) -> Tensor:
    """Trained less sampled logprobs of all tokens, sequences of a prompt being neighbours."""
    order = sorted(range(len(done)), key=lambda index: index % 2)
    with torch.no_grad():
        scored = policy.score(
            [prompt_of(index) for index in order],
            [done[index].token_ids for index in order],
            temperature=0.9,
            routes=[done[index].routes for index in order] if replay else None,
        )
    return scored.logprobs - torch.tensor([logprob for index in order for logprob in done[index].logprobs])


LAYERS = {"num_hidden_layers": 4}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("family", "more", "chosen"), [("qwen3_moe", LAYERS, (3, 4)), ("gpt_oss", LAYERS | WINDOWS, (4, 2))]
)
def test_in_float32_what_is_recorded_is_what_the_training_graph_chooses(
    family: str, more: dict[str, Any], chosen: tuple[int, int], tmp_path: Path
) -> None:
    save_family(tmp_path, family, **more)
    base, policy = load(tmp_path)
    done = rollout(base, policy)
    for completion in done:
        fed = [*prompt_of(completion.request_id), *completion.token_ids[:-1]]
        assert completion.routes.shape == (len(fed), *chosen) and completion.routes.dtype == torch.uint8
        of_graph = chosen_by(policy, [*fed, 0])
        assert torch.equal(completion.routes.long().sort(-1).values, of_graph.sort(-1).values)
    replayed, free = difference(policy, done, replay=True), difference(policy, done, replay=False)
    assert replayed.abs().max() < 1e-4 and free.abs().max() < 1e-4


@pytest.mark.vllm
def test_replay_takes_away_the_larger_part_of_the_mismatch(tmp_path: Path) -> None:
    save_family(tmp_path, "qwen3_moe", num_hidden_layers=4, num_experts=128, num_experts_per_tok=8, mlp_only_layers=[])
    base, policy = load(tmp_path, dtype="bfloat16")
    done = rollout(base, policy)
    kl = []
    for replay in (True, False):
        gap = difference(policy, done, replay)
        kl.append(float((gap.exp() - 1 - gap).mean()))
    print(kl)
    assert kl[0] < 0.5 * kl[1], "k3 with and without replay"


@pytest.mark.vllm
@pytest.mark.parametrize(("parallel", "local"), [(True, 16), (False, 8)])
def test_experts_that_vllm_spreads_over_processes_are_refused(parallel: bool, local: int, tmp_path: Path) -> None:
    from grpo.rollout.experts import serve_experts

    save_family(tmp_path, "qwen3_moe")
    base, _ = load(tmp_path)
    stack = next(iter(base.experts.values()))
    settings = SimpleNamespace(moe_parallel_config=SimpleNamespace(use_ep=parallel))
    served = SimpleNamespace(moe_config=settings, local_num_experts=local, global_num_experts=16)
    with pytest.raises(UserError, match="several processes .expert parallelism., which is not supported"):
        serve_experts(served, None, stack, (torch.empty(0), None), recorder=None, number=0, adapters=None)


def test_a_shared_prompt_and_a_tree_take_the_routes_of_a_sequence_that_has_them() -> None:
    from grpo.policy.packing import packed_row, routes_of, tree_row

    prompts, completions = [[1, 2, 3], [1, 2, 3], [5, 6]], [[7, 8, 9], [4, 4], [1, 2, 3]]
    fed = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
    routes = [torch.tensor(tokens)[:, None, None] for tokens in fed]  # each token's own number
    for make in (packed_row, tree_row):
        row = make(prompts, completions)
        found = routes_of(row, routes, torch.device("cpu"))
        assert found is not None and found[:, 0, 0].tolist() == row.tokens
    assert routes_of(packed_row(prompts, completions), [routes[0], None, routes[2]], torch.device("cpu")) is None
