"""What other libraries write while they start: silenced, unless it is an error or `--verbose` asks for it."""

from __future__ import annotations

import logging
import os
import sys
import warnings

LIBRARIES = (
    "vllm",
    "transformers",
    "datasets",
    "huggingface_hub",
    "peft",
    "accelerate",
    "bitsandbytes",
    "torch",
    "gguf",
    "tqdm",
)


def quiet_libraries(verbose: bool) -> None:
    """Silence what vLLM, transformers and libraries like them write, errors excepted; with `verbose`, change nothing.

    Call it before they are imported: most read these variables then. A variable that the user has set stays.
    """
    if verbose:
        return
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    for name in LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=rf"{name}(\.|$)")
