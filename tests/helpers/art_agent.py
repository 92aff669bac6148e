"""A rollout as users of OpenPipe ART write it, and the few lines that make it an environment's command."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import art

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look.",
        "parameters": {"type": "object", "properties": {"at": {"type": "integer"}}},
    },
}


async def rollout(model: art.Model, question: list[Any]) -> art.Trajectory:
    """A conversation with a tool. Nothing here knows this project."""
    client = model.openai_client()
    trajectory = art.Trajectory(messages_and_choices=question, tools=[TOOL], reward=0.0)
    while True:
        answer = await client.chat.completions.create(
            model=model.get_inference_name(), messages=trajectory.messages(), tools=[TOOL], logprobs=True
        )
        choice = answer.choices[0]
        trajectory.messages_and_choices.append(choice)
        if not choice.message.tool_calls or len(trajectory.messages_and_choices) > 6:
            break
        for call in choice.message.tool_calls:
            trajectory.messages_and_choices.append(
                {"role": "tool", "tool_call_id": call.id, "content": f"seen {call.function.arguments}"}
            )
    trajectory.reward = float(len(choice.message.content or ""))
    trajectory.metrics["turns"] = sum(not isinstance(one, dict) for one in trajectory.messages_and_choices)
    return trajectory.finish()


async def main() -> None:
    model = art.Model(
        name="agent",
        project="tried",
        inference_model_name=os.environ["OPENAI_MODEL"],
        inference_base_url=os.environ["OPENAI_BASE_URL"],
        inference_api_key=os.environ["OPENAI_API_KEY"],
    )
    row = json.loads(Path(os.environ["GRPO_ROW"]).read_text())
    (group,) = await art.gather_trajectory_groups([art.TrajectoryGroup([rollout(model, row["prompt"])])])
    (trajectory,) = group.trajectories
    for choice in trajectory.messages_and_choices:
        if not isinstance(choice, dict):
            assert choice.logprobs is not None and len(choice.logprobs.content or ()) > 0
    print(json.dumps({"reward": trajectory.reward, "metrics": {"turns": float(trajectory.metrics["turns"])}}))


asyncio.run(main())
