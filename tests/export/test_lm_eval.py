"""The task file for the LM Evaluation Harness: what it asks, what it takes for right, and a whole run where lm-eval is.

Its questions are a small table that is made here. lm-eval has an environment of its own: `make lm-eval`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

import grpo
from grpo.environments.endpoint import Asked, Endpoint
from grpo.environments.program import Turn
from grpo.serve import Service
from tests.helpers.paths import ROOT
from tests.helpers.small_chat import save_small_chat_model

TASK = ROOT / "docs" / "examples" / "gsm8k_local.yaml"
LM_EVAL = ROOT / "build" / "lm-eval" / "bin" / "lm_eval"
ROWS = [
    {"question": "A hen lays 3 eggs a day. How many in a week?", "answer": "3 * 7 = 21\n#### 21"},
    {"question": "Ana had 2,000 and gave away 500. What is left?", "answer": "2000 - 500 = 1500\n#### 1,500"},
]


def task() -> dict[str, Any]:
    return yaml.safe_load(TASK.read_text())


def extracted(name: str, text: str) -> str:
    """What the regular expression of a filter finds, as lm-eval's has it."""
    (found,) = [entry["filter"][0] for entry in task()["filter_list"] if entry["name"] == name]
    matches = re.compile(found["regex_pattern"]).findall(text)
    return matches[found.get("group_select", 0)].strip() if matches else "[invalid]"


def test_a_row_is_asked_and_answered_as_gsm8k_has_it() -> None:
    render = {key: jinja2.Template(task()[key]).render for key in ("doc_to_text", "doc_to_target")}
    assert render["doc_to_text"](**ROWS[0]) == ROWS[0]["question"]
    assert [render["doc_to_target"](**row) for row in ROWS] == ["21", "1500"]
    assert task()["dataset_kwargs"]["data_files"] == {"test": "data/gsm8k/test.jsonl"}, "where the configurations look"


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("<reasoning>\n3 * 7 = 21\n</reasoning>\n<answer>\n21\n", "21", "21"),
        ("<answer>-1,500.5", "-1,500.5", "-1,500.5"),
        ("It is 21.", "[invalid]", "21"),
        ("<answer>about 21", "[invalid]", "21"),
        ("I do not know", "[invalid]", "[invalid]"),
    ],
)
def test_what_counts_as_an_answer(text: str, strict: str, flexible: str) -> None:
    """The text ends before what stops it, the closing tag."""
    assert task()["generation_kwargs"]["until"] == ["</answer>"]
    assert (extracted("strict", text), extracted("flexible", text)) == (strict, flexible)


def test_an_answer_of_the_engine_is_cut_where_the_task_says(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    asked: list[Asked] = []

    def answer(one: Asked) -> Turn:
        asked.append(one)
        return Turn({"role": "assistant", "content": "21"}, "21", "stop", False, [], [1], [2], [0.0])

    import openai

    endpoint = Endpoint(answer).start()
    client = openai.OpenAI(base_url=f"{endpoint.address}/v1", api_key=endpoint.key)
    messages: Any = [{"role": "user", "content": "3 * 7?"}]
    until = task()["generation_kwargs"]["until"]
    client.chat.completions.create(model="policy", messages=messages, stop=until, max_tokens=256, temperature=0, seed=1)
    endpoint.close()
    assert asked[0].stop == ("</answer>",) and asked[0].max_tokens == 256 and asked[0].temperature == 0


@pytest.mark.vllm
@pytest.mark.wide
@pytest.mark.skipif(not LM_EVAL.exists(), reason="lm-eval is not here: make lm-eval")
def test_lm_eval_asks_a_served_policy(tmp_path: Path) -> None:
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    save_small_chat_model(tmp_path / "model")
    with grpo.load(tmp_path / "model", load_in_4bit=False, dtype="float32", device="cpu", max_seq_length=600) as policy:
        policy.start()
        service = Service(policy)
        endpoint = Endpoint(service.answer).start()
        arguments = f"model=policy,base_url={endpoint.address}/v1/chat/completions,num_concurrent=2"
        command = [LM_EVAL, "--model", "local-chat-completions", "--apply_chat_template", "--include_path", TASK.parent,
                   "--model_args", arguments, "--tasks", "gsm8k_local", "--output_path", tmp_path / "out"]  # fmt: skip
        environment = os.environ | {"OPENAI_API_KEY": endpoint.key, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=lambda: (process.wait(), service.ending.set()), daemon=True).start()
        service.serve()
        endpoint.close()
    assert process.returncode == 0, process.stdout and process.stdout.read()
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["gsm8k_local"]
    assert found["exact_match,strict"] == found["exact_match,flexible"] == 0.0
