"""An adapter and a merged model behind `vllm serve`, by the lines of docs/export.md: its answers are ours in float32.

A real server on the loopback address, asked by OpenAI's client; the model is tiny and random.
"""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import grpo
from benchmarks.common.vllm_server import prompt_logprobs, vllm_serve
from grpo.rollout.types import Request
from tests.helpers.paths import ROOT
from tests.helpers.small_chat import save_small_chat_model

ASKED = [[{"role": "user", "content": text}] for text in ("Say it.", "And now?", "1 + 1")]
TINY = ["--dtype", "float32", "--max-model-len", "200", "--enforce-eager", "--max-num-seqs", "4"]


def documented(containing: str) -> list[str]:
    """The words after `vllm serve` in the line of docs/export.md that has `containing`, without address and key."""
    text = (ROOT / "docs" / "export.md").read_text().replace("\\\n", " ")
    (line,) = [line for line in re.findall(r"^vllm serve .*$", text, re.MULTILINE) if containing in line]
    words = shlex.split(line)[2:]
    for option in ("--host", "--port", "--api-key"):
        at = words.index(option)
        del words[at : at + 2]
    return words


def replaced(words: list[str], **names: Path) -> list[str]:
    """`words` with the paths of the documentation replaced."""
    for old, new in {"Qwen/Qwen2.5-3B-Instruct": names.get("base"), "runs/gsm8k/adapter": names.get("adapter"),
                     "runs/gsm8k/exports/merged-16bit": names.get("merged")}.items():  # fmt: skip
        words = [word.replace(old, str(new)) for word in words]
    return words


def said(client: Any, model: str, messages: Any) -> list[int]:
    answer = client.chat.completions.create(
        model=model, messages=messages, max_tokens=12, temperature=0, extra_body={"return_token_ids": True}
    )
    return answer.choices[0].model_extra["token_ids"]


def greedy(session: Any, asked: list[list[int]], *, adapter: bool) -> list[list[int]]:
    """The 12 likeliest tokens after each prompt, as this project's engine has them."""
    requests = [Request(number, ids, 0) for number, ids in enumerate(asked)]
    session.engine.sync_adapter()
    done = session.engine.generate(requests, session.sampling(0.0, 12), adapter=adapter)
    return [one.token_ids for one in sorted(done, key=lambda one: one.request_id)]


@pytest.mark.vllm
@pytest.mark.wide
@pytest.mark.timeout(900)
def test_vllm_serve_answers_as_the_policy_does(tmp_path: Path) -> None:
    base = save_small_chat_model(tmp_path / "base")
    ours: dict[str, list[list[int]]] = {}
    with grpo.load(base, load_in_4bit=False, dtype="float32", device="cpu", max_seq_length=200) as policy:
        torch.manual_seed(0)
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        policy.save_lora(tmp_path / "adapter")
        merged = policy.save_merged(tmp_path / "merged")
        template = policy.tokenizer.apply_chat_template
        asked = [template(one, add_generation_prompt=True)["input_ids"] for one in ASKED]
        policy.start()
        for name, adapter in (("adapter", True), ("base", False)):
            ours[name] = greedy(policy.session, asked, adapter=adapter)
        score = policy.session.policy.score([ids[:1] for ids in asked], [ids[1:] for ids in asked], temperature=1.0)
    scored = score.logprobs.tolist()

    words = documented("--enable-lora")
    with vllm_serve([*replaced(words, base=base, adapter=tmp_path / "adapter"), *TINY], tmp_path / "log") as client:
        assert {model.id for model in client.models.list()} == {str(base), "gsm8k"}
        assert [said(client, "gsm8k", one) for one in ASKED] == ours["adapter"] != ours["base"]
        assert [said(client, str(base), one) for one in ASKED] == ours["base"]
        found = [value for ids in asked for value in prompt_logprobs(client, "gsm8k", ids)]
        assert math.dist(found, scored) / math.hypot(*scored) < 1e-5

    with vllm_serve([*replaced(documented("merged-16bit"), merged=merged), *TINY], tmp_path / "log2") as client:
        (model,) = client.models.list()
        found = [value for ids in asked for value in prompt_logprobs(client, model.id, ids)]
    assert math.dist(found, scored) / math.hypot(*scored) < 0.02, "the merged weights are rounded to 16 bit"
