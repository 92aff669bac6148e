"""`python -m grpo.generate`: one prompt, a chat, two columns; what it loads, and what it says when it cannot.

One tiny random model is opened through the command line, and serves all tests that look at the talking.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from grpo.config.schema import parse_config
from grpo.errors import UserError
from grpo.generate import Talk, main, opened, parser, spoken, typed
from tests.helpers.tiny_run import run_tables, save_tiny_chat_model, write_config

MAX_TOKENS = ("--max-tokens", "6")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in `model`, a run with an adapter that changes every answer in `run`, without having trained."""
    from grpo.session import open_session

    folder = tmp_path_factory.mktemp("generate")
    save_tiny_chat_model(folder / "model")
    write_config(folder / "run.toml", run_tables(folder))
    config = parse_config(run_tables(folder))
    (folder / "run").mkdir()
    (folder / "run.toml").rename(folder / "run/config.toml")
    with open_session(config, start_engine=False) as session:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in session.policy.adapter_layers().values():
                weight = layer.lora_B["default"].weight
                weight.copy_(torch.randn(weight.shape, generator=generator))
        session.policy.save_adapter(folder / "run/adapter")
    return folder


@pytest.fixture(scope="module")
def policy(home: Path) -> Iterator[Any]:
    with opened(parser().parse_args([str(home / "run")])) as policy:
        yield policy


Ask = Callable[..., str]


@pytest.fixture
def ask(policy: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ask:
    """What `grpo.generate` prints for arguments after the target, on the shared model."""

    class Borrowed:
        def __enter__(self) -> Any:
            return policy

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr("grpo.generate.opened", lambda parsed: Borrowed())

    def run(*arguments: str, typed: str | None = None, terminal: bool = False) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed or ""))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
        if terminal:
            lines = iter((typed or "").splitlines())
            monkeypatch.setattr("builtins.input", lambda prompt: next_or_end(lines))
        assert main(["target", *MAX_TOKENS, *arguments]) == 0
        return capsys.readouterr().out

    return run


def next_or_end(lines: Iterator[str]) -> str:
    try:
        return next(lines)
    except StopIteration:
        raise EOFError from None


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


# Answers


@pytest.mark.vllm
def test_a_prompt_goes_through_the_chat_template_and_the_answer_alone_is_printed(ask: Ask, policy: Any) -> None:
    answer = policy.generate([user("hello")], max_tokens=6)
    assert ask("hello") == answer + "\n"
    system = [{"role": "system", "content": "Be brief."}, user("hello")]
    assert ask("hello", "--system", "Be brief.") == policy.generate(system, max_tokens=6) + "\n"
    assert ask("hello", "--raw") == policy.generate("hello", max_tokens=6) + "\n"
    assert len({ask("hello"), ask("hello", "--system", "Be brief."), ask("hello", "--raw")}) == 3


@pytest.mark.vllm
def test_a_prompt_is_read_from_a_pipe(ask: Ask) -> None:
    assert ask(typed="hello") == ask("hello")


@pytest.mark.vllm
def test_a_seed_repeats_a_sampled_answer(ask: Ask) -> None:
    sampled = [ask("hello", "--temperature", "1", "--seed", seed) for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.vllm
def test_both_answers_follow_one_another_in_a_pipe(ask: Ask, policy: Any) -> None:
    with_adapter, alone = (policy.generate([user("hello")], max_tokens=6, adapter=on) for on in (True, False))
    assert with_adapter != alone
    assert ask("hello", "--compare-base") == f"--- with adapter\n{with_adapter}\n--- model alone\n{alone}\n"


@pytest.mark.vllm
def test_both_answers_stand_side_by_side_on_a_terminal(policy: Any) -> None:
    talk = Talk(policy, parser().parse_args(["target", "hello", "--compare-base", *MAX_TOKENS]))
    screen = io.StringIO()
    talk.console = Console(file=screen, force_terminal=True, width=200, _environ={})
    talk.run()
    last = screen.getvalue()[-1500:]
    heads = [line for line in last.splitlines() if "with adapter" in line]
    assert heads and "model alone" in heads[-1], "one line has both heads"
    rows = [
        line for line in last.splitlines() if talk.policy.generate([user("hello")], max_tokens=6).strip()[:5] in line
    ]
    base = talk.policy.generate([user("hello")], max_tokens=6, adapter=False).strip()[:5]
    assert any(base in row for row in rows)


# Chats


@pytest.mark.vllm
def test_a_chat_remembers_what_was_said_until_it_starts_over(ask: Ask, policy: Any) -> None:
    first = policy.generate([user("one")], max_tokens=6)
    turns = [user("one"), {"role": "assistant", "content": first}, user("two")]
    second, afresh = policy.generate(turns, max_tokens=6), policy.generate([user("two")], max_tokens=6)
    assert second != afresh
    assert ask(typed="one\n\ntwo\n/new\ntwo\n", terminal=True) == f"{first}\n{second}\n{afresh}\n\n"


@pytest.mark.vllm
def test_a_chat_goes_on_after_what_was_too_long(ask: Ask, policy: Any) -> None:
    out = ask(typed=f"{'word ' * 2000}\none\n", terminal=True)
    assert out == policy.generate([user("one")], max_tokens=6) + "\n\n"


@pytest.mark.vllm
def test_interrupting_an_answer_ends_it_and_not_the_chat(
    ask: Ask, policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = policy.generate([user("two")], max_tokens=6)
    sample = policy.generate

    def interrupted(asked: Any, **settings: Any) -> Iterator[str]:
        if asked[-1]["content"] == "one":
            yield "halfway"
            raise KeyboardInterrupt
        yield from sample(asked, **settings)

    monkeypatch.setattr(policy, "generate", interrupted)
    assert ask(typed="one\ntwo\n", terminal=True) == f"halfway\n{answer}\n\n"


def test_lines_are_typed_until_the_end_of_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["a", " ", "b"])
    monkeypatch.setattr("builtins.input", lambda prompt: next_or_end(lines))
    assert list(typed()) == ["a", "b"]


# What is not trusted


@pytest.mark.vllm
@pytest.mark.parametrize("arguments", [(), ("--compare-base",)])
def test_what_a_terminal_would_act_upon_is_shown_as_escapes(
    ask: Ask, policy: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    evil = ["\x1b", "[2J[bold]red[/bold]\x07", "\u202e", "\r"]
    monkeypatch.setattr(policy, "generate", lambda asked, **settings: iter(evil))
    out = ask("hello", *arguments)
    assert "\\x1b[2J[bold]red[/bold]\\x07\\u202e\\r\n" in out
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(out)
    talk = Talk(policy, parser().parse_args(["target", "hello", "--compare-base"]))
    screen = io.StringIO()
    talk.console = Console(file=screen, force_terminal=True, width=200, _environ={})
    talk.run()
    assert "\\x1b[2J[bold]red[/bold]\\x07" in screen.getvalue() and "\x1b[2J" not in screen.getvalue()


# Targets


@pytest.mark.vllm
def test_an_episode_answers_with_what_the_environment_said(policy: Any, tmp_path: Path) -> None:
    from grpo.api.episodes import episodes_of
    from grpo.config.schema import Environment

    (tmp_path / "echo.py").write_text(
        "async def play(row, sample):\n"
        "    first = await sample(row['prompt'], max_tokens=4)\n"
        "    await sample([*row['prompt'], first.message, {'role': 'user', 'content': 'And?'}], max_tokens=4)\n"
    )
    environment = Environment(program=f"{tmp_path / 'echo.py'}:play", latency_steps=1)
    with episodes_of(policy, environment, temperature=0.0, max_tokens=60, seed=1) as play:
        said = play([user("hello")])
        again = play([*said, user("more")])
    assert [message["role"] for message in said] == ["user", "assistant", "user", "assistant"]
    assert said[1]["content"] == policy.generate([user("hello")], max_tokens=4) and said[2]["content"] == "And?"
    assert again[:4] == said and len(again) == 8


@pytest.mark.vllm
def test_a_lone_adapter_with_a_moved_base_is_answered_like_its_run(
    home: Path, tmp_path: Path, policy: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "run/adapter").rename(tmp_path / "lone")
    saved = tmp_path / "lone/adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | {"base_model_name_or_path": "./gone/model"}))
    expected = policy.generate([user("hello")], max_tokens=6)
    arguments = [str(tmp_path / "lone"), "hello", *MAX_TOKENS]
    try:
        assert main(arguments) == 2
        assert "its base has moved" in capsys.readouterr().err
        held = ("model.load_in_4bit=false", "model.dtype=float32", "model.device=cpu")
        sets = [argument for key in held for argument in ("--set", key)]
        assert main([*arguments, "--base", str(home / "model"), *sets]) == 0
    finally:
        (tmp_path / "lone").rename(home / "run/adapter")
    printed = capsys.readouterr()
    assert printed.out == expected + "\n"
    assert printed.err.splitlines() == [f"reading {home / 'model'}", "starting vLLM"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["./no/model", "hello"], "no such file or folder"),
        (["model", "hello", "--compare-base"], "has no adapter, so there is nothing to compare"),
        (["model", "hello", "--base", "elsewhere"], "neither an adapter nor a run"),
        (["model", "hello", "--raw", "--system", "Be brief."], "keep one of them"),
        (["model", "hello", "--temperature", "5"], "temperature = 5.0: must be from 0 to 2"),
        (["model", "hello", "--max-tokens", "0"], "max_tokens = 0: must be at least 1"),
        (["model", "hello", "--set", "rollout.top=3"], "--set rollout.top=3: unknown key 'rollout.top'"),
        (["empty", "hello"], "the run has no adapter and no checkpoint yet"),
        (["model", "hello", "--set", "model.chat_template=none.jinja"], "none.jinja"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_two(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    monkeypatch.chdir(home)
    (home / "empty").mkdir(exist_ok=True)
    (home / "empty/config.toml").write_text('[model]\nname = "model"\n')
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and expected in printed.err
    assert printed.err.splitlines()[-1].startswith("grpo.generate: ")


def test_a_model_without_chat_template_asks_for_raw(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = home / "bare"
    bare.mkdir()
    for file in (home / "model").iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).symlink_to(file)
    values = json.loads((home / "model/tokenizer_config.json").read_text())
    values.pop("chat_template", None)
    (bare / "tokenizer_config.json").unlink()
    (bare / "tokenizer_config.json").write_text(json.dumps(values))
    assert main([str(bare), "hello", "--set", "model.load_in_4bit=false"]) == 2
    assert "the model has no chat template; add --raw" in capsys.readouterr().err


def test_an_adapter_that_this_project_cannot_serve_is_refused_by_its_key(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_dora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(UserError, match="use_dora = true: DoRA scales the base's weights"):
        opened(parser().parse_args([str(tmp_path), "--base", str(tmp_path)]))


# In an environment


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--environment", "--raw"], "--environment and --raw: an episode is a chat with the adapter"),
        (["--environment"], "there is no run with an [environment]; leave --environment out"),
    ],
)
def test_an_environment_that_is_not_there_is_told(
    home: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main([str(home / "run"), "hello", *options]) == 2
    assert sentence in capsys.readouterr().err


def test_calls_and_roles_are_shown() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    assert (
        spoken({"role": "assistant", "content": "So", "tool_calls": [call]})
        == 'So\n{"name": "add", "arguments": {"a": 1}}'
    )
    assert spoken({"role": "tool", "content": "3"}) == "[tool] 3"
