"""An environment as authors of verifiers 0.3 write them: nothing here knows this project."""

from __future__ import annotations

from typing import Any

import verifiers as vf
from datasets import Dataset


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: first
        b: second
    """
    return a + b


class Again(vf.MultiTurnEnv):
    """Asks the same three times."""

    async def env_response(self, messages: Any, state: Any, **kwargs: Any) -> Any:
        return [{"role": "user", "content": "Again."}]

    @vf.stop
    async def said_enough(self, state: Any, **kwargs: Any) -> bool:
        return len(state["trajectory"]) >= 3


class Counted(vf.StatefulToolEnv):
    """Its tool is told how often it was called."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_tool(self.count, args_to_skip=["calls"])

    def count(self, word: str, calls: int = 0) -> str:
        """Count.

        Args:
            word: any
        """
        return f"{word} {calls}"

    def update_tool_args(self, tool_name: str, tool_args: dict, messages: Any, state: Any, **kwargs: Any) -> dict:
        state["calls"] = state.get("calls", 0) + 1
        return {**tool_args, "calls": state["calls"]}


def load_environment(kind: str = "tools", rows: int = 6) -> Any:
    dataset = Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"What is {n} + 2?"}], "answer": str(n + 2)} for n in range(rows)]
    )

    async def right(completion: Any, answer: str, **kwargs: Any) -> float:
        return float(answer in str(completion[-1]["content"]))

    async def longest(completions: Any, **kwargs: Any) -> list[float]:
        lengths = [len(str(completion[-1]["content"])) for completion in completions]
        return [float(length == max(lengths)) for length in lengths]

    async def letters(completion: Any, **kwargs: Any) -> float:
        text = "".join(str(message["content"]) for message in completion if message["role"] == "assistant")
        return sum(character.isalpha() for character in text) / 100

    scores = {"group": [longest], "again": [letters]}.get(kind, [right])
    given = {"dataset": dataset, "eval_dataset": dataset, "rubric": vf.Rubric(funcs=scores)}
    if kind == "tools":
        return vf.ToolEnv(tools=[add], max_turns=4, **given)
    return Counted(max_turns=4, **given) if kind == "stateful" else Again(**given)
