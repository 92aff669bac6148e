"""The OpenAI-compatible endpoint: what it answers, what it refuses, and programs that talk to it."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo.environments.command import Front
from grpo.environments.endpoint import CHAT, LARGEST_BODY, MODELS, TOKENS, Asked, Endpoint, Refused, chat_asked
from grpo.environments.pool import Asked as PoolAsked
from grpo.environments.pool import Ended, EnvironmentPool, Lost
from grpo.environments.program import EpisodeOver, Turn
from grpo.environments.tool_calls import assistant_message
from tests.helpers.paths import ROOT

AGENT = ROOT / "tests" / "helpers" / "agent_to_try.py"
HELLO = [{"role": "user", "content": "hello"}]
CALLED = 'So: <tool_call>{"name": "look", "arguments": {"at": "ä"}}</tool_call>'


def turn_of(text: str, tools: Any = None, finish_reason: str = "stop") -> Turn:
    message, malformed = assistant_message(text) if tools else ({"role": "assistant", "content": text}, [])
    return Turn(message, text, finish_reason, False, malformed, [1, 2, 3], [4, 5], [-0.5, -1.0])


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    def answer(asked: Asked) -> Turn:
        last = "" if asked.messages is None else asked.messages[-1]["content"]
        if last == "over":
            raise EpisodeOver("no room")
        return turn_of(CALLED if asked.tools else f"{last} {asked.max_tokens} {asked.prompt_ids}", asked.tools)

    made = Endpoint(answer).start()
    yield made
    made.close()


def ask(endpoint: Endpoint, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and body of a request, as JSON where it is that."""
    host, port = endpoint.address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    sent = {"Authorization": f"Bearer {endpoint.key}", **headers}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, sent)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, json.loads(text) if text.startswith("{") else text


def test_a_completion_has_its_tokens_and_logprobs(endpoint: Endpoint) -> None:
    status, found = ask(endpoint, CHAT, {"messages": HELLO, "max_tokens": 7, "logprobs": True})
    (choice,) = found["choices"]
    assert status == 200 and choice["message"]["content"] == "hello 7 None" and choice["finish_reason"] == "stop"
    assert found["prompt_token_ids"] == [1, 2, 3] and choice["token_ids"] == [4, 5]
    assert [one["logprob"] for one in choice["logprobs"]["content"]] == [-0.5, -1.0]
    assert found["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert ask(endpoint, MODELS)[1]["data"][0]["id"] == "policy"


def test_calls_are_written_as_openai_writes_them(endpoint: Endpoint) -> None:
    _, found = ask(endpoint, CHAT, {"messages": HELLO, "tools": [{"type": "function"}]})
    (call,) = found["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"at": "ä"}'} and call["id"]
    assert found["choices"][0]["finish_reason"] == "tool_calls"
    _, found = ask(endpoint, CHAT, {"messages": HELLO, "tools": [{"type": "function"}], "tool_choice": "none"})
    assert "tool_calls" not in found["choices"][0]["message"]


def test_a_stream_says_the_same(endpoint: Endpoint) -> None:
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}, "tools": [{}]}
    status, text = ask(endpoint, CHAT, body)
    *lines, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert status == 200 and done == "[DONE]" and chunks[-1]["usage"]["total_tokens"] == 5
    assert "".join(delta.get("content", "") for delta in deltas) == "So:"
    assert [delta["tool_calls"][0]["index"] for delta in deltas if "tool_calls" in delta] == [0]


def test_tokens_in_tokens_out(endpoint: Endpoint) -> None:
    status, found = ask(endpoint, TOKENS, {"token_ids": [9, 8], "sampling_params": {"max_tokens": 3}})
    assert status == 200 and found["choices"][0]["token_ids"] == [4, 5]
    assert [one["token"] for one in found["choices"][0]["logprobs"]["content"]] == ["token_id:4", "token_id:5"]


@pytest.mark.parametrize(
    ("path", "body", "status", "sentence"),
    [
        (CHAT, {"messages": HELLO, "n": 2}, 400, "n has to be 1"),
        (CHAT, {"messages": HELLO, "tool_choice": "required"}, 400, "no tool can be forced"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "no form can be forced"),
        (CHAT, {"messages": HELLO, "stop": [1]}, 400, "stop has to be a text"),
        (CHAT, {"messages": HELLO, "temperature": -1}, 400, "temperature = -1 is out of its range"),
        (CHAT, {"messages": HELLO, "max_tokens": True}, 400, "max_tokens = True is out of its range"),
        (CHAT, {"messages": []}, 400, "messages has to be a list of messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "an image has to be in the"),
        (CHAT, {"messages": [{"role": "user", "content": "over"}]}, 400, "the episode is over: no room"),
        (CHAT, b"{", 400, "not JSON"),
        (CHAT, b"[" * 200000, 400, "not JSON"),
        (TOKENS, {"token_ids": [1, -1]}, 400, "token_ids has to be"),
        (TOKENS, {"token_ids": [1], "features": {"x": 1}}, 400, "features"),
        ("/v1/embeddings", {}, 404, "there is no /v1/embeddings"),
        ("/v1/nothing", None, 404, "there is no /v1/nothing"),
    ],
)
def test_what_cannot_be_done_is_refused(endpoint: Endpoint, path: str, body: Any, status: int, sentence: str) -> None:
    found, answer = ask(endpoint, path, body)
    assert found == status and sentence in answer["error"]["message"]


def test_an_episode_takes_no_stop_from_a_request() -> None:
    """Turns of training are sampled as [rollout] says."""
    front = Front(cast("Any", None))
    for stop, refused in (("x", True), (["", ""], False)):
        asked = chat_asked({"messages": HELLO, "stop": stop})
        with pytest.raises(Refused if refused else AttributeError, match="write rollout.stop" if refused else "now"):
            front.answer(asked)


def test_strangers_are_not_answered(endpoint: Endpoint) -> None:
    assert ask(endpoint, CHAT, {"messages": HELLO}, Authorization="Bearer wrong")[0] == 401
    assert ask(endpoint, CHAT, {"messages": HELLO}, Authorization="")[0] == 401
    assert ask(endpoint, CHAT, {"messages": HELLO}, Host="evil.example:80")[0] == 403
    assert endpoint.server.server_address[0] == "127.0.0.1"


def test_long_and_broken_requests_end_and_others_go_on(endpoint: Endpoint) -> None:
    host, port = endpoint.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as hanging:
        hanging.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Le")
        with socket.create_connection((host, int(port))) as long:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1:1\r\nAuthorization: Bearer {endpoint.key}\r\n"
            long.sendall(f"{head}Content-Length: {LARGEST_BODY + 1}\r\n\r\n".encode())
            assert b" 413 " in long.recv(1000)
        assert ask(endpoint, CHAT, {"messages": HELLO})[0] == 200


def test_many_ask_at_once(endpoint: Endpoint) -> None:
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(endpoint, CHAT, {"messages": HELLO})[0])) for _ in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 40


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "tools", "n", "max_tokens", "temperature", "top_p", "seed", "stop",
                                        "response_format", "top_logprobs", "tool_choice"]), JSON))  # fmt: skip
def test_any_request_is_asked_or_refused(body: dict[str, Any]) -> None:
    try:
        asked = chat_asked({"messages": HELLO, **body})
    except Refused:
        return
    assert asked.messages and all(isinstance(message["content"], str) for message in asked.messages)


@pytest.fixture
def agents() -> Iterator[Callable[[str], EnvironmentPool]]:
    pools: list[EnvironmentPool] = []

    def opened(name: str) -> EnvironmentPool:
        limits = {"processes": 4, "timeout": 30.0, "memory_limit": 1 << 33}
        line = f"{sys.executable} -S {AGENT} {name}"
        pool = EnvironmentPool(
            "it",
            "command",
            line,
            {},
            python=None,
            on_output=lambda line: None,
            **limits,  # type: ignore[arg-type]
        )
        pools.append(pool)
        return pool

    yield opened
    for pool in pools:
        pool.close()


def played(pool: EnvironmentPool, *texts: str) -> tuple[list[PoolAsked], Any]:
    """What a command asked for, and its last word, where the policy says `texts`."""
    pool.start(0, {"prompt": HELLO}, seed=1)
    asked, waiting = [], list(texts)
    while True:
        while 0 not in pool.inbox:
            pool.collect(1.0)
        said = pool.inbox.pop(0)
        if not isinstance(said, PoolAsked):
            return asked, said
        asked.append(said)
        turn = turn_of(waiting.pop(0)) if waiting else None
        pool.tell(0, {"over": "no room"} if turn is None else {"said": vars(turn)})


def test_a_command_talks_to_the_policy(agents: Callable[[str], EnvironmentPool]) -> None:
    asked, said = played(agents("two_turns"), "abc", "12")
    assert [message["content"] for message in asked[1].messages] == ["hello", "abc", "Again."]
    assert said == Ended(3 / 20, False, {})


@pytest.mark.parametrize(
    ("name", "problem"),
    [("crashes", "ended its command with exit code 3"), ("says_nothing", "wrote no result: its last line")],
)
def test_a_command_that_fails_is_named(agents: Callable[[str], EnvironmentPool], name: str, problem: str) -> None:
    _, said = played(agents(name), "abc")
    assert isinstance(said, Lost) and said.problem.startswith(problem)


def test_a_command_that_gets_no_further_turn_has_ended(agents: Callable[[str], EnvironmentPool]) -> None:
    _, said = played(agents("two_turns"), "abc")
    assert said == Ended(None, False, {}, over="no room")


def test_a_command_can_ask_for_tokens(agents: Callable[[str], EnvironmentPool]) -> None:
    asked, said = played(agents("tokens"), "a", "b")
    assert asked[0].prompt_ids == [ord(character) for character in "Say it: "]
    assert asked[1].prompt_ids == [*asked[0].prompt_ids, 4, 5, ord(" ")] and isinstance(said, Ended)
