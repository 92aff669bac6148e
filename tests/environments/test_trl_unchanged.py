"""Tools and an environment written for TRL train in TRL 1.16 and here, unchanged, and the model calls them in both.

The model is tiny and has learned one conversation of each kind by heart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import get_json_schema

import grpo
from tests.helpers import trl_game, trl_tools
from tests.helpers.paths import ROOT
from tests.helpers.small_chat import TOKENS, save_byte_tokenizer
from tests.helpers.tiny import save_tiny

pytestmark = [pytest.mark.wide, pytest.mark.vllm]

MARKS = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
SIZES = {"max_steps": 2, "num_generations": 4, "learning_rate": 1e-4, "max_completion_length": 220}


def conversation(question: str, call: dict[str, Any], seen: str, answer: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "name": call["name"], "content": seen},
        {"role": "assistant", "content": answer},
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that calls the tools that it is offered."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("taught")
    save_tiny(folder, "llama", vocab_size=len(TOKENS) + len(MARKS), max_position_embeddings=2048)
    save_byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.eos_token, tokenizer.chat_template = MARKS[1], TEMPLATE.read_text()
    tokenizer.save_pretrained(folder)
    counting = trl_game.Counting()
    texts = [
        (
            trl_tools.add,
            conversation(f"What is {a} + 3?", {"name": "add", "arguments": {"a": a, "b": 3}}, str(a + 3), "5"),
        )
        for a in (2, 4)
    ] + [
        (counting.up, conversation(f"{said} Count to 3.", {"name": "up", "arguments": {"by": 3}}, "at 3", "Done."))
        for said in ("Play.", "Play again.")
    ]
    taught = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teach(taught, [tokens_of(tokenizer, tool, messages) for tool, messages in texts])
    taught.save_pretrained(folder)
    return folder


def tokens_of(tokenizer: Any, tool: Any, messages: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, labels) [1, length] of a conversation; its opening is not learned."""

    def tokens(shown: list[dict[str, Any]], **more: Any) -> list[int]:
        schemas = [get_json_schema(tool)]
        return tokenizer.apply_chat_template(shown, tools=schemas, tokenize=True, return_dict=True, **more)["input_ids"]

    ids, opening = torch.tensor([tokens(messages)]), len(tokens(messages[:1], add_generation_prompt=True))
    labels = ids.clone()
    labels[:, :opening] = -100
    return ids, labels


def teach(model: Any, examples: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Train until the examples are known by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = torch.stack([model(ids, labels=labels).loss for ids, labels in examples]).mean()
        if loss.item() < 0.004:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the examples were not learned: {loss.item()}")


def in_trl(model: Path, tmp_path: Path, rows: list[dict[str, Any]], **given: Any) -> list[dict[str, float]]:
    """The log of TRL's trainer on `rows`."""
    sizes = {**SIZES, "max_tool_calling_iterations": 3, "per_device_train_batch_size": 8}
    arguments = trl.GRPOConfig(str(tmp_path / "trl"), **sizes, use_cpu=True, logging_steps=1, report_to=[], beta=0.0)
    trainer = trl.GRPOTrainer(model=str(model), args=arguments, train_dataset=Dataset.from_list(rows), **given)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "reward" in entry]


def here(
    model: Path, tmp_path: Path, rows: list[dict[str, Any]], environment: Any, **given: Any
) -> list[dict[str, Any]]:
    """The metrics of a run of this project on the same rows."""
    with grpo.load(str(model), load_in_4bit=False, dtype="float32", device="cpu", max_seq_length=1400) as policy:
        result = policy.train(
            rows, environment={**environment, "max_turns": 4, "latency_steps": 2}, prompts_per_step=2,
            output_dir=str(tmp_path / "here"), max_prompt_length=1100, **SIZES, **given,
        )  # fmt: skip
    return result.metrics


def check_calls(log: list[dict[str, float]], metrics: list[dict[str, Any]]) -> None:
    assert len(log) == len(metrics) == 2
    assert log[0]["tools/call_frequency"] > 0.25 and log[0]["tools/failure_frequency"] < 0.5
    assert metrics[0]["environment/calls"] > 0.25 and metrics[0]["environment/call_errors"] < 0.5
    assert abs(log[0]["reward"] - metrics[0]["reward"]) < 0.5, "the same model earns about the same"


def test_tools_train_in_both(model: Path, tmp_path: Path) -> None:
    log = in_trl(model, tmp_path, trl_tools.ROWS, tools=[trl_tools.add], reward_funcs=trl_tools.right)
    tools = [f"{ROOT}/tests/helpers/trl_tools.py:add"]
    check_calls(log, here(model, tmp_path, trl_tools.ROWS, {"tools": tools}, rewards=[trl_tools.right]))


def test_an_environment_trains_in_both(model: Path, tmp_path: Path) -> None:
    factory: Callable[[], Any] = trl_game.Counting
    log = in_trl(model, tmp_path, trl_game.ROWS, environment_factory=factory)
    factory_here = {"factory": f"{ROOT}/tests/helpers/trl_game.py:Counting"}
    check_calls(log, here(model, tmp_path, trl_game.ROWS, factory_here))
