"""Environment variables by which vLLM is set up: what is set, and what has to be.

vLLM reads most of them when it starts and some when it is imported, so `set_environment` is called before either, and
nowhere at import. A variable that the user has set stays.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

from grpo.errors import UserError

IN_THIS_PROCESS = "VLLM_ENABLE_V1_MULTIPROCESSING"
VARIABLES = {
    IN_THIS_PROCESS: "0",  # the storage is shared by address
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_DISABLE_SHARED_EXPERTS_STREAM": "1",  # our products share a workspace, so one stream at a time
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_PLUGINS": "",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


PROMPT_GRAPHS = "VLLM_USE_BREAKABLE_CUDAGRAPH"
"""Makes graphs of steps that read prompts possible (prompt_graphs.py). Read when vLLM's attention is imported."""


def set_environment(environment: MutableMapping[str, str] = os.environ, *, prompt_graphs: bool = False) -> None:
    """Set what the user has not; PROMPT_GRAPHS if it is wanted and not too late.

    Raises UserError for a variable with which weights cannot be shared.
    """
    for name, value in VARIABLES.items():
        environment.setdefault(name, value)
    if prompt_graphs and "vllm" not in sys.modules:
        environment.setdefault(PROMPT_GRAPHS, "1")
    if environment[IN_THIS_PROCESS] != "0":
        raise UserError(
            f"{IN_THIS_PROCESS} = {environment[IN_THIS_PROCESS]!r}: vLLM samples in this process, where the weights "
            "are; unset it"
        )
