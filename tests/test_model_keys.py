"""grpo/model_keys.py and rope.py: of any configuration, vLLM and the training graph compute the same, or a sentence."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from model_configs import LONGEST, configurations, save_model

from grpo.base import BaseWeights
from grpo.config import Lora, Model
from grpo.errors import UserError
from grpo.model_files import check_head_size
from grpo.policy import Policy
from grpo.source import open_source

PROMPTS = [[5, 9, 33, 7, 21, 64, 90, 11, 2, 3], [12, 140, 77]]
CPU = torch.device("cpu")


def load(folder: Path) -> tuple[BaseWeights, Policy]:
    """Base and policy of the model in `folder`, with an adapter that does something."""
    model = Model(name=str(folder), load_in_4bit=False, dtype="float32")
    source = open_source(model)
    check_head_size(source.config, source.path, on_cpu=True)
    base = BaseWeights(source, model, device=CPU, dtype=torch.float32)
    policy = Policy(base, Lora(r=4, lora_alpha=8), seed=1)
    torch.manual_seed(2)
    for layer in policy.adapter_layers().values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    policy.set_longest(LONGEST)
    return base, policy


@torch.no_grad()
def scored(policy: Policy, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    return policy.score(prompts, completions, temperature=1.0).logprobs


def check_equal(folder: Path, reference: object) -> None:
    """vLLM's and the training graph's logprobs are the same, whoever shares a row, and the base's transformers'."""
    from grpo.engine import Engine, EngineSettings, Request, SamplingSettings

    base, policy = load(folder)
    engine = Engine(base, policy, EngineSettings(max_seq_length=LONGEST, max_num_seqs=4))
    try:
        requests = [Request(index, PROMPTS[index % 2], seed=index) for index in range(3)]
        done = {c.request_id: c for c in engine.generate(requests, SamplingSettings(1.0, LONGEST - 12))}
    finally:
        engine.close()
    prompts = [request.prompt_ids for request in requests]
    completions = [done[index].token_ids for index in range(3)]
    sampled = torch.tensor([logprob for index in range(3) for logprob in done[index].logprobs])
    assert sampled.isfinite().all()
    together = scored(policy, prompts, completions)
    assert (sampled - together).abs().max() < 5e-4
    alone = torch.cat([scored(policy, [p], [c]) for p, c in zip(prompts, completions, strict=True)])
    assert (together - alone).abs().max() < 5e-5
    with policy.model.disable_adapter():
        mine = scored(policy, prompts[:1], completions[:1])
    with torch.no_grad():
        whole = prompts[0] + completions[0]
        answer = reference(torch.tensor([whole]), return_dict=True).logits[0]  # type: ignore[operator]
    theirs = torch.log_softmax(answer.float(), -1)[len(prompts[0]) - 1 : -1][range(len(completions[0])), completions[0]]
    # Of "longrope" transformers takes the factors that this one sequence asks for.
    if not needs_longer(base, len(whole)):
        assert (mine - theirs).abs().max() < 5e-4


def needs_longer(base: BaseWeights, length: int) -> bool:
    from grpo.rope import rotary_parameters

    return any(
        length <= values.get("original_max_position_embeddings", LONGEST) < LONGEST
        for _, values in rotary_parameters(base.config)
        if values["rope_type"] == "longrope"
    )


def check_configuration(family: str, values: dict) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = save_model(folder, family, values)
        try:
            check_equal(folder, reference)
        except UserError as error:
            sentence = str(error)
            assert sentence.startswith(str(folder)) and "\n" not in sentence and len(sentence) < 600, sentence
            event("a sentence")
        else:
            assert reference is not None
            event("equal logprobs")


MANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}


@pytest.mark.vllm
@pytest.mark.slow
@settings(max_examples=6, derandomize=True, **MANY)
@given(configurations())
def test_a_configuration_is_served_exactly_or_refused_in_a_sentence(drawn):
    check_configuration(*drawn)


@pytest.mark.vllm
@pytest.mark.long
@settings(max_examples=300, **MANY)
@given(configurations())
def test_many_configurations_are_served_exactly_or_refused_in_a_sentence(drawn):
    check_configuration(*drawn)
