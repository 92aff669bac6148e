"""`python -m grpo.serve`: what it answers to programs that know OpenAI's interface. The model is tiny and random."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

import grpo
from grpo.environments.endpoint import Endpoint
from grpo.serve import Service, main
from tests.helpers.small_chat import save_small_chat_model

pytestmark = pytest.mark.vllm

HELLO = [{"role": "user", "content": "Say it."}]


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("serve") / "model"
    save_small_chat_model(folder)
    with grpo.load(folder, load_in_4bit=False, dtype="float32", device="cpu", max_seq_length=400) as found:
        yield found


def answered(policy: Any, *bodies: dict[str, Any]) -> list[Any]:
    """The answers to requests that are sent at once; a refusal as its sentence."""
    service = Service(policy)
    endpoint = Endpoint(service.answer).start()

    def post(body: dict[str, Any]) -> Any:
        path = "/inference/v1/generate" if "token_ids" in body else "/v1/chat/completions"
        headers = {"Authorization": f"Bearer {endpoint.key}"}
        try:
            request = urllib.request.Request(f"{endpoint.address}{path}", json.dumps(body).encode(), headers)
            return json.loads(urllib.request.urlopen(request, timeout=60).read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())["error"]["message"]

    with ThreadPoolExecutor(len(bodies)) as threads:
        futures: list[Future[Any]] = [threads.submit(post, body) for body in bodies]
        threading.Thread(target=lambda: [f.exception() for f in futures] and service.ending.set()).start()
        service.serve()
    endpoint.close()
    return [future.result() for future in futures]


def test_answers_are_the_policys(policy: Any) -> None:
    wanted = policy.generate(HELLO, temperature=0.0, max_tokens=12)
    greedy = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
    warm = {"messages": HELLO, "temperature": 2.0, "max_tokens": 12, "seed": 5}
    first, second, third, fourth = answered(policy, greedy, warm, warm, {**greedy, "max_tokens": 4})
    assert first["choices"][0]["message"]["content"] == wanted
    assert second["choices"][0]["token_ids"] == third["choices"][0]["token_ids"]
    assert fourth["choices"][0]["token_ids"] == first["choices"][0]["token_ids"][:4]
    assert fourth["choices"][0]["finish_reason"] == "length"


def test_an_answer_ends_before_a_text_that_stops_it(policy: Any) -> None:
    wanted = policy.generate(HELLO, temperature=0.0, max_tokens=12)
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 12}
    stop = wanted[5:7]
    cut, early, other = answered(
        policy,
        {**asked, "stop": ["not in it", stop]},
        {**asked, "stop": wanted[0]},
        {**asked, "stop": ["not in it", ""]},
    )
    choice = cut["choices"][0]
    assert choice["message"]["content"] == wanted[: wanted.index(stop)] and choice["finish_reason"] == "stop"
    assert policy.session.decode(choice["token_ids"]).endswith(stop)
    assert early["choices"][0]["message"]["content"] == ""
    assert other["choices"][0]["message"]["content"] == wanted
    (refused,) = answered(policy, {**asked, "stop": [1]})
    assert refused == "stop has to be a text or a list of texts"


def test_tokens_go_on_from_tokens(policy: Any) -> None:
    (chat,) = answered(policy, {"messages": HELLO, "temperature": 0, "max_tokens": 10})
    ids = chat["prompt_token_ids"] + chat["choices"][0]["token_ids"][:5]
    (rest,) = answered(policy, {"token_ids": ids, "sampling_params": {"temperature": 0, "max_tokens": 5}})
    assert rest["choices"][0]["token_ids"] == chat["choices"][0]["token_ids"][5:]


def test_what_the_model_cannot_be_asked_is_refused(policy: Any) -> None:
    found = answered(
        policy,
        {"messages": [{"role": "user", "content": "x" * 500}]},
        {"token_ids": [10**6]},
        {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "look"}}]},
    )
    assert "leave no room for an answer: a conversation may have 400" in found[0]
    assert found[1] == "token 1000000 is not the model's"
    assert "does not go with tools: it does not show which tools there are" in found[2]


def test_a_port_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nowhere", "--port", "70000"]) == 2
    assert "--port 70000: a port is a number from 0 to 65535" in capsys.readouterr().err
