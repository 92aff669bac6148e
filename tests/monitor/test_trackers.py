"""Trackers: each gets the numbers and nothing else. TensorBoard, Weights & Biases (offline) and trackio are the real
packages here, and what they wrote is read back; stand-ins only show what happens when one fails.
"""

from __future__ import annotations

import json
import math
import os
import socket
import sqlite3
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.monitor.trackers import Trackers
from grpo.run.records import without_secrets
from tests.helpers.paths import ROOT
from tests.helpers.report_run import metrics, run_config, write_run

ENVIRONMENT_SECRET = "s3cret-of-the-environment"


def logging_to(folder: Path, *trackers: str) -> Config:
    return run_config(folder, log={"to": list(trackers), "report": False})


def tracked_run(tracker: str, folder: Path, **environment: str) -> None:
    """A run of three steps in a process of its own, which has a secret in its environment and its arguments."""
    script = f"""
import sys
from pathlib import Path
from tests.helpers.report_run import run_config, write_run
folder = Path(sys.argv[1])
write_run(folder, 3, text="a completion", config=run_config(folder, log={{"to": [{tracker!r}], "report": False}}))
"""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "MY_API_KEY": ENVIRONMENT_SECRET, **environment}
    command = [sys.executable, "-c", script, str(folder), ENVIRONMENT_SECRET]
    done = subprocess.run(command, cwd=folder.parent, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_nothing_private(*folders: Path) -> None:
    """No secret of the environment or the configuration, no completion, no name of this machine in any file."""
    private = [ENVIRONMENT_SECRET, "hunter2", "a completion", "What is 20 + 22?"]
    private += [name for name in (socket.gethostname(),) if len(name) > 6]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        for text in private:
            assert text.encode() not in content, f"{text!r} in {path.name}"


def test_tensorboard_reads_back_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = write_run(
        tmp_path / "run", 3, text="a completion", config=logging_to(tmp_path / "run", "tensorboard"), odd=math.nan
    )
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {"reward", "rewards/numeric_answer", "eval/strict_accuracy"} and "odd" not in tags
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3]
    assert events.Scalars("reward")[1].value == pytest.approx(metrics(2, 3)["reward"], rel=1e-6)
    assert [event.step for event in events.Scalars("eval/strict_accuracy")] == [0, 3]
    assert_nothing_private(folder / "tensorboard")


def test_tensorboard_shows_a_step_while_the_run_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = Trackers(logging_to(tmp_path, "tensorboard"), tmp_path)
    assert list(tmp_path.iterdir()) == [], "nothing is written before the first step"
    trackers.step({"step": 1, "reward": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("reward")] == [0.5]
    trackers.close()


def test_wandb_gets_the_numbers_and_sees_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    folder = tmp_path / "run"
    tracked_run("wandb", folder, WANDB_MODE="offline", HOME=str(tmp_path / "home"))
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    records = wandb_records(file)
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    rewards = {entry["_step"]: entry["reward"] for entry in history if "reward" in entry}
    assert rewards == {step: pytest.approx(metrics(step, 3)["reward"]) for step in (1, 2, 3)}
    assert {entry["_step"] for entry in history if "eval/strict_accuracy" in entry} == {0, 3}
    (run,) = [record.run for record in records if record.HasField("run")]
    sent = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name, sent["train"]["learning_rate"]) == ("grpo", "run", 1e-5)
    assert sent["task"][0]["options"] == {"api_key": "(not shown)"}
    kinds = {record.WhichOneof("record_type") for record in records}
    assert not kinds & {"output", "output_raw", "files", "environment", "stats"}
    assert_nothing_private(folder / "wandb")


def wandb_records(file: Path) -> list[Any]:
    """What an offline run holds for its server: LevelDB's log format, of which a record may span blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, records, whole = file.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def test_wandb_without_a_key_is_refused_before_the_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="pip install wandb")
    script = """
from pathlib import Path
import sys
from tests.monitor.test_trackers import logging_to
from grpo.errors import UserError
from grpo.monitor.trackers import Trackers
try:
    Trackers(logging_to(Path("run"), "wandb"), Path("run"))
except UserError as error:
    print(error)
"""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout.startswith('log.to = ["wandb"]: No API key configured.'), done.stderr
    assert done.stdout.endswith("set WANDB_MODE=offline, or leave it out\n")
    assert not (tmp_path / "run").exists()


def test_trackio_gets_the_numbers_and_sees_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="pip install trackio")
    folder, store = tmp_path / "run", tmp_path / "store"
    tracked_run("trackio", folder, TRACKIO_DIR=str(store), HOME=str(tmp_path / "home"))
    with sqlite3.connect(store / "grpo.db") as database:
        logged = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
        assert database.execute("select count(*) from system_metrics").fetchone() == (0,)
    entries = [(name, step, json.loads(values)) for name, step, values in logged]
    rewards = {step: values["reward"] for name, step, values in entries if "reward" in values and name == "run"}
    assert rewards == {step: pytest.approx(metrics(step, 3)["reward"]) for step in (1, 2, 3)}
    assert [step for _, step, values in entries if "eval/strict_accuracy" in values] == [0, 3]
    assert json.loads(config)["task"][0]["options"] == {"api_key": "(not shown)"}
    assert_nothing_private(store)


def test_no_tracker_is_imported_unless_it_is_asked_for(tmp_path: Path) -> None:
    script = """
import sys
from grpo.monitor.run_log import RunLog
print([name for name in ("wandb", "trackio", "tensorboard", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
    assert run_config(tmp_path).log.to == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(UserError) as refused:
        Trackers(logging_to(tmp_path, name), tmp_path)
    assert str(refused.value) == f'log.to = ["{name}"]: {name} is not installed; pip install {name}, or leave it out'


def test_a_tracker_that_does_not_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError("no route to host\nand a long story")

    broken = types.ModuleType("trackio")
    broken.init = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trackio", broken)
    trackers = Trackers(logging_to(tmp_path, "trackio"), tmp_path)
    with pytest.raises(UserError, match=r'log.to = \["trackio"\]: trackio does not start \(no route to host\); mend'):
        trackers.step({"step": 1})
    trackers.close()


def test_secrets_are_hidden_at_any_depth_and_numbers_are_not() -> None:
    table = {
        "options": {"API_KEY": "a", "hf-token": "b", "max_tokens": 5, "tokens": ["x"], "token": 7, "monkey": "c"},
        "list": [{"password": "d"}, "text"],
        "keys": "e",
    }
    assert without_secrets(table) == {
        "options": {
            "API_KEY": "(not shown)", "hf-token": "(not shown)", "max_tokens": 5, "tokens": ["x"], "token": 7,
            "monkey": "c",
        },
        "list": [{"password": "(not shown)"}, "text"],
        "keys": "e",
    }  # fmt: skip
