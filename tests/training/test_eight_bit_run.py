"""Runs on an 8-bit base, from a 16-bit checkpoint and from an FP8 one: GRPO, resumed to the same bits, SFT, answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from grpo.evaluate import main as evaluate
from grpo.export.build import export
from grpo.generate import main as generate
from grpo.sft.__main__ import main as sft
from grpo.train import main
from tests.helpers.checkpoints import quantize_folder_8bit
from tests.helpers.same_run import differences
from tests.helpers.small_chat import TOKENS, save_byte_tokenizer
from tests.helpers.tiny import save_tiny
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, write_config

pytestmark = [pytest.mark.wide, pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module", params=[None, "qwen"], ids=["int8", "fp8"])
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that was resumed for one more, beside its model."""
    folder = tmp_path_factory.mktemp("eight_bit")
    save_tiny(folder / "model", "qwen3", vocab_size=len(TOKENS), max_position_embeddings=2048)
    if request.param:
        quantize_folder_8bit(folder / "model", request.param)
    save_byte_tokenizer(folder / "model")
    save_rewards(folder)
    model = {"load_in_8bit": True}
    tables = run_tables(folder, model=model, train={"max_steps": 3}, checkpoint={"save_steps": 2})
    del tables["model"]["load_in_4bit"]
    file = str(write_config(folder / "run.toml", tables))
    assert main([file, "--set", "train.max_steps=2"]) == 0
    shutil.copytree(folder / "run", folder / "begun")
    assert main([file, "--resume", str(folder / "run")]) == 0
    assert main([file, "--set", f"checkpoint.output_dir={folder / 'straight'}"]) == 0
    return folder


def test_it_is_trained_and_resumed_to_the_same_bits(home: Path) -> None:
    steps = read_metrics(home / "run")
    assert [step["step"] for step in steps] == [1, 2, 3]
    trained = [step["mismatch_kl"] for step in steps if step["mismatch_kl"] is not None]
    assert trained and max(trained) < 1e-6
    # Samples of its last step are kept where a run ends, and here one ended after two steps.
    assert set(differences(home / "run", home / "straight")) <= {"step-2.jsonl differs"}


def test_it_is_not_resumed_in_another_form(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(home / "run.toml")
    for change in ("model.load_in_8bit=false", "model.load_in_4bit=true"):
        others = [] if "8bit" in change else ["--set", "model.load_in_8bit=false"]
        assert main([file, "--resume", str(home / "begun"), "--set", change, *others]) == 2
        assert "model.load_in_" in capsys.readouterr().err


def test_a_merged_model_has_the_values_of_the_codes_and_the_adapter(home: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = export(home / "run", "merged-16bit", home / "merged", notice=lambda sentence: None)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_the_run_generates_and_is_evaluated(home: Path) -> None:
    assert generate([str(home / "run"), "1 + 1", "--max-tokens", "4"]) == 0
    assert evaluate([str(home / "run"), "--set", "eval.limit=4"]) == 0
    (entry,) = [json.loads(line) for line in (home / "run" / "eval.jsonl").read_text().splitlines()]
    assert 0 <= entry["eval/strict_accuracy"] <= 1


def test_a_supervised_run_on_it_learns_and_starts_grpo(home: Path) -> None:
    rows = [{"prompt": f"{n} + 1?", "completion": f"{n + 1}"} for n in range(8)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables = run_tables(home, model={"load_in_8bit": True})
    del tables["model"]["load_in_4bit"]
    supervised = {
        **{section: tables[section] for section in ("model", "lora")},
        "sft": {"path": str(home / "rows.jsonl"), "max_length": 64, "per_device_train_batch_size": 2, "chat": False},
        "train": {"learning_rate": 1e-2, "max_steps": 6},
        "checkpoint": {"output_dir": str(home / "sft")},
    }
    assert sft([str(write_config(home / "sft.toml", supervised))]) == 0
    losses = [step["loss"] for step in read_metrics(home / "sft")]
    assert losses[-1] < losses[0] - 0.1
    tables |= {"lora": {**tables["lora"], "init": str(home / "sft" / "adapter")}, "loss": {"beta": 0.1}}
    tables |= {"train": {"max_steps": 1}, "checkpoint": {"output_dir": str(home / "warm")}}
    assert main([str(write_config(home / "warm.toml", tables))]) == 0
    (step,) = read_metrics(home / "warm")
    assert step["kl"] < 1e-6 and step["mismatch_kl"] < 1e-6, "both graphs begin at the supervised adapter"
