"""An agent written with the openai client: a conversation with a tool, and the same streamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from openai import OpenAI

TOOL: Any = {
    "type": "function",
    "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}},
}
client = OpenAI()
model = os.environ["OPENAI_MODEL"]
messages: list[Any] = list(json.loads(Path(os.environ["GRPO_ROW"]).read_text())["prompt"])

answer = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], logprobs=True).choices[0]
assert answer.finish_reason == "tool_calls" and answer.message.tool_calls is not None
assert answer.logprobs is not None and answer.logprobs.content and answer.model_extra is not None
assert len(answer.model_extra["token_ids"]) == len(answer.logprobs.content)
call = answer.message.tool_calls[0]
messages += [answer.message, {"role": "tool", "tool_call_id": call.id, "content": f"seen {call.function.arguments}"}]
stream = client.chat.completions.create(
    model=model, messages=messages, tools=[TOOL], stream=True, stream_options={"include_usage": True}
)
text, used = "", 0
for chunk in stream:
    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    used = chunk.usage.total_tokens if chunk.usage else used
assert [one.id for one in client.models.list()] == [model] and used > 0
print(json.dumps({"reward": len(text), "metrics": {"used": used}}))
