"""How far vLLM's logprobs are from the training graph's for a model, with an adapter on every linear layer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from grpo.config.schema import Lora, Model
from grpo.model.base_weights import BaseWeights
from grpo.model.layout import Layout
from grpo.model.source import open_source
from grpo.policy.policy import Policy

PROMPTS = [[5, 9, 33, 7, 21, 64, 90, 11, 2, 3], [12, 140, 77]]
CPU = torch.device("cpu")


def load(folder: Path, *, load_in_4bit: bool = False, dtype: str = "float32") -> tuple[BaseWeights, Policy]:
    """Base and policy of the model in `folder`, with an adapter that does something on every linear layer."""
    model = Model(name=str(folder), load_in_4bit=load_in_4bit, dtype=dtype)
    source = open_source(model)
    parts = [part for linear in Layout.of(source.config).linears.values() for part in linear.parts]
    base = BaseWeights(source, model, device=CPU, dtype=getattr(torch, dtype))
    policy = Policy(
        base, Lora(r=4, lora_alpha=8, target_modules=sorted({part.split(".")[-1] for part in parts})), seed=1
    )
    assert set(policy.adapter_layers()) == set(parts)
    torch.manual_seed(2)
    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return base, policy


def largest_difference(base: BaseWeights, policy: Policy, tokens: int = 30) -> float:
    """Between vLLM's logprobs and the training graph's on packed rows that share prompts, adapter on and off."""
    from grpo.rollout.engine import Engine, EngineSettings, Request, SamplingSettings

    engine, worst = Engine(base, policy, EngineSettings(max_seq_length=64, max_num_seqs=8)), 0.0
    try:
        requests = [Request(index, PROMPTS[index % 2], seed=index) for index in range(6)]
        for adapter in (True, False):
            done = {c.request_id: c for c in engine.generate(requests, SamplingSettings(0.9, tokens), adapter=adapter)}
            order = sorted(done, key=lambda index: index % 2)  # neighbours share a prompt
            rollout = torch.tensor([logprob for index in order for logprob in done[index].logprobs])
            rows = [PROMPTS[index % 2] for index in order], [done[index].token_ids for index in order]
            with torch.no_grad():
                if adapter:
                    scored = policy.score(*rows, temperature=0.9)
                else:
                    with policy.reference():
                        scored = policy.score(*rows, temperature=0.9)
            worst = max(worst, float((rollout - scored.logprobs).abs().max()))
    finally:
        engine.close()
    return worst


def gate_session(folder: Path, dtype: str, *, load_in_4bit: bool = False, device: str = "cpu") -> Any:
    """What the gate at the start needs of a session, with an adapter on every linear layer that does nothing yet."""
    from grpo.rollout.engine import Engine, EngineSettings

    model = Model(name=str(folder), load_in_4bit=load_in_4bit, dtype=dtype)
    base = BaseWeights(open_source(model), model, device=torch.device(device), dtype=getattr(torch, dtype))
    policy = Policy(base, Lora(r=4, lora_alpha=8), seed=1)
    engine = Engine(base, policy, EngineSettings(max_seq_length=96, max_num_seqs=4))
    return SimpleNamespace(policy=policy, base=base, engine=engine, image_tokens=None)
