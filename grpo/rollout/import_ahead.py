"""A process that imports what a run will import, from the other end: python -m grpo.rollout.import_ahead

A run imports torch, transformers and peft, reads its weights, and then imports vLLM: thousands of files, which on a
machine that has never done so lie on a disk and have to be compiled. Meanwhile this reads vLLM's, so that they are in
memory and compiled when the run comes to them. What it imports is lost with it. No GPU is used.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from importlib import import_module

from grpo.rollout.vllm_environment import set_environment
from grpo.run import tied

MODULES = (
    "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu_worker", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine",
    "vllm.v1.engine.core", "vllm.v1.attention.backends.flash_attn", "vllm.model_executor.models.llama",
    "vllm.model_executor.model_loader", "grpo.rollout.engine",
)  # fmt: skip


SECONDS = 90
"""After so long it ends, wherever it is."""


def import_ahead() -> None:
    """Start such a process. It ends with this one, or by itself; Python ends it before."""
    process = tied.start("grpo.rollout.import_ahead", seconds=SECONDS)
    atexit.register(process.kill)
    threading.Thread(target=process.wait, daemon=True, name="import-ahead").start()  # no zombie is left meanwhile


def main() -> int:
    set_environment()
    for module in MODULES:
        try:
            import_module(module)
        except Exception:  # another version has it elsewhere; whoever needs it will say so
            continue
    sys.stdout.flush()
    os._exit(0)  # nothing here has to be taken down


if __name__ == "__main__":
    main()
