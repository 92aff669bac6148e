"""What happens to runs: killed, interrupted, out of disk, robbed of their data; nothing that was saved is lost.

Every run is a process of its own, forked from one that has started vLLM (`forked_runs.py`). "The same" is bit for bit:
adapters, optimiser state, metrics and completions (`same_run.py`). The kills here are three; more of them, at moments
drawn at random, are `benchmarks/kill_resume.py`'s.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from grpo.run.checkpoint import latest, save
from grpo.run.tensor_state import load_tensors, save_tensors
from tests.helpers.forked_runs import ForkedRuns
from tests.helpers.same_run import differences, last_checkpoint
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, write_config

pytestmark = pytest.mark.vllm

CANARIES = {
    "HF_TOKEN": "hf_CaNaRyToKeN0123456789",
    "WANDB_API_KEY": "caNaRyKeY9876543210",
    "OPENAI_API_KEY": "sk-CaNaRy",
}

REWARDS = """

def fails_at_step_four(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 4:
        raise RuntimeError("at last: " + completions[0][-1]["content"][:0] + "\\x1b]0;owned\\x07")
    return [float(len(completion[-1]["content"])) for completion in completions]


def prints_escapes(completions, **kwargs):
    print("\\x1b[2J\\x1b]0;owned\\x07", completions[0][-1]["content"])
    return [float(len(completion[-1]["content"])) for completion in completions]
"""


def tables(home: Path, **changes: Any) -> dict[str, Any]:
    """Four steps with a checkpoint and an evaluation after every second one."""
    chosen: dict[str, Any] = {
        "rewards": [{"function": f"{home / 'scores.py'}:score"}],
        "lora": {"lora_dropout": 0.1},
        "rollout": {"max_prompt_length": 400},
        "train": {"max_steps": 4},
        "checkpoint": {"save_steps": 2},
        "eval": {"every": 2, "limit": 3, "max_completion_length": 8},
        "log": {"samples_every": 2},
    }
    for section, keys in changes.items():
        chosen[section] = keys if isinstance(keys, list) else {**chosen.get(section, {}), **keys}
    return run_tables(home, **chosen)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    save_small_chat_model(folder / "model")
    file = save_rewards(folder)
    file.write_text(file.read_text() + REWARDS)
    write_config(folder / "config.toml", tables(folder))
    return folder


@pytest.fixture(scope="module")
def runs(home: Path) -> Iterator[ForkedRuns]:
    """The network is allowed as far as the environment goes, and secrets are in it."""
    with ForkedRuns(home / "config.toml", home, HF_HUB_OFFLINE="0", HF_DATASETS_OFFLINE="0", **CANARIES) as runs:
        yield runs


@pytest.fixture(scope="module")
def straight(runs: ForkedRuns, home: Path) -> Path:
    """A run that nothing happens to."""
    done = runs.run(home / "config.toml", "--output", home / "straight", fault=("count", home / "moments.json"))
    assert done.code == 0, done.err
    assert [entry["step"] for entry in read_metrics(home / "straight")] == [1, 2, 3, 4]
    return home / "straight"


@pytest.fixture(scope="module")
def moments(straight: Path, home: Path) -> dict[str, int]:
    """How often each phase of such a run can be hit."""
    return json.loads((home / "moments.json").read_text())


def resumes_to_the_same(runs: ForkedRuns, run: Path, straight: Path) -> None:
    done = runs.run("--resume", run)
    assert done.code == 0, done.err
    assert differences(straight, run) == []


# Killed


@pytest.mark.parametrize(("phase", "share"), [("rollout", 0.8), ("backward", 0.6), ("checkpoint", 0.75)])
def test_a_killed_run_resumes_to_the_same_bits(
    runs: ForkedRuns, home: Path, straight: Path, moments: dict[str, int], phase: str, share: float
) -> None:
    run = home / f"killed-in-{phase}"
    moment = int(moments[phase] * share)
    done = runs.run(home / "config.toml", "--output", run, fault=("kill", phase, moment))
    assert done.code == -signal.SIGKILL
    saved = latest(run, pytest.fail)
    lost = read_metrics(run)[-1]["step"] - (int(saved.name.removeprefix("step-")) if saved else 0)
    assert 0 <= lost <= 2
    resumes_to_the_same(runs, run, straight)


# Interrupted


@pytest.mark.parametrize(
    ("number", "phase", "share"),
    [(signal.SIGTERM, "rollout", 0.9), pytest.param(signal.SIGINT, "evaluation", 0.8, marks=pytest.mark.long)],
)
def test_a_signal_leaves_a_checkpoint_of_the_last_whole_step(
    runs: ForkedRuns, home: Path, straight: Path, moments: dict[str, int], number: int, phase: str, share: float
) -> None:
    run = home / f"signal-in-{phase}"
    started = time.monotonic()
    fault = ("signal", phase, int(moments[phase] * share), int(number))
    done = runs.run(home / "config.toml", "--output", run, fault=fault)
    assert done.code == 128 + number and time.monotonic() - started < 30
    step = read_metrics(run)[-1]["step"]
    assert last_checkpoint(run) == f"step-{step}" and step < 4
    assert f"interrupted; the last checkpoint is step {step}, continue with --resume {run}" in done.sentence
    resumes_to_the_same(runs, run, straight)


def test_a_signal_between_the_updates_of_one_step_undoes_them(runs: ForkedRuns, home: Path) -> None:
    config = write_config(home / "updates.toml", tables(home, train={"max_steps": 2, "num_iterations": 2}))
    reference = home / "updates"
    assert runs.run(config, "--output", reference, fault=("count", home / "updates.json")).code == 0
    backward = json.loads((home / "updates.json").read_text())["backward"]
    run = home / "updates-interrupted"
    # In the first update of the second step; the second one is where it is noticed.
    done = runs.run(config, "--output", run, fault=("signal", "backward", int(backward * 0.6), int(signal.SIGINT)))
    assert done.code == 130 and last_checkpoint(run) == "step-1"
    resumes_to_the_same(runs, run, reference)


@pytest.mark.parametrize(
    ("again", "within"), [(True, 10), pytest.param(False, 20, marks=pytest.mark.long)], ids=["twice", "too long"]
)
def test_a_run_that_cannot_be_reached_ends_all_the_same(
    runs: ForkedRuns, home: Path, moments: dict[str, int], again: bool, within: float
) -> None:
    """Its main thread is in C code that does not return. A second signal means now; one alone has a time limit."""
    run = home / f"stuck-{again}"
    started = time.monotonic()
    fault = ("stuck", "rollout", int(moments["rollout"] * 0.9), int(signal.SIGTERM), *(["again"] if again else []))
    done = runs.run(home / "config.toml", "--output", run, fault=fault)
    assert done.code == 143 and time.monotonic() - started < within
    assert last_checkpoint(run) == "step-2"


# Errors


@pytest.mark.parametrize(
    ("phase", "name", "sentence"),
    [
        pytest.param("checkpoint", "ENOSPC", "step-4: the checkpoint could not be written", marks=pytest.mark.long),
        ("samples", "EROFS", "Read-only file system; make it writable and continue with --resume"),
    ],
)
def test_a_disk_that_refuses_is_a_sentence_and_the_last_checkpoint_stays_good(
    runs: ForkedRuns, home: Path, straight: Path, moments: dict[str, int], phase: str, name: str, sentence: str
) -> None:
    run = home / f"refused-{phase}-{name}"
    fault = ("refuse", phase, int(moments[phase] * 0.8), name)
    done = runs.run(home / "config.toml", "--output", run, fault=fault)
    assert done.code == 2 and sentence in done.sentence and str(run) in done.sentence
    saved = latest(run, pytest.fail)
    assert saved is not None and saved.name in ("step-2", "step-3")
    resumes_to_the_same(runs, run, straight)


@pytest.fixture
def small_disk(tmp_path: Path, straight: Path) -> Iterator[Path]:
    """A file system of its own on which not all of a run has room."""
    place = tmp_path / "disk"
    place.mkdir()
    size = int(0.7 * sum(file.stat().st_size for file in straight.rglob("*")))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root; the refused writes above stand in for it")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_is_a_sentence_and_the_last_checkpoint_stays_good(
    runs: ForkedRuns, home: Path, straight: Path, small_disk: Path
) -> None:
    done = runs.run(home / "config.toml", "--output", small_disk / "run")
    assert done.code == 2 and "No space left" in done.sentence, done.err + done.out
    assert latest(small_disk / "run", pytest.fail) is not None
    shutil.copytree(small_disk / "run", home / "from-small-disk")
    resumes_to_the_same(runs, home / "from-small-disk", straight)


def test_an_error_of_a_reward_leaves_a_checkpoint_of_the_last_whole_step(runs: ForkedRuns, home: Path) -> None:
    rewards = [{"function": f"{home / 'scores.py'}:fails_at_step_four"}]
    config = write_config(home / "reward.toml", tables(home, rewards=rewards, checkpoint={"save_steps": 50}))
    done = runs.run(config, "--output", home / "reward")
    assert done.code == 2 and "at last" in done.sentence
    assert last_checkpoint(home / "reward") == "step-3"
    assert "\x1b" not in done.out + done.err


def test_checkpoints_that_cannot_be_continued_are_a_sentence_and_nothing_is_touched(
    runs: ForkedRuns, home: Path, straight: Path
) -> None:
    run = home / "older"
    shutil.copytree(straight, run)
    shutil.rmtree(run / "checkpoints")
    state = load_tensors(straight / "checkpoints" / "step-4" / "trainer.safetensors")
    del state["learner"]["guard"]

    def write(folder: Path) -> None:
        shutil.copytree(straight / "adapter", folder / "adapter")
        save_tensors(folder / "trainer.safetensors", state)

    save(run, 4, write, keep=None)
    before = (run / "metrics.jsonl").read_bytes()
    done = runs.run("--resume", run)
    assert done.code == 2 and "not a state that this version of grpo continues from" in done.sentence
    (run / "checkpoints" / "step-4" / "trainer.safetensors").write_bytes(b"")
    done = runs.run("--resume", run)
    assert done.code == 2 and "every checkpoint is damaged; start a new run with another --output" in done.sentence
    assert (run / "metrics.jsonl").read_bytes() == before


def test_data_that_vanish_do_not_end_the_run_and_are_missed_by_the_next(runs: ForkedRuns, home: Path) -> None:
    rows = [{"question": f"{number} + 1?", "answer": str(number + 1)} for number in range(8)]
    data = home / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "table", "options": {"path": str(data)}}
    config = write_config(home / "data.toml", tables(home, task=task, eval={"every": "none"}))
    done = runs.run(config, "--output", home / "data", fault=("remove", "rollout", 20, data))
    assert done.code == 0, done.err
    done = runs.run("--resume", home / "data", "--set", "train.max_steps=6")
    assert done.code == 2 and f"data set {data} does not exist" in done.sentence
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[::-1]))
    done = runs.run("--resume", home / "data", "--set", "train.max_steps=6")
    assert done.code == 2 and "the training prompts are not those of the checkpoint" in done.sentence
    assert last_checkpoint(home / "data") == "step-4" and latest(home / "data", pytest.fail) is not None


@pytest.mark.long
def test_a_clock_that_is_set_back_changes_nothing(runs: ForkedRuns, home: Path, straight: Path) -> None:
    run = home / "clock"
    done = runs.run(home / "config.toml", "--output", run, fault=("clock", "rollout", 30, -1e8))
    assert done.code == 0, done.err
    assert differences(straight, run) == []
    assert all(0 <= entry["step_seconds"] < 1000 for entry in read_metrics(run))


def test_a_second_process_is_refused_and_does_the_first_no_harm(runs: ForkedRuns, home: Path, straight: Path) -> None:
    run = home / "shared"
    first = runs.start(home / "config.toml", "--output", run)
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.02)
    second = runs.run("--resume", run)
    assert second.code == 2 and f"another process ({first.pid}) is writing to this run folder" in second.sentence
    done = first.wait()
    assert done.code == 0, done.err
    assert differences(straight, run) == []


# Numbers


def test_a_non_finite_step_is_left_out_and_the_run_goes_on(runs: ForkedRuns, home: Path, straight: Path) -> None:
    run = home / "skipped"
    done = runs.run(home / "config.toml", "--output", run, fault=("poison", "loss", 2))
    assert done.code == 0, done.err
    entries = read_metrics(run)
    assert [entry["update_skipped"] for entry in entries] == [0, 1, 0, 0]
    assert entries[1]["grad_norm"] is None, "NaN has no form in JSON"
    printed = " ".join(done.out.split())
    assert f"step 2: the gradient norm is nan; python -m grpo.replay {run}/nonfinite/step-2 says where" in printed
    assert (run / "nonfinite" / "step-2" / "batch.safetensors").is_file()
    # The first step is the straight run's, the third starts from an adapter that knows nothing of the second.
    same = [name for name in entries[0] if not name.endswith(("seconds", "per_second", "gib"))]
    expected = read_metrics(straight)
    assert all(entries[0][name] == expected[0][name] for name in same)
    assert entries[2]["loss"] != expected[2]["loss"]


def test_non_finite_steps_in_a_row_end_the_run_with_its_last_good_state_saved(runs: ForkedRuns, home: Path) -> None:
    run = home / "stopped"
    arguments = ("--output", run, "--set", "train.max_nonfinite_steps=2")
    done = runs.run(home / "config.toml", *arguments, fault=("poison", "rollout", 2, 3, 4))
    assert done.code == 2
    assert "step 3: vLLM reported a logprob that is not finite; python -m grpo.replay" in done.sentence
    assert "2 such steps in a row end the run" in done.sentence
    assert last_checkpoint(run) == "step-2" and len(read_metrics(run)) == 2
    assert runs.run("--resume", run).code == 0, "what was wrong with vLLM is gone"


# Secrets, network, terminal: of all the runs above


def test_nothing_tried_to_reach_another_machine(runs: ForkedRuns, straight: Path) -> None:
    """The environment allowed it; model and data were local. `note_network` raises for whatever tries."""
    assert runs.network == ""


def test_nothing_was_unpickled(runs: ForkedRuns, straight: Path) -> None:
    """By the trainer; its reward processes unpickle what the trainer sends them."""
    assert runs.unpickled == ""


def test_secrets_of_the_environment_are_in_no_file(runs: ForkedRuns, straight: Path, home: Path) -> None:
    searched = 0
    for file in home.rglob("*"):
        if file.is_file() and "model" not in file.relative_to(home).parts[0]:
            content = file.read_bytes()
            searched += 1
            assert not [name for name, value in CANARIES.items() if value.encode() in content], file
    assert searched > 50


def test_what_a_model_writes_cannot_act_upon_the_terminal(runs: ForkedRuns, home: Path) -> None:
    """A reward function that prints completions passes on what the model wrote. Names lead nowhere either."""
    rewards = [{"function": f"{home / 'scores.py'}:prints_escapes", "name": "../../escaped\x1b[2J"}]
    changes = {"rewards": rewards, "train": {"max_steps": 1}, "eval": {"every": "none"}}
    config = write_config(home / "escapes.toml", tables(home, **changes))
    before = set(home.iterdir())
    done = runs.run(config, "--output", home / "escapes")
    assert done.code == 0, done.err
    assert {path.name for path in set(home.iterdir()) - before} <= {"escapes", done.name + ".out", done.name + ".err"}
    assert "rewards/../../escaped\x1b[2J" in read_metrics(home / "escapes")[0]
    assert r"\x1b[2J\x1b]0;owned\x07" in done.out and "\x1b" not in done.out and "\x07" not in done.out
