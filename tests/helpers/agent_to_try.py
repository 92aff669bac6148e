"""An agent as others write them: a program that knows an OpenAI-compatible endpoint and nothing of this project."""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any


def post(path: str, body: dict[str, Any]) -> Any:
    base = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{base}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


def chat(messages: list[dict[str, Any]], **more: Any) -> Any:
    return post("/v1/chat/completions", {"model": "policy", "messages": messages, **more})


def two_turns(row: dict[str, Any]) -> Any:
    """Two turns in one conversation; the reward is the share of letters."""
    messages = list(row["prompt"])
    for _ in range(2):
        messages.append(chat(messages)["choices"][0]["message"])
        messages.append({"role": "user", "content": "Again."})
    text = "".join(message["content"] for message in messages if message["role"] == "assistant")
    return sum(character.isalpha() for character in text) / 20


def two_agents(row: dict[str, Any]) -> Any:
    """Two conversations that take turns."""
    said = {name: [{"role": "user", "content": f"You are {name}."}] for name in ("one", "two")}
    for _ in range(2):
        for messages in said.values():
            messages.append(chat(messages)["choices"][0]["message"])
            messages.append({"role": "user", "content": "Go on."})
    return {"reward": 1.0, "metrics": {"agents": 2}}


def tokens(row: dict[str, Any]) -> Any:
    """Tokens in, tokens out: the second turn continues the first."""
    ids = [ord(character) for character in "Say it: "]
    for _ in range(2):
        body = {"token_ids": ids, "sampling_params": {"max_tokens": 5, "logprobs": 1}}
        choice = post("/inference/v1/generate", body)["choices"][0]
        ids += choice["token_ids"] + [ord(" ")]
    return len(ids) / 30


def crashes(row: dict[str, Any]) -> Any:
    chat(row["prompt"])
    sys.exit(3)


def says_nothing(row: dict[str, Any]) -> Any:
    return "not JSON"


if __name__ == "__main__":
    given = json.loads(Path(os.environ["GRPO_ROW"]).read_text())
    print("an agent says what it does")
    result = globals()[sys.argv[1]](given)
    print(result if isinstance(result, str) else json.dumps(result))
