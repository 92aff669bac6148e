"""An OpenAI-compatible endpoint on the loopback address: chat completions, and tokens in, tokens out.

Only the standard library, so that it runs in an episode's process as well as in `grpo.serve`; who answers is a function
that it is given. It listens on 127.0.0.1 at a free port, wants a key that is compared in constant time, and limits the
size of a request and how many are answered at once. What it cannot do it refuses; nothing is left out in silence.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from grpo.environments.program import EpisodeOver, Turn
from grpo.messages import IMAGE_PARTS, held_image
from grpo.printable import printable
from grpo.references import described

LARGEST_BODY = 32 << 20
"""Bytes of a request."""
MOST_AT_ONCE = 256
PATIENCE = 60.0
"""Seconds in which a request has to arrive."""
CHAT, MODELS, TOKENS = "/v1/chat/completions", "/v1/models", "/inference/v1/generate"
UNUSED = (
    "frequency_penalty", "presence_penalty", "logit_bias", "functions", "function_call", "audio", "prediction",
)  # fmt: skip
"""Of a chat request: refused unless empty or zero."""


class Refused(Exception):
    """A request that is not answered; the message says why and what to do."""

    def __init__(self, message: str, status: int = 400, code: str = "invalid_request"):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Asked:
    """What a request asks for: a conversation or token ids, and how to sample where that is the client's to say."""

    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    prompt_ids: list[int] | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    seed: int | None
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are not part of it."""


class Endpoint:
    """The endpoint, from `start` until `close`. `answer` is called in a thread of each request's and may block.

    It may raise Refused, or EpisodeOver where nothing fits any more.
    """

    def __init__(self, answer: Callable[[Asked], Turn], model: str = "policy", port: int = 0, key: str | None = None):
        self.answer, self.model, self.key = answer, model, key or secrets.token_urlsafe(32)
        self.room = threading.BoundedSemaphore(MOST_AT_ONCE)
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.endpoint = self
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"

    def start(self) -> Endpoint:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        return self

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    endpoint: Endpoint


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = PATIENCE

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: a request's line is what a client wrote."""

    def do_GET(self) -> None:
        def respond() -> None:
            if self.route() != MODELS:
                raise Refused(f"there is no {printable(self.route())[:100]}", 404, "not_found")
            entry = {"id": self.server.endpoint.model, "object": "model", "created": 0, "owned_by": "grpo"}
            self.send_json(200, {"object": "list", "data": [entry]})

        self.guarded(respond)

    def do_POST(self) -> None:
        def respond() -> None:
            body = self.body()
            if self.route() == CHAT:
                self.chat(body)
            elif self.route() == TOKENS:
                self.send_json(200, tokens_response(self.ask(tokens_asked(body))))
            else:
                raise Refused(f"there is no {printable(self.route())[:100]}", 404, "not_found")

        self.guarded(respond)

    def route(self) -> str:
        return self.path.partition("?")[0].replace("/v1/v1/", "/v1/")

    def guarded(self, respond: Callable[[], None]) -> None:
        """Answer, or say why not, with the connection closed where the rest of a request was not read."""
        endpoint = self.server.endpoint
        try:
            self.admit()
            if not endpoint.room.acquire(timeout=PATIENCE):
                raise Refused(f"{MOST_AT_ONCE} requests are answered already; ask again later", 503, "overloaded")
            try:
                respond()
            finally:
                endpoint.room.release()
        except Refused as refusal:
            self.refuse(refusal)
        except EpisodeOver as over:
            self.refuse(Refused(f"the episode is over: {over}", 400, "context_length_exceeded"))
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # one request's failure is not the next one's
            self.refuse(Refused(f"this request failed: {described(error)}", 500, "failed"))

    def admit(self) -> None:
        """Raise Refused unless the request comes from this machine's own clients."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.endpoint.key.encode()):
            raise Refused("the key is missing or wrong; send it as 'Authorization: Bearer KEY'", 401, "invalid_api_key")
        if self.headers.get("Host", "").rpartition(":")[0] not in ("127.0.0.1", "localhost"):
            raise Refused("the Host header names another machine", 403, "wrong_host")

    def body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise Refused("a request needs a Content-Length", 411, "length_required")
        if int(length) > LARGEST_BODY:
            raise Refused(f"a request of {length} bytes; at most {LARGEST_BODY} are read", 413, "too_large")
        try:
            body = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise Refused("the body is not JSON") from None
        if not isinstance(body, dict):
            raise Refused("the body is no JSON object")
        return body

    def ask(self, asked: Asked) -> Turn:
        return self.server.endpoint.answer(asked)

    def chat(self, body: dict[str, Any]) -> None:
        asked = chat_asked(body)
        turn, model = self.ask(asked), self.server.endpoint.model
        if not body.get("stream"):
            self.send_json(200, chat_response(turn, model, logprobs=bool(body.get("logprobs"))))
            return
        options = body.get("stream_options")
        usage = isinstance(options, dict) and bool(options.get("include_usage"))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for chunk in chat_chunks(turn, model, usage=usage):
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    def refuse(self, refusal: Refused) -> None:
        self.close_connection = True
        kind = "invalid_request_error" if refusal.status < 500 else "server_error"
        error = {"message": str(refusal), "type": kind, "code": refusal.code, "param": None}
        try:
            self.send_json(refusal.status, {"error": error})
        except OSError:
            pass  # nobody listens

    def send_json(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)


# Requests


def chat_asked(body: Mapping[str, Any]) -> Asked:
    """A chat request. Raises Refused for what is none, or wants what is not done here."""
    for name in UNUSED:
        if body.get(name):
            raise Refused(f"{name} is not supported; leave it out")
    if body.get("n") not in (None, 1):
        raise Refused("n has to be 1; ask once for each completion")
    if body.get("tool_choice") not in (None, "auto", "none"):
        raise Refused('tool_choice has to be "auto" or "none": no tool can be forced')
    if (body.get("response_format") or {"type": "text"}) != {"type": "text"}:
        raise Refused("response_format has to be text: no form can be forced")
    if body.get("top_logprobs"):
        raise Refused("top_logprobs has to be 0: only sampled tokens have a logprob here")
    tools = body.get("tools") if body.get("tool_choice") != "none" else None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise Refused("tools has to be a list of objects")
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    sampling = sampling_of({**body, "max_tokens": limit})
    return Asked(
        chat_messages(body.get("messages")), tools or None, None, **sampling, stop=stop_texts(body.get("stop"))
    )


def stop_texts(value: Any) -> tuple[str, ...]:
    """The texts of a request's `stop`, one or a list; those of no letter are none. Raises Refused for anything else."""
    listed = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(listed, list) or not all(isinstance(text, str) for text in listed):
        raise Refused("stop has to be a text or a list of texts")
    return tuple(filter(None, listed))


def chat_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of a request, with blocks of text joined and images as parts with a data URI.

    Raises Refused for what is no conversation.
    """
    if not isinstance(value, list) or not value:
        raise Refused("messages has to be a list of messages")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(f"messages[{index}] is no message: it needs a role")
        role = "system" if message["role"] == "developer" else message["role"]
        messages.append({**message, "role": role, "content": content_of(message.get("content"), index)})
    return messages


def content_of(content: Any, index: int) -> str | list[dict[str, Any]]:
    """The content of a message: text, or its parts where it shows an image. Raises Refused for anything else."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise Refused(f"messages[{index}]: its content is neither text nor a list of parts")
    parts = [part_of(part, index) for part in content]
    return parts if any("image" in part for part in parts) else "".join(part["text"] for part in parts)


def part_of(part: dict[str, Any], index: int) -> dict[str, Any]:
    """A part of a message: text, or an image that the request holds itself. Raises Refused for anything else."""
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": str(part.get("text", ""))}
    if kind not in IMAGE_PARTS:
        raise Refused(f"messages[{index}] has a part of type {kind!r}; text and images are read")
    value = held_image(part)
    if not isinstance(value, str) or not value.startswith("data:"):
        raise Refused(
            f"messages[{index}]: an image has to be in the request, as a data URI (data:image/png;base64,...); nothing "
            "is downloaded, and no file is opened"
        )
    return {"type": "image", "image": value}


def tokens_asked(body: Mapping[str, Any]) -> Asked:
    """A request of token ids, in vLLM's form. Raises Refused for what is none."""
    ids = body.get("token_ids")
    if not isinstance(ids, list) or not ids or not all(type(one) is int and one >= 0 for one in ids):
        raise Refused("token_ids has to be a list of token ids")
    if body.get("stream"):
        raise Refused("tokens are not streamed; set stream to false")
    if body.get("features"):
        raise Refused("features (images, audio) are not supported; leave them out")
    params = body.get("sampling_params") or {}
    if not isinstance(params, dict):
        raise Refused("sampling_params has to be an object")
    if params.get("n") not in (None, 1):
        raise Refused("sampling_params.n has to be 1; ask once for each completion")
    return Asked(None, None, ids, **sampling_of(params))


def sampling_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """max_tokens, temperature, top_p and seed. Raises Refused for values out of their range."""
    checks = {
        "max_tokens": (int, lambda value: value > 0),
        "temperature": (float, lambda value: 0 <= value <= 2),
        "top_p": (float, lambda value: 0 < value <= 1),
        "seed": (int, lambda value: abs(value) < 2**63),
    }
    found: dict[str, Any] = {}
    for name, (kind, fits) in checks.items():
        value = params.get(name)
        right = type(value) is int or (kind is float and type(value) is float)
        if value is not None and not (right and fits(value)):
            raise Refused(f"{name} = {printable(str(value))[:50]} is out of its range")
        found[name] = value
    return found


# Responses


def chat_response(turn: Turn, model: str, *, logprobs: bool) -> dict[str, Any]:
    """A chat completion, with the token ids of prompt and completion, and with each one's logprob if that is wanted."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {**spoken(turn), "refusal": None},
        "finish_reason": finish_reason(turn),
        "logprobs": {"content": token_logprobs(turn), "refusal": None} if logprobs else None,
        "token_ids": turn.completion_ids,
    }
    return {
        **head(model, "chat.completion"),
        "choices": [choice],
        "usage": usage_of(turn),
        "prompt_token_ids": turn.prompt_ids,
    }


def chat_chunks(turn: Turn, model: str, *, usage: bool) -> Iterator[dict[str, Any]]:
    """The same as a stream's chunks: the turn is sampled as a whole, so its text is in one of them."""
    first = head(model, "chat.completion.chunk")

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {**first, "choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]}

    message = spoken(turn)
    yield chunk({"role": "assistant", "content": ""})
    if message["content"]:
        yield chunk({"content": message["content"]})
    if calls := message.get("tool_calls"):
        yield chunk({"tool_calls": [{"index": index, **call} for index, call in enumerate(calls)]})
    yield chunk({}, finish_reason(turn))
    if usage:
        yield {**first, "choices": [], "usage": usage_of(turn)}


def spoken(turn: Turn) -> dict[str, Any]:
    """The assistant's message in OpenAI's form: arguments of calls as text."""
    message: dict[str, Any] = {"role": "assistant", "content": turn.message.get("content") or ""}
    if calls := turn.message.get("tool_calls"):
        message["tool_calls"] = [
            {
                "id": call.get("id") or f"call{index}",
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for index, call in enumerate(calls)
        ]
    return message


def tokens_response(turn: Turn) -> dict[str, Any]:
    """Token ids with their logprobs, as vLLM's route has them."""
    choice = {
        "index": 0,
        "token_ids": turn.completion_ids,
        "logprobs": {"content": token_logprobs(turn)},
        "finish_reason": turn.finish_reason,
    }
    return {"request_id": secrets.token_hex(8), "choices": [choice], "usage": usage_of(turn), "prompt_logprobs": None}


def head(model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{secrets.token_hex(8)}", "object": kind, "created": int(time.time()), "model": model}


def finish_reason(turn: Turn) -> str:
    if turn.finish_reason == "length":
        return "length"
    return "tool_calls" if turn.message.get("tool_calls") else "stop"


def usage_of(turn: Turn) -> dict[str, int]:
    asked, said = len(turn.prompt_ids), len(turn.completion_ids)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def token_logprobs(turn: Turn) -> list[dict[str, Any]]:
    """A logprob for each token, which is named by its id, as vLLM can do it."""
    pairs = zip(turn.completion_ids, turn.logprobs, strict=True)
    return [{"token": f"token_id:{one}", "logprob": value, "bytes": None, "top_logprobs": []} for one, value in pairs]
