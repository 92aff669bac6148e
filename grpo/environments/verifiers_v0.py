"""Environments of verifiers 0.1 to 0.3, unchanged: the policy answers in place of their client."""

from __future__ import annotations

import base64
import copyreg
import io
import json
import pickle
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from grpo.environments.program import EpisodeOver, Program, Questions, Sampling, Turn, check_options, package
from grpo.references import resolve

INPUT = ("prompt", "example_id", "answer", "info", "task")
"""What a row of theirs holds."""


def verifiers(reference: str, options: dict[str, Any], setup: Mapping[str, Any]) -> Program:
    """`[environment] verifiers`: a file or module with `load_environment`, as their environments' packages have it.

    The task "environment" takes its questions from the environment's own data set. A rubric with functions of a whole
    group scores the episodes of a group together, once all have ended.
    """
    package("verifiers", "verifiers==0.3.1")
    client = client_class()
    environment = loaded(reference, options)
    rubric = environment.rubric
    together = bool(environment.requires_group_rollouts)

    async def run(row: Mapping[str, Any], sample: Sampling, start: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: row[name] for name in INPUT if row.get(name) is not None}
        given.setdefault("example_id", 0)
        state = await environment.rollout(given, client(sample), "policy", {})
        if state.get("error") is not None:
            raise state["error"]
        if together:
            return {"reward": None, "state": frozen(state)}
        await rubric.score_rollout(state)
        await rubric.cleanup(state)
        return result(state)

    async def score_group(states: Sequence[str]) -> list[dict[str, Any]]:
        thawed = [pickle.loads(base64.b64decode(state)) for state in states]
        await rubric.score_group(thawed)
        return [result(state) for state in thawed]

    def result(state: Any) -> dict[str, Any]:
        found = state.get("metrics") or {}
        metrics = {name: value for name, value in found.items() if isinstance(value, int | float)}
        reward = state.get("reward")
        success = reward is not None and reward >= environment.pass_threshold
        return {"reward": reward, "success": success, "metrics": metrics}

    def questions(rows: int, held_out: int) -> Questions:
        environment.build_eval_dataset()
        apart = [] if environment.eval_dataset is None else rows_of(environment.eval_dataset)
        return rows_of(environment.get_dataset())[:rows], apart[:held_out]

    return Program(run, {"rewards": True}, questions, score_group if together else None)


def loaded(reference: str, options: dict[str, Any]) -> Any:
    """The environment that `reference` names. Raises UserError where there is none."""
    place = reference if reference.endswith(".py") else reference.replace("-", "_")
    load = resolve(f"{place}:load_environment", "environment", {})
    check_options(load, reference, options, ())
    return load(**options)


def rows_of(dataset: Any) -> list[dict[str, Any]]:
    """The rows of a data set of theirs, as a task has them."""
    rows = []
    for entry in dataset:
        row = {name: entry[name] for name in INPUT if entry.get(name) is not None}
        try:
            row["info"] = json.loads(row["info"]) if isinstance(row.get("info"), str) else row.get("info")
        except ValueError:
            pass
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def frozen(state: Any) -> str:
    """`state` for the process that scores its group. Raises TypeError naming what cannot leave this one."""
    kept = type(state)({name: value for name, value in state.items() if name != "client"})
    file = io.BytesIO()
    pickler = pickle.Pickler(file)
    pickler.dispatch_table = {**copyreg.dispatch_table, MappingProxyType: lambda view: (dict, (dict(view),))}
    try:
        pickler.dump(kept)
        return base64.b64encode(file.getvalue()).decode()
    except Exception as error:
        raise TypeError(f"a rubric of groups needs states that can be pickled: {error}") from None


def client_class() -> Any:
    """A client of theirs whose model is `sample`; made here, as it inherits from their package."""
    from verifiers.legacy.clients.openai_chat_completions_client import OpenAIChatCompletionsClient
    from verifiers.legacy.errors import OverlongPromptError

    class PolicyClient(OpenAIChatCompletionsClient):
        def __init__(self, sample: Sampling):
            super().__init__(None)
            self.sample = sample

        def setup_client(self, config: Any) -> None:
            return None

        async def get_native_response(
            self, prompt: Any, model: str, sampling_args: Any, tools: Any = None, **named: Any
        ) -> Turn:
            plain = [{key: value for key, value in dict(message).items() if value is not None} for message in prompt]
            limit = sampling_args.get("max_tokens") or sampling_args.get("max_completion_tokens")
            try:
                return await self.sample(plain, [dict(tool) for tool in tools] if tools else None, limit)
            except EpisodeOver as over:
                raise OverlongPromptError from over

        async def raise_from_native_response(self, response: Turn) -> None:
            return None

        async def from_native_response(self, response: Turn) -> Any:
            return response_of(response)

        async def close(self) -> None:
            return None

    return PolicyClient


def response_of(turn: Turn) -> Any:
    """`turn` as their response, with its tokens."""
    from verifiers.legacy.types import Response, ResponseMessage, ResponseTokens, ToolCall, Usage

    asked, said = len(turn.prompt_ids), len(turn.completion_ids)
    calls = [
        ToolCall(id=call["id"], name=call["function"]["name"], arguments=json.dumps(call["function"]["arguments"]))
        for call in turn.message.get("tool_calls", ())
    ]
    cut = turn.finish_reason == "length"
    message = ResponseMessage(
        content=turn.message["content"],
        finish_reason="length" if cut else "tool_calls" if calls else "stop",
        is_truncated=cut,
        tool_calls=calls or None,
        tokens=ResponseTokens(
            prompt_ids=turn.prompt_ids,
            prompt_mask=[0] * asked,
            completion_ids=turn.completion_ids,
            completion_mask=[1] * said,
            completion_logprobs=turn.logprobs,
        ),
    )
    usage = Usage(prompt_tokens=asked, reasoning_tokens=0, completion_tokens=said, total_tokens=asked + said)
    return Response(id="", created=0, model="policy", usage=usage, message=message)
