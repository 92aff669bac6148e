"""A taskset and a harness as authors of verifiers 1 write them, and the few lines that make them a command."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import verifiers.v1 as vf
from openai import AsyncOpenAI
from verifiers.v1.runtimes import ProgramResult

NAME = Path(__file__).stem


class Question(vf.TaskData):
    answer: str


class Sum(vf.Task[Question, vf.State, vf.TaskConfig]):
    @vf.reward(weight=1.0)
    async def right(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply)


class Sums(vf.Taskset[Sum, vf.TasksetConfig]):
    def load(self) -> Iterable[Sum]:
        row = json.loads(Path(os.environ["GRPO_ROW"]).read_text())
        yield Sum(Question(prompt=row["prompt"][-1]["content"], answer=str(row["answer"])))


class Loop(vf.Harness[vf.HarnessConfig]):
    """Asks once more, in this process."""

    EXECUTES_CODE, NEEDS_CONTAINER = False, False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Question
    ) -> ProgramResult:
        client = AsyncOpenAI(base_url=endpoint, api_key=secret)
        messages: list[Any] = [{"role": "user", "content": data.prompt}]
        for _ in range(2):
            answer = await client.chat.completions.create(model=ctx.model, messages=messages)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
            messages.append({"role": "user", "content": "Are you sure?"})
        return ProgramResult(0, "", "")


__all__ = ["Loop", "Sums"]


async def main() -> None:
    agent = {"harness": {"id": NAME}, "runtime": {"type": "subprocess"}}
    env = vf.SingleAgentEnv(vf.SingleAgentEnvConfig(taskset=vf.TasksetConfig(id=NAME), agent=agent))
    client = vf.EvalClientConfig(base_url=os.environ["OPENAI_BASE_URL"], api_key_var="OPENAI_API_KEY")
    async with env.serving():
        episode = await env.run_episode(
            next(iter(env.taskset)), vf.ModelContext(model=os.environ["OPENAI_MODEL"], client=client)
        )
    assert episode.ok, [*episode.errors, *(trace.errors for trace in episode.traces)]
    (trace,) = episode.traces
    print(json.dumps({"reward": trace.reward, "metrics": {"branches": len(trace.branches)}}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    asyncio.run(main())
