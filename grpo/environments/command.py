"""Any program that talks to an OpenAI-compatible endpoint, as an environment: each episode runs it once.

It finds OPENAI_BASE_URL, OPENAI_API_KEY and OPENAI_MODEL in its environment, and the row in the JSON file that GRPO_ROW
names. Its calls become the episode's turns. The last line that it writes to its standard output is the result: a
number, null, or an object as a Python program returns it; what it wrote before is shown.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo.environments.endpoint import Asked, Endpoint, Refused
from grpo.environments.program import BadResult, EpisodeOver, Program, Sampling, Turn
from grpo.errors import UserError

MOST_OUTPUT = 1 << 20
"""Characters of standard output that are kept."""


def command(reference: str, options: dict[str, Any], setup: Mapping[str, Any]) -> Program:
    """`[environment] command`: a command line, without a shell; `options` become GRPO_OPTIONS, as JSON."""
    try:
        words = shlex.split(reference)
    except ValueError as error:
        raise UserError(f"environment.command = {reference!r}: {error}; mend its quotes") from None
    if not words or shutil.which(words[0]) is None:
        raise UserError(f"environment.command: there is no program {words[0] if words else ''!r}; name one on the path")

    def run(row: Mapping[str, Any], sample: Sampling, start: Mapping[str, Any]) -> Any:
        front = Front(sample)
        endpoint = Endpoint(front.answer).start()
        with tempfile.TemporaryDirectory(prefix="grpo-episode-") as folder:
            (Path(folder) / "row.json").write_text(json.dumps(dict(row)))
            environment = {
                **os.environ,
                "OPENAI_BASE_URL": f"{endpoint.address}/v1",
                "OPENAI_API_KEY": endpoint.key,
                "OPENAI_MODEL": endpoint.model,
                "GRPO_ROW": str(Path(folder) / "row.json"),
                "GRPO_OPTIONS": json.dumps(options),
                "GRPO_SEED": str(start["seed"]),
            }
            code, output = ran(words, environment)
        endpoint.close()
        if front.over is not None and code:
            raise front.over
        if code:
            raise BadResult(f"ended its command with exit code {code}")
        return result_of(output)

    return Program(run, {"rewards": True})


def ran(words: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """The exit code and the end of the standard output of a command; all but its last line is shown as it comes."""
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        last = ""
        while line := process.stdout.readline(MOST_OUTPUT):
            if last.strip():
                print(last, end="" if last.endswith("\n") else "\n")
            last = line if line.strip() else last
    return process.returncode, last


def result_of(output: str) -> Any:
    """The result that a command's last line is. Raises BadResult for none."""
    try:
        return json.loads(output)
    except (ValueError, RecursionError):
        raise BadResult("wrote no result: its last line of output has to be a number, null or a JSON object") from None


class Front:
    """Answers an endpoint's requests with an episode's turns, one at a time."""

    def __init__(self, sample: Sampling):
        self.sample, self.lock = sample, threading.Lock()
        self.over: EpisodeOver | None = None
        self.warned_of: set[str] = set()

    def answer(self, asked: Asked) -> Turn:
        if asked.stop:
            raise Refused("stop is not taken from a request in training; write rollout.stop")
        self.warn_of_settings(asked)
        with self.lock:
            if self.over is not None:
                raise self.over
            try:
                return self.sample.now(asked.messages or [], asked.tools, asked.max_tokens, prompt_ids=asked.prompt_ids)
            except EpisodeOver as over:
                self.over = over
                raise
            except OSError as error:
                raise Refused(f"the episode has ended: {error}", 503, "ended") from None

    def warn_of_settings(self, asked: Asked) -> None:
        """Say once of each setting of a request that [rollout] decides instead."""
        for name in ("temperature", "top_p", "seed"):
            if getattr(asked, name) is not None and name not in self.warned_of:
                self.warned_of.add(name)
                print(f"a request's {name} is not used: turns are sampled as [rollout] says", file=sys.stderr)
