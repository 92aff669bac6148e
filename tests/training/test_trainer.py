"""Whole runs: resuming gives the same bits, the shipped GSM8K configuration trains, bad input ends in a sentence.

The model is tiny and random (`tiny_run.py`), vLLM is real. Tests that do not test its start share one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from grpo.config.schema import parse_config, read_config
from grpo.train import main
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, save_tiny_chat_model, write_config

pytestmark = pytest.mark.vllm

PROMISED = {
    "step", "reward", "reward_std", "rewards/score", "rewards/length", "loss", "grad_norm", "kl", "entropy",
    "mismatch_kl", "completion_length", "clipped_ratio", "frac_reward_zero_std", "tokens_per_second",
    "rollout_seconds", "train_seconds", "step_seconds", "peak_memory_gib",
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model in `model` and reward functions in `scores.py`."""
    folder = tmp_path_factory.mktemp("trainer")
    save_tiny_chat_model(folder / "model")
    save_rewards(folder)
    return folder


def start(home: Path, name: str, *arguments: str, **changes: Any) -> int:
    """`grpo.train` in this process on the tiny model, in run folder `name`. Returns the exit code."""
    tables = run_tables(home, **changes)
    tables["checkpoint"]["output_dir"] = str(home / name)
    return main([str(write_config(home / f"{name}.toml", tables)), *arguments])


def start_alone(home: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, with the configuration that `name` was started with."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "grpo.train", str(home / f"{name}.toml"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """A finished run of six steps."""
    assert start(home, "straight") == 0
    return home / "straight"


@pytest.fixture(scope="module")
def resumed(home: Path) -> Path:
    """The same six steps, the last three in another process and on a base that has moved."""
    assert start(home, "resumed", "--set", "train.max_steps=3") == 0
    assert [entry["step"] for entry in read_metrics(home / "resumed")] == [1, 2, 3]
    shutil.copytree(home / "model", home / "moved")
    done = start_alone(home, "resumed", "--resume", "--base", str(home / "moved"))
    assert done.returncode == 0, done.stderr
    assert read_config(home / "resumed" / "config.toml").model.name == str(home / "moved")
    return home / "resumed"


@pytest.mark.slow
def test_three_steps_and_three_resumed_give_the_adapter_of_six_bit_for_bit(straight: Path, resumed: Path) -> None:
    expected = load_file(straight / "adapter" / "adapter_model.safetensors")
    found = load_file(resumed / "adapter" / "adapter_model.safetensors")
    assert expected.keys() == found.keys() and expected
    differing = [name for name, tensor in expected.items() if not tensor.equal(found[name])]
    assert not differing
    third = load_file(resumed / "checkpoints" / "step-3" / "adapter" / "adapter_model.safetensors")
    assert any(not tensor.equal(third[name]) for name, tensor in expected.items()), "the resumed steps did nothing"


def test_a_resumed_run_logs_the_metrics_of_a_straight_one(straight: Path, resumed: Path) -> None:
    def lasting(entry: dict[str, Any]) -> dict[str, Any]:
        varying = ("seconds", "per_second", "memory_gib")
        return {name: value for name, value in entry.items() if not name.endswith(varying)}

    expected, found = read_metrics(straight), read_metrics(resumed)
    assert [entry["step"] for entry in expected] == [1, 2, 3, 4, 5, 6]
    assert [lasting(entry) for entry in found] == [lasting(entry) for entry in expected]
    assert len({entry["reward"] for entry in expected}) > 3, "all steps alike prove nothing"


def test_a_run_leaves_what_the_readme_promises(straight: Path) -> None:
    assert {entry.name for entry in straight.iterdir()} >= {
        "config.toml", "metrics.jsonl", "completions", "checkpoints", "adapter", "summary.json",
    }  # fmt: skip
    assert sorted(entry.name for entry in (straight / "checkpoints").iterdir()) == ["step-3", "step-6"]
    assert read_metrics(straight)[0].keys() >= PROMISED - {"kl"}, "kl needs the reference, and so beta > 0"
    summary = json.loads((straight / "summary.json").read_text())
    assert Path(summary["adapter"]) == straight / "adapter"


def test_the_base_model_of_the_saved_adapter_is_named(straight: Path, home: Path) -> None:
    saved = json.loads((straight / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(home / "model")


def test_resuming_with_another_rank_or_model_is_refused(straight: Path, home: Path, capsys: Any) -> None:
    before = sorted(straight.rglob("*"))
    assert start(home, "straight", "--resume", lora={"r": 8}) == 2
    assert "lora.r = 8 does not fit the run" in sentence(capsys)
    assert start(home, "straight", "--resume", model={"name": "someone/else"}) == 2
    assert "model.name = 'someone/else': not a local path" in sentence(capsys)
    assert start(home, "straight", "--base", str(home / "model")) == 2
    assert "--base goes with --resume" in sentence(capsys)
    assert start(home, "straight", "--resume", "--base", str(home / "gone")) == 2
    assert "gone: no such file or folder; name where the run's base is now" in sentence(capsys)
    assert start(home, "straight", "--resume", model={"name": str(home / "gone")}) == 2
    other = home / "other"
    shutil.copytree(home / "model", other)
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert start(home, "straight", "--resume", "--base", str(other)) == 2
    assert re.search(
        r"other is not the base of the run in .* are 1\.0% apart\); name what .*model was", sentence(capsys)
    )
    assert sorted(straight.rglob("*")) == before


def test_a_base_that_has_moved_is_missed_before_anything_is_loaded(home: Path, capsys: Any) -> None:
    run = home / "missed"
    run.mkdir()
    tables = run_tables(home, model={"name": str(home / "gone")}, checkpoint={"output_dir": str(run)})
    write_config(run / "config.toml", tables)
    assert main(["--resume", str(run)]) == 2
    assert (
        "the base of this run has moved" in (message := sentence(capsys)) and "say where it is with --base" in message
    )


def test_an_existing_run_folder_is_refused_and_left_alone(straight: Path, home: Path, capsys: Any) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    assert start(home, "straight") == 2
    assert "already exists" in sentence(capsys)
    assert (straight / "metrics.jsonl").read_bytes() == before


def sentence(capsys: Any) -> str:
    """The one line that `grpo.train` wrote about its end."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("grpo.train: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0]), error
    return lines[0]


# Runs that share one vLLM


Train = Callable[..., int]


@pytest.fixture(scope="module")
def session(straight: Path, resumed: Path, home: Path) -> Iterator[Any]:
    """One open model. It comes after the runs that start their own."""
    from grpo.session import open_session

    with open_session(parse_config(run_tables(home))) as session:
        session.policy.save_adapter(home / "fresh")
        yield session


@pytest.fixture
def train(session: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """`start` on the shared vLLM, from the fresh adapter, with one step by default."""

    @contextmanager
    def opened(config: Any, **_: Any) -> Iterator[Any]:
        session.config = config
        session.policy.load_adapter(home / "fresh")
        session.engine.sync_adapter()
        yield session

    monkeypatch.setattr("grpo.training.run.open_session", opened)

    def run(name: str, *arguments: str, **changes: Any) -> int:
        changes["train"] = {"max_steps": 1, **changes.get("train", {})}
        return start(home, name, *arguments, **changes)

    return run


def moved(home: Path, name: str) -> bool:
    """Whether the run `name` changed the adapter."""
    fresh = load_file(home / "fresh" / "adapter_model.safetensors")
    trained = load_file(home / name / "adapter" / "adapter_model.safetensors")
    return any(not tensor.equal(trained[key]) for key, tensor in fresh.items())


def test_every_promised_metric_is_logged_with_a_reference(train: Train, home: Path) -> None:
    assert train("reference", loss={"beta": 0.1}, train={"max_steps": 2}) == 0
    for entry in read_metrics(home / "reference"):
        assert entry.keys() >= PROMISED
        assert all(math.isfinite(value) for value in entry.values() if isinstance(value, float))
    first, second = read_metrics(home / "reference")
    assert abs(first["kl"]) < 1e-5 < second["kl"], "the adapter starts at the reference and leaves it"


def test_several_optimiser_steps_on_one_rollout(train: Train, home: Path) -> None:
    """The second pass is off policy: its ratios differ from one, which old logprobs make visible."""
    assert train("passes", train={"num_iterations": 2, "optimizer_steps_per_rollout": 2}) == 0
    (entry,) = read_metrics(home / "passes")
    assert entry["importance_ratio_max"] > 1.001
    assert moved(home, "passes")


def test_dynamic_sampling_samples_again_while_rewards_are_equal(train: Train, home: Path) -> None:
    equal = [{"function": f"{home / 'scores.py'}:equal"}]
    loss = {"dynamic_sampling": True, "dynamic_sampling_max_rounds": 3}
    assert train("equal", rewards=equal, loss=loss) == 0
    (entry,) = read_metrics(home / "equal")
    assert entry["sampling_rounds"] == 3 and entry["frac_reward_zero_std"] == 1
    assert train("unequal", loss=loss) == 0
    (entry,) = read_metrics(home / "unequal")
    assert entry["sampling_rounds"] == 1 and moved(home, "unequal")


def test_training_on_the_tokens_of_highest_entropy(train: Train, home: Path) -> None:
    assert train("entropy", loss={"top_entropy_quantile": 0.2}) == 0
    assert moved(home, "entropy")
    assert math.isfinite(read_metrics(home / "entropy")[0]["loss"])


def test_vllm_that_runs_out_of_memory_samples_again_with_a_smaller_cache(
    train: Train, session: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from grpo.rollout.engine import Engine

    counted, raised, outputs = [0], [], Engine._outputs
    last: list[int] = []

    def failing(engine: Any) -> Any:
        counted[0] += 1
        if last and counted[0] > last[0] and not raised:
            raised.append(engine.running)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return outputs(engine)

    monkeypatch.setattr(Engine, "_outputs", failing)
    assert train("enough", train={"max_steps": 2}) == 0
    before, last, counted = session.engine.kv_bytes(), [counted[0] - 5], [0]
    assert train("short", train={"max_steps": 2}) == 0
    assert len(raised) == 1 and raised[0] > 0, "in the midst of the second step's sampling"
    assert session.engine.kv_bytes() == int(0.75 * before)
    first, second = (load_file(home / name / "adapter" / "adapter_model.safetensors") for name in ("enough", "short"))
    assert all(torch.equal(first[name], second[name]) for name in first), "what was lost is sampled as it was"


def test_prompts_that_are_too_long_are_dropped_and_counted(train: Train, home: Path, capsys: Any) -> None:
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "1 + 1? " * 90, "answer": "2"}]
    (home / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "table", "options": {"path": str(home / "long.jsonl")}}
    assert train("long", task=task) == 0
    assert "1 prompts longer than rollout.max_prompt_length were dropped" in " ".join(capsys.readouterr().out.split())


GSM8K = [
    {"question": "A jar holds 4 figs. How many figs are in 3 jars?", "answer": "3 * 4 = <<3*4=12>>12\n#### 12"},
    {"question": "Ana had 9 pens and lost 2. How many are left?", "answer": "9 - 2 = <<9-2=7>>7\n#### 7"},
    {"question": "What do 5 cups at 3 coins each cost?", "answer": "5 * 3 = <<5*3=15>>15\n#### 15"},
]


def test_the_gsm8k_configuration_trains_two_steps_and_logs_its_five_rewards(train: Train, home: Path) -> None:
    data = home / "gsm8k-data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GSM8K))
    small = {
        "model.name": home / "model", "model.load_in_4bit": "false", "model.dtype": "float32", "model.device": "cpu",
        "lora.r": 4, "lora.lora_alpha": 8, "rollout.max_prompt_length": 128, "rollout.max_completion_length": 12,
        "model.max_seq_length": 140, "task.options.path": data, "train.max_steps": 2,
    }  # fmt: skip
    sets = [argument for key, value in small.items() for argument in ("--set", f"{key}={value}")]
    arguments = [str(ROOT / "configs" / "gsm8k.toml"), *sets, "--output", str(home / "gsm8k")]
    assert main(arguments) == 0
    entries = read_metrics(home / "gsm8k")
    assert [entry["step"] for entry in entries] == [1, 2]
    rewards = ("xml_count", "soft_format", "strict_format", "integer", "correctness")
    for entry in entries:
        assert entry.keys() >= {f"rewards/{name}" for name in rewards}
        assert entry["reward"] == pytest.approx(sum(entry[f"rewards/{name}"] for name in rewards))


# Bad input: a sentence, exit code 2, and nothing left behind


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("raises", "no such luck"),
        ("too_few", "1 "),
        ("not_a_number", "nan"),
        ("text", "'good'"),
        ("wants_a_column", "solution"),
        ("missing", "missing"),
    ],
)
def test_a_bad_reward_function_ends_the_run_with_a_sentence(
    train: Train, home: Path, capsys: Any, function: str, expected: str
) -> None:
    assert train("bad", rewards=[{"function": f"{home / 'scores.py'}:{function}"}]) == 2
    message = sentence(capsys)
    assert expected in message and function in message
    assert not (home / "bad").exists()


def test_the_session_serves_the_next_run_after_a_failed_one(train: Train, home: Path) -> None:
    """Requests of the failed step are gone: nothing of it is left in vLLM."""
    assert train("bad", rewards=[{"function": f"{home / 'scores.py'}:raises"}]) == 2
    assert train("after") == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": {"name": "arithmetics"}}, "'arithmetics'"),
        ({"rewards": [{"function": "corectness"}]}, "'correctness'"),
        ({"rollout": {"max_prompt_length": 4}}, "longer than rollout.max_prompt_length = 4"),
        ({"task": {"name": "gsm8k", "options": {"path": "columns.jsonl"}}}, "'answer'"),
        ({"task": {"name": "gsm8k", "options": {"path": "nowhere"}}}, "nowhere does not exist"),
        ({"task": {"name": "table", "options": {"path": "empty.jsonl"}}}, "no rows"),
    ],
    ids=["task", "reward", "overlong", "column", "path", "empty"],
)
def test_what_the_configuration_asks_for_in_vain_is_named(
    train: Train, home: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str
) -> None:
    monkeypatch.chdir(home)
    (home / "columns.jsonl").write_text('{"question": "1 + 1?", "result": "2"}\n')
    (home / "empty.jsonl").touch()
    assert train("vain", **changes) == 2
    assert expected in sentence(capsys)
    assert not (home / "vain").exists()


def test_an_unknown_model_is_a_sentence(home: Path, capsys: Any) -> None:
    for name, expected in (("./no/model", "no such file or folder"), ("package:no_such_package/a.gguf", "pip install")):
        assert start(home, "unknown", model={"name": name}) == 2
        assert expected in sentence(capsys)
        assert not (home / "unknown").exists()


def test_a_process_of_its_own_ends_with_exit_code_two(home: Path) -> None:
    write_config(home / "alone.toml", run_tables(home, model={"name": "./gone"}))
    for override, expected in (("train.max_steps=2", "no such file or folder"), ("train.max_step=2", "max_steps")):
        done = start_alone(home, "alone", "--set", override)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert expected in done.stderr.splitlines()[-1]
        assert not (home / "run").exists()
