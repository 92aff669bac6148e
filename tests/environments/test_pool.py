"""Environments in their processes, without a model: what they say, and what becomes of those that misbehave."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo.environments.fork_server import descendants
from grpo.environments.pool import Asked, Ended, EnvironmentPool, Lost, Said
from grpo.environments.program import BadResult, checked
from grpo.environments.schemas import tool_schema
from grpo.environments.tool_calls import assistant_message, read_calls
from grpo.errors import UserError
from tests.helpers.paths import ROOT

FILE = ROOT / "tests" / "helpers" / "environments_to_try.py"
ROW = {"prompt": [{"role": "user", "content": "Say it."}], "answer": "42"}


@pytest.fixture
def opened() -> Iterator[Callable[..., EnvironmentPool]]:
    """Opens pools, and sees to it that their ends leave no process."""
    pools: list[EnvironmentPool] = []
    before = set(descendants(os.getpid()))

    def make(name: Any, kind: str = "program", timeout: float = 20.0, **options: Any) -> EnvironmentPool:
        named = [f"{FILE}:{each}" for each in name] if isinstance(name, list) else f"{FILE}:{name}"
        named = name if isinstance(name, dict) else named
        limits = {"processes": 4, "timeout": timeout, "memory_limit": 1 << 33}
        pool = EnvironmentPool(
            "it",
            kind,
            named,
            options,
            python=None,
            on_output=lambda line: None,
            **limits,  # type: ignore[arg-type]
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()
    assert set(descendants(os.getpid())) <= before


def word_of(pool: EnvironmentPool, number: int) -> Said:
    """What an episode says next."""
    give_up = time.monotonic() + 30
    while number not in pool.inbox:
        pool.collect(0.2)
        assert time.monotonic() < give_up
    return pool.inbox.pop(number)


def turn(text: str, last: bool = False) -> dict[str, Any]:
    """A turn of the policy's, as the player hands it over."""
    message, malformed = assistant_message(text)
    ids: dict[str, Any] = {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0]}
    return {
        "said": {"message": message, "text": text, "finish_reason": "stop", "last": last, "malformed": malformed, **ids}
    }


def play(pool: EnvironmentPool, *texts: str, number: int = 0) -> Said:
    """The last word of an episode in which the policy says `texts`."""
    pool.start(number, ROW, seed=3)
    for text in texts:
        said = word_of(pool, number)
        if not isinstance(said, Asked):
            return said
        pool.tell(number, turn(text))
    return word_of(pool, number)


def test_a_program_talks_in_turns_and_returns_its_reward(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened("letters")
    pool.start(0, ROW, seed=3)
    first = word_of(pool, 0)
    assert first == Asked(ROW["prompt"], None, None)  # type: ignore[arg-type]
    pool.tell(0, turn("ab12"))
    second = word_of(pool, 0)
    assert isinstance(second, Asked)
    assert [message["content"] for message in second.messages[1:]] == ["ab12", "4 characters. Again."]
    pool.tell(0, turn("cd"))
    assert isinstance(word_of(pool, 0), Asked)
    pool.tell(0, turn("1"))
    assert word_of(pool, 0) == Ended(4 / 7, False, {})


def test_episodes_work_at_once_and_keep_apart(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened("letters", turns=1)
    for number in range(12):
        pool.start(number, ROW, seed=number)
    for number in range(12):
        assert isinstance(word_of(pool, number), Asked)
        pool.tell(number, turn("a" * number + "1"))
    assert [word_of(pool, n) for n in range(12)] == [Ended(n / (n + 1), False, {}) for n in range(12)]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("raises", "raised ValueError: no such luck at "),
        ("hangs", "did not answer within its timeout of 1 s"),
        ("exits", "ended its process with exit code 7"),
        ("killed", "was killed (SIGKILL)"),
        ("kills_its_parent", "was ended with the process that all episodes come from"),
        ("eats_memory", "raised MemoryError at "),
        ("garbage", "sent a message of "),
        ("no_number", "returned a str as its reward; return a number or None"),
        ("infinite", "returned inf as its reward; return a finite number or None"),
    ],
)
def test_a_program_that_misbehaves_is_lost_and_named(
    opened: Callable[..., EnvironmentPool], name: str, problem: str
) -> None:
    pool = opened(name, timeout=1.0)
    said = play(pool, "hello")
    assert isinstance(said, Lost) and said.problem.startswith(problem), said
    pool.sweep()
    assert isinstance(play(pool, "hello", number=1), Lost), "the pool serves on"


def test_prepared_processes_play_and_a_dead_one_is_passed_over(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened("forks")
    pool.prepare(3)
    assert play(pool, "hello") == Ended(1.0, True, {})
    pool.sweep()
    assert descendants(pool._process.pid) == [], "those that wait are ended too"
    pool.prepare(2)
    wait_for(lambda: len(descendants(pool._process.pid)) == 2)
    first = min(descendants(pool._process.pid))
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: first not in descendants(pool._process.pid))
    pool.collect(0.2)
    assert play(pool, "hello", number=1) == Ended(1.0, True, {})
    assert play(pool, "hello", number=2) == Ended(1.0, True, {})


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_what_an_episode_leaves_behind_is_ended(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened("forks")
    assert play(pool, "hello") == Ended(1.0, True, {})
    pool.sweep()
    assert descendants(pool._process.pid) == []


def test_many_bad_episodes_leak_nothing(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened("exits")
    play(pool, "hello")
    pool.sweep()
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        for number in range(4):
            pool.start(number, ROW, seed=number)
        for number in range(4):
            word_of(pool, number)
            pool.tell(number, turn("x"))
        for number in range(4):
            assert isinstance(word_of(pool, number), Lost)
        pool.sweep()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert len(os.listdir(f"/proc/{pool._process.pid}/fd")) < 12


@pytest.mark.parametrize(("name", "texts"), [("impatient", ["first"]), ("gives_up", ["first", "second"])])
def test_turns_come_one_at_a_time_and_to_who_asked(
    opened: Callable[..., EnvironmentPool], name: str, texts: list[str]
) -> None:
    pool = opened(name)
    pool.start(0, ROW, seed=1)
    for text in texts:
        assert isinstance(word_of(pool, 0), Asked)
        time.sleep(0.3)
        pool.tell(0, turn(text))
    assert word_of(pool, 0) == Ended(1.0, True, {})


@pytest.mark.parametrize("how", ["gives up", "forgets", "raises"])
def test_a_program_that_ends_before_it_is_answered_has_its_say(
    opened: Callable[..., EnvironmentPool], how: str
) -> None:
    pool = opened("ends_unanswered", how=how)
    pool.start(0, ROW, seed=1)
    assert isinstance(word_of(pool, 0), Asked)
    time.sleep(0.3)
    pool.collect(0)
    assert not pool.inbox, "the policy speaks"
    pool.tell(0, turn("unheard"))
    said = word_of(pool, 0)
    assert (
        isinstance(said, Lost) and "no patience" in said.problem if how == "raises" else said == Ended(0.25, False, {})
    )


HOSTILE = {
    "raises": "raised ValueError",
    "exits": "ended its process with exit code 7",
    "killed": "was killed (SIGKILL)",
    "garbage": "sent a message of ",
    "no_number": "returned a str",
    "eats_memory": "raised MemoryError",
    "late": "did not answer within its timeout of 2 s",
    "hangs": "did not answer within its timeout of 2 s",
}
"""Programs of `environments_to_try`, and what is said of them; the others end well."""


def hostile_steps(pool: EnvironmentPool, steps: int) -> None:
    """Play `steps` times one episode of every kind."""
    kinds = [*HOSTILE, "forks", "forks_a_bomb", "prints"]
    for _ in range(steps):
        for number, how in enumerate(kinds):
            pool.start(number, {**ROW, "how": how}, seed=number)
        told: dict[int, Said] = {}
        while len(told) < len(kinds):
            pool.collect(0.2)
            for number in list(pool.inbox):
                said = pool.inbox.pop(number)
                if isinstance(said, Asked):
                    pool.tell(number, turn("x"))
                else:
                    told[number] = said
        for number, how in enumerate(kinds):
            said = told[number]
            wanted = HOSTILE.get(how)
            assert said == Ended(1.0, True, {}) if wanted is None else isinstance(said, Lost), (how, said)
            assert wanted is None or said.problem.startswith(wanted), (how, said)  # type: ignore[union-attr]
        pool.sweep()


@pytest.mark.parametrize("steps", [1, pytest.param(200, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_hostile_programs_leave_nothing(opened: Callable[..., EnvironmentPool], steps: int) -> None:
    pool = opened("mixed", timeout=2.0)
    hostile_steps(pool, 1)
    server = psutil.Process(pool._process.pid)
    before = held(server)
    hostile_steps(pool, steps)
    assert descendants(server.pid) == []
    after = held(server)
    assert after[:2] == before[:2]
    assert all(now - then < 16 << 20 for now, then in zip(after[2:], before[2:], strict=True))


def held(server: psutil.Process) -> list[int]:
    """Descriptors of this process and the fork server, and the memory of both."""
    gc.collect()  # what other tests left
    ours = psutil.Process()
    return [ours.num_fds(), server.num_fds(), ours.memory_info().rss, server.memory_info().rss]


def test_a_trl_environment_has_its_methods_as_tools(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened("Counter", kind="factory")
    assert [tool["function"]["name"] for tool in pool.facts["tools"]] == ["add"] and pool.facts["rewards"]
    pool.start(0, ROW, seed=1)
    asked = word_of(pool, 0)
    assert isinstance(asked, Asked) and asked.messages[-1]["content"] == "Say it. Count."
    call = '<tool_call>{"name": "add", "arguments": {"amount": %d}}</tool_call>'
    pool.tell(0, turn(call % 2 + call % 3))
    asked = word_of(pool, 0)
    assert isinstance(asked, Asked)
    assert [message["content"] for message in asked.messages if message["role"] == "tool"] == ["total 2", "total 5"]
    pool.tell(0, turn("done"))
    counts = {"calls": 2.0, "call_errors": 0.0, "malformed_calls": 0.0}
    assert word_of(pool, 0) == Ended(5.0, True, counts)


def test_a_row_names_one_of_several_trl_environments(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened({"count": f"{FILE}:Counter", "echo": f"{FILE}:Echo"}, kind="factory")
    assert pool.facts["rewards"] and [tool["function"]["name"] for tool in pool.facts["tools"]] == ["add", "echo"]
    for number, (name, tool) in enumerate({"count": "add", "echo": "echo"}.items()):
        pool.start(number, {**ROW, "environment": name}, seed=1)
        asked = word_of(pool, number)
        assert isinstance(asked, Asked) and asked.tools is not None
        assert [one["function"]["name"] for one in asked.tools] == [tool]
    pool.start(2, {**ROW, "environment": "chess"}, seed=1)
    said = word_of(pool, 2)
    assert isinstance(said, Lost) and "environment is 'chess'; it is one of count, echo" in said.problem


def test_tools_answer_what_they_raise_and_unknown_ones_are_named(opened: Callable[..., EnvironmentPool]) -> None:
    pool = opened(["add", "slowly"], kind="tools")
    pool.start(0, ROW, seed=1)
    word_of(pool, 0)
    pool.tell(
        0,
        turn(
            '<tool_call>{"name": "add", "arguments": {"a": 91, "b": 1}}</tool_call>'
            '<tool_call>{"name": "sub", "arguments": {}}</tool_call><tool_call>{"name": </tool_call>'
            '<tool_call>{"name": "slowly", "arguments": {"word": "late"}}</tool_call>'
        ),
    )
    asked = word_of(pool, 0)
    assert isinstance(asked, Asked)
    assert [message["content"] for message in asked.messages if message["role"] == "tool"] == [
        "{'error': 'a is too large'}",
        "{'error': 'Tool sub not found.'}",
        "late",
        "{'error': 'this call cannot be read: Expecting value: line 1 column 10 (char 9)'}",
    ]
    pool.tell(0, turn("done"))
    assert word_of(pool, 0) == Ended(None, False, {"calls": 3.0, "call_errors": 2.0, "malformed_calls": 1.0})


TOLD = {
    "raises": "{'error': 'no such luck'}",
    "raises a group": "{'error': 'both (2 sub-exceptions)'}",
    "recurses": "{'error': 'maximum recursion depth exceeded",
    "forks": "left",
    "a megabyte": "many words many",
    "bytes": "b'\\xff\\xfe'",
    "half a character": "?",
    "control characters": "\x1b[31m",
    "nothing": "None",
    "endless numbers": "nan",
    "unprintable": "{'error': 'no text for me'}",
}
"""What a tool's way of going wrong is told to the model as."""
ENDS = {
    "asks to exit": "raised SystemExit: 3",
    "interrupts": "raised KeyboardInterrupt",
    "cancels": "raised CancelledError",
    "exits": "ended its process with exit code 7",
    "is killed": "was killed (SIGKILL)",
    "hangs": "did not answer within its timeout of 3 s",
    "stops": "did not answer within its timeout of 3 s",
    "late": "did not answer within its timeout of 3 s",
    "closes": "ended its process with exit code 1",
    "too much": ("sent a message of", "did not answer"),
}
"""And what an episode is lost for."""
TOOLS = str(ROOT / "tests" / "helpers" / "tools_to_try.py")


@pytest.mark.parametrize("tool", ["leaves", "leaves_async"])
def test_tools_that_go_wrong_are_told_of_or_end_their_episode_and_leave_nothing(tool: str) -> None:
    limits = {"processes": 32, "timeout": 3.0, "memory_limit": 1 << 33}
    with EnvironmentPool("tools", "tools", [f"{TOOLS}:{tool}"], {}, python=None, on_output=str, **limits) as pool:
        for number in range(len(TOLD) + len(ENDS)):
            pool.start(number, ROW, seed=number)
        found: dict[str, Said] = {}
        for number, how in enumerate((*TOLD, *ENDS)):
            word_of(pool, number)
            pool.tell(number, turn(f'<tool_call>{{"name": "{tool}", "arguments": {{"how": "{how}"}}}}</tool_call>'))
        for number, how in enumerate((*TOLD, *ENDS)):
            found[how] = word_of(pool, number)
        for how, text in TOLD.items():
            asked = found[how]
            assert isinstance(asked, Asked) and str(asked.messages[-1]["content"]).startswith(text), (how, asked)
        for how, problem in ENDS.items():
            lost = found[how]
            assert isinstance(lost, Lost) and lost.problem.startswith(problem), (how, lost)
        pool.sweep()
        assert descendants(pool._process.pid) == []


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("nothing", "has no 'nothing'"),
        ("FILE", "is a str; name a function"),
        ("add", "cannot be called with row, sample and its options"),
    ],
)
def test_an_environment_that_cannot_be_loaded_is_refused(
    opened: Callable[..., EnvironmentPool], reference: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        opened("__file__" if reference == "FILE" else reference, **({"c": 1} if reference == "add" else {}))


def test_an_interpreter_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"/nowhere/python cannot be started .*mend environment.python"):
        EnvironmentPool(
            "it", "program", "x.py:f", {}, python="/nowhere/python", processes=1, timeout=1.0, memory_limit=1 << 33,
            on_output=print,
        )  # fmt: skip


def test_another_interpreter_needs_nothing_of_the_trainers(tmp_path: Path) -> None:
    """-S and -I leave out every package that is installed, and what the trainer has on its path."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    python.chmod(0o755)
    (tmp_path / "game.py").write_text(
        "import sys\n"
        "async def play(row, sample):\n"
        "    await sample(row['prompt'])\n"
        "    return float(not {'torch', 'vllm', 'transformers', 'pydantic', 'numpy'} & set(sys.modules))\n"
    )
    reference, limits = f"{tmp_path / 'game.py'}:play", {"processes": 1, "timeout": 20.0, "memory_limit": 1 << 33}
    with EnvironmentPool(
        "it",
        "program",
        reference,
        {},
        python=str(python),
        on_output=print,
        **limits,  # type: ignore[arg-type]
    ) as pool:
        assert isinstance(said := play(pool, "hello"), Ended) and said.reward == 1.0


@pytest.mark.parametrize("way", ["verifiers", "skyrl_gym", "gem"])
def test_a_package_that_is_not_installed_is_named(opened: Callable[..., EnvironmentPool], way: str) -> None:
    with pytest.raises(UserError, match=r"is not installed for .*python.* set environment.python to an interpreter"):
        opened("nothing", kind=way)


@pytest.mark.parametrize(
    ("result", "wanted"),
    [
        (2, (2.0, True, None)),
        (None, (None, False, None)),
        ({"turn_rewards": [0.5, None, 1]}, (1.5, True, [0.5, 0.0, 1.0])),
        ({"reward": 3, "turn_rewards": [0.5], "success": False}, (3.0, False, [0.5])),
    ],
)
def test_results_in_their_full_form(result: Any, wanted: tuple[Any, ...]) -> None:
    found = checked(result)
    assert (found["reward"], found["success"], found["turn_rewards"]) == wanted


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ({"rewards": 1}, "the key 'rewards'; it may have reward, success, metrics, turn_rewards"),
        ({"turn_rewards": 1}, "returned a int as its turn_rewards"),
        ({"turn_rewards": [float("nan")]}, "returned nan as its turn reward"),
    ],
)
def test_a_result_that_is_none_is_named(result: Any, sentence: str) -> None:
    with pytest.raises(BadResult, match=sentence):
        checked(result)


def test_schemas_are_those_of_transformers() -> None:
    from transformers.utils import get_json_schema

    from tests.helpers.schema_functions import FUNCTIONS

    for function in FUNCTIONS:
        assert tool_schema(function) == get_json_schema(function), function.__name__


def test_each_call_is_read_on_its_own() -> None:
    good = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    calls, malformed = read_calls(good + "<tool_call>{oops</tool_call>" + good)
    assert calls == [{"name": "add", "arguments": {"a": 1}}] * 2 and len(malformed) == 1
    assert read_calls(good[:-12])[0] == calls[:1], "cut before its end"
    assert read_calls(f"<think>{good}</think>no") == ([], []), "a thought is not called"
    assert read_calls('<tool_call>{"name": "add", "arguments": "x"}</tool_call>')[0] == []
    assert read_calls('<tool_call>{"name": "add", "arguments": null}</tool_call>')[0] == [
        {"name": "add", "arguments": {}}
    ]
