"""Families beyond the first eight are trained: two steps over a 4-bit base, resumed, and exported as the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from grpo.config.schema import parse_config
from grpo.export.build import export
from grpo.session import read_model
from grpo.train import main
from tests.helpers.families import NEWCOMERS, WITH_IMAGES, save_family, save_mxfp4, save_with_images
from tests.helpers.small_chat import TOKENS, save_byte_tokenizer
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, write_config

QUICK = ("gemma3",)
MXFP4 = "gpt_oss in MXFP4"


def trained(folder: Path, family: str) -> Path:
    """A run of two steps, then resumed for one more."""
    sizes = {"vocab_size": len(TOKENS), "max_position_embeddings": 2048}
    if family == MXFP4:
        save_mxfp4(folder / "model", **sizes)
    else:
        (save_with_images if family in WITH_IMAGES else save_family)(folder / "model", family, **sizes)
    save_byte_tokenizer(folder / "model")
    save_rewards(folder)
    tables = run_tables(
        folder,
        model={"load_in_4bit": True},
        lora={"target_modules": targets(folder)},
        train={"max_steps": 3},
        checkpoint={"save_steps": 2},
    )
    file = str(write_config(folder / "run.toml", tables))
    assert main([file, "--set", "train.max_steps=2"]) == 0
    assert main([file, "--resume", str(folder / "run")]) == 0
    return folder / "run"


def targets(folder: Path) -> list[str]:
    """Every linear layer of the model."""
    from grpo.model.layout import Layout

    config = parse_config({"model": {"name": str(folder / "model")}, "task": {"name": "arithmetic"}})
    source = read_model(config, notice=lambda sentence: None).source
    linears = Layout.of(source.config).linears.values()
    return sorted({part.rpartition(".")[2] for linear in linears for part in linear.parts})


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [pytest.param(n, marks=() if n in QUICK else pytest.mark.wide) for n in [*NEWCOMERS, MXFP4, *WITH_IMAGES]]
)
def test_a_family_is_trained_resumed_and_exported(family: str, tmp_path: Path) -> None:
    run = trained(tmp_path, family)
    steps = read_metrics(run)
    assert [step["step"] for step in steps] == [1, 2, 3]
    trained_on = [step for step in steps if step["mismatch_kl"] is not None]  # the others' groups had equal rewards
    assert len(trained_on) >= 2 and all(step["grad_norm"] > 0 for step in trained_on)
    assert max(step["mismatch_kl"] for step in trained_on) < 1e-6
    folder = export(run, "merged-16bit", tmp_path / "merged", notice=lambda sentence: None)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [type(model).__name__]
