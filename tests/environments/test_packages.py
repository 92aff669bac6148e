"""Environments of other people's packages, unchanged: verifiers, SkyRL-gym, GEM, ART, and whole runs.

They want packages that do not go together with vLLM's, so they have interpreters of their own: `make
environment-packages` makes them, and GRPO_ENVIRONMENT_PYTHON, GRPO_ART_PYTHON and GRPO_VERIFIERS_1_PYTHON name others.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from grpo.environments.pool import Asked, Ended, EnvironmentPool, Said, Scored
from grpo.environments.tool_calls import assistant_message
from grpo.train import main
from tests.helpers.paths import ROOT
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import read_metrics, run_tables, write_config


def interpreter(variable: str, folder: str) -> Path:
    return Path(os.environ.get(variable, ROOT / "build" / folder / "bin" / "python"))


PYTHON = interpreter("GRPO_ENVIRONMENT_PYTHON", "environment-packages")
ART = interpreter("GRPO_ART_PYTHON", "environment-packages-art")
VERIFIERS_1 = interpreter("GRPO_VERIFIERS_1_PYTHON", "environment-packages-verifiers-1")
VERIFIERS = str(ROOT / "tests" / "helpers" / "verifiers_to_try.py")
ART_AGENT = f"{ART} {ROOT / 'tests' / 'helpers' / 'art_agent.py'}"
VERIFIERS_1_AGENT = f"{VERIFIERS_1} {ROOT / 'tests' / 'helpers' / 'verifiers_1_agent.py'}"
GUESS = "game:GuessTheNumber-v0-easy"

INSTALLED = "needs the packages that make environment-packages installs"
pytestmark = [pytest.mark.wide, pytest.mark.skipif(not PYTHON.exists(), reason=INSTALLED)]


def opened(way: str, reference: str, **options: Any) -> EnvironmentPool:
    limits = {"processes": 4, "timeout": 60.0, "memory_limit": 1 << 34, "max_turns": 3, "questions": (4, 2)}
    return EnvironmentPool(
        way,
        way,
        reference,
        options,
        python=str(PYTHON),
        on_output=lambda line: None,
        **limits,  # type: ignore[arg-type]
    )


def played(pool: EnvironmentPool, row: dict[str, Any], *texts: str, number: int = 0) -> tuple[list[Asked], Said]:
    """What an episode asked for and its last word, where the policy says `texts`."""
    pool.start(number, row, seed=1)
    asked = []
    for text in texts:
        said = word(pool, number)
        if not isinstance(said, Asked):
            return asked, said
        asked.append(said)
        message, malformed = assistant_message(text, tools=said.tools)
        for place, call in enumerate(message.get("tool_calls", ())):
            call["id"] = f"call{place}"
        turn = {"message": message, "text": text, "finish_reason": "stop", "last": False, "malformed": malformed}
        pool.tell(number, {"said": turn | {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0]}})
    return asked, word(pool, number)


def word(pool: EnvironmentPool, number: int) -> Said:
    while number not in pool.inbox:
        pool.collect(1.0)
    return pool.inbox.pop(number)


def test_skyrl_gyms_questions_of_several_turns() -> None:
    with opened("skyrl_gym", "gsm8k_multi_turn") as pool:
        row = {"prompt": [{"role": "user", "content": "3 + 4?"}], "answer": "7"}
        asked, said = played(pool, row, "hm", "#### 8", "#### 7")
    assert [message["role"] for message in asked[-1].messages] == ["user", "assistant"] * 2 + ["user"]
    assert isinstance(said, Ended) and said.success and said.metrics == {"steps": 3.0}
    assert said.turn_rewards == [0.0, pytest.approx(0.2 / 3), 1.0] and said.reward == pytest.approx(1 + 0.2 / 3)


def test_gems_games_by_their_seeds() -> None:
    with opened("gem", GUESS) as pool:
        rows, held_out = pool.facts["questions"]
        assert [row["seed"] for row in held_out + rows] == list(range(6))
        asked, said = played(pool, rows[0], *(f"\\boxed{{{number}}}" for number in range(1, 11)))
        assert asked[0].messages == rows[0]["prompt"] and isinstance(said, Ended)
        assert said.turn_rewards is not None and len(said.turn_rewards) == len(asked)


@pytest.mark.parametrize(("kind", "call", "answer"), [("tools", "add", "3"), ("stateful", "count", "x 1")])
def test_tools_of_verifiers(kind: str, call: str, answer: str) -> None:
    arguments = '{"a": 1, "b": 2}' if call == "add" else '{"word": "x"}'
    with opened("verifiers", VERIFIERS, kind=kind) as pool:
        row = pool.facts["questions"][0][1]
        text = f'<tool_call>{{"name": "{call}", "arguments": {arguments}}}</tool_call>'
        asked, said = played(pool, row, text, "It is 3.")
    assert asked[0].tools is not None and asked[0].tools[0]["function"]["name"] == call
    assert asked[1].messages[-1]["role"] == "tool" and asked[1].messages[-1]["content"] == answer
    assert isinstance(said, Ended) and said.reward == 1.0 and said.success and said.metrics["num_turns"] == 2.0


def test_a_rubric_of_groups_scores_them_together() -> None:
    with opened("verifiers", VERIFIERS, kind="group") as pool:
        row = pool.facts["questions"][0][0]
        ends = [played(pool, row, "a", "b", "c" * (1 + number), number=number)[1] for number in range(3)]
        pool.score(-1, [end.state for end in ends])  # type: ignore[misc, union-attr]
        scored = word(pool, -1)
    assert isinstance(scored, Scored) and [one.reward for one in scored.results] == [0.0, 0.0, 1.0]


def test_the_openai_client_with_tools_and_streams() -> None:
    with opened("command", f"{PYTHON} {ROOT / 'tests' / 'helpers' / 'openai_agent.py'}") as pool:
        row = {"prompt": [{"role": "user", "content": "What is there?"}]}
        call = '<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
        asked, said = played(pool, row, call, "A cat.")
    assert [message["role"] for message in asked[1].messages] == ["user", "assistant", "tool"]
    assert asked[1].messages[-1]["content"] == 'seen {"at": 1}' and isinstance(said, Ended)
    assert said.reward == len("A cat.") and said.metrics == {"used": 2.0}


@pytest.mark.skipif(not ART.exists(), reason=INSTALLED)
def test_a_rollout_of_art(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks the network for prices otherwise
    with opened("command", ART_AGENT) as pool:
        row = {"prompt": [{"role": "user", "content": "What is there?"}]}
        call = '<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>'
        asked, said = played(pool, row, call, "A cat.")
    assert [message["role"] for message in asked[1].messages] == ["user", "assistant", "tool"]
    assert isinstance(said, Ended) and said.reward == len("A cat.") and said.metrics == {"turns": 2.0}


@pytest.mark.skipif(not VERIFIERS_1.exists(), reason=INSTALLED)
def test_a_taskset_and_a_harness_of_verifiers_1() -> None:
    with opened("command", VERIFIERS_1_AGENT) as pool:
        row = {"prompt": [{"role": "user", "content": "What is 2 + 3?"}], "answer": "5"}
        asked, said = played(pool, row, "It is 5.", "Yes, 5.")
    assert [message["role"] for message in asked[1].messages] == ["user", "assistant", "user"]
    assert said == Ended(1.0, True, {"branches": 1.0})


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("kind", "reference", "options", "task"),
    [
        ("gem", GUESS, {}, "environment"),
        ("verifiers", VERIFIERS, {"kind": "again"}, "environment"),
        ("verifiers", VERIFIERS, {"kind": "group"}, "environment"),
        ("skyrl_gym", "gsm8k_multi_turn", {}, "arithmetic"),
    ],
)
def test_runs(tmp_path: Path, kind: str, reference: str, options: dict[str, Any], task: str) -> None:
    save_small_chat_model(tmp_path / "model")
    settings = {kind: reference, "options": options, "python": str(PYTHON), "max_turn_tokens": 8, "max_turns": 3}
    tables = run_tables(
        tmp_path,
        environment=settings | {"latency_steps": 2},
        rollout={"max_completion_length": 700, "max_prompt_length": 800},
        task={"name": task, "options": {"rows": 4, "held_out": 2}},
        train={"max_steps": 2},
        eval={"every": 2},
    )
    del tables["rewards"]
    assert main([str(write_config(tmp_path / "run.toml", tables))]) == 0
    metrics = read_metrics(tmp_path / "run")
    assert all(entry["environment/turns"] >= 1 and entry["environment/lost"] == 0 for entry in metrics)
    assert all((entry.get("mismatch_logp_max") or 0.0) < 1e-4 for entry in metrics)
