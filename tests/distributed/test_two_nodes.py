"""Two nodes make the run that one would, over a network of their own; they end together and start again together."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_ranks import distance, same_tokens
from tests.helpers.nodes import Agent, Nodes, two_nodes
from tests.helpers.paths import ROOT
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, write_config

pytestmark = [pytest.mark.vllm, pytest.mark.long, pytest.mark.timeout(1500)]

PATIENCE = 700.0
"""Seconds for starts of vLLM on machines that do other things."""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with two_nodes(tmp_path) as nodes:
        if nodes is None:
            pytest.skip("network namespaces cannot be made here: root and iproute2 are needed")
        yield nodes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    save_small_chat_model(folder / "model")
    save_rewards(folder)
    tables = run_tables(
        folder,
        rollout={"prompts_per_step": 4, "max_prompt_length": 400},
        train={"max_steps": 5, "learning_rate": 1e-3},
        checkpoint={"save_steps": 1},
    )
    write_config(folder / "config.toml", tables)
    return folder


@pytest.fixture(scope="module")
def alone(home: Path) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "grpo.train", str(home / "config.toml"), "--output", str(home / "alone")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return home / "alone"


def on_both(nodes: Nodes, *arguments: str | Path, **settings: Any) -> list[Agent]:
    return [nodes.torchrun(node, *arguments, **settings) for node in (0, 1)]


def wait_for_steps(run: Path, steps: int) -> None:
    """Until `run` has logged so many."""
    end = time.monotonic() + PATIENCE
    while not (run / "metrics.jsonl").exists() or len(read_metrics(run)) < steps:
        assert time.monotonic() < end, f"{run} has not come to step {steps}"
        time.sleep(0.2)


def test_two_nodes_give_the_tokens_of_one_process_and_its_adapter(nodes: Nodes, home: Path, alone: Path) -> None:
    agents = on_both(nodes, home / "config.toml", "--output", nodes.home / "two", ranks=2)
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], agents[0].text + agents[1].text
    assert {entry["ranks"] for entry in read_metrics(nodes.home / "two")} == {4}
    assert same_tokens(alone, nodes.home / "two")
    assert distance(alone, nodes.home / "two") < 1e-5


def test_a_node_that_is_lost_ends_the_job_in_seconds_and_its_last_whole_step_is_kept(
    nodes: Nodes, home: Path, alone: Path
) -> None:
    run = nodes.home / "lost"
    first, second = on_both(nodes, home / "config.toml", "--output", run)
    wait_for_steps(run, 2)
    second.kill()
    begun = time.monotonic()
    assert first.wait(PATIENCE) != 0
    assert time.monotonic() - begun < 30
    assert "the connection to another rank ended" in first.text
    done = len(read_metrics(run))
    assert 2 <= done < 5
    agents = on_both(nodes, "--resume", run)
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], agents[0].text
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert same_tokens(alone, run) and distance(alone, run) < 1e-5


def test_a_node_that_comes_back_goes_on_with_the_others(nodes: Nodes, home: Path, alone: Path) -> None:
    """Its agent is started again by hand, as a machine does that boots; the other agent waits for it. The machines
    have no folder in common but the model's: the first has the run."""
    run = nodes.machine(0) / "back"
    arguments = (home / "config.toml", "--output", "back")
    first, second = on_both(nodes, *arguments, restarts=3)
    wait_for_steps(run, 2)
    second.kill()
    again = nodes.torchrun(1, *arguments, restarts=3)
    assert [first.wait(PATIENCE), again.wait(PATIENCE)] == [0, 0], first.text + again.text
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert same_tokens(alone, run) and distance(alone, run) < 1e-5
    assert not (nodes.machine(1) / "back").exists()


@pytest.mark.parametrize("failing", [0, 1])
def test_ranks_start_again_together_where_one_has_failed(nodes: Nodes, home: Path, alone: Path, failing: int) -> None:
    """With torch's shared store, which both agents keep; whether the other's processes count as failed too, and so
    how often each agent has restarted, depends on who looks first."""
    run = nodes.machine(0) / "failed"
    agents = on_both(nodes, home / "config.toml", "--output", "failed", restarts=3, share_store=True)
    wait_for_steps(run, 2)
    agents[failing].kill_rank()
    assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], agents[0].text + agents[1].text
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert same_tokens(alone, run) and distance(alone, run) < 1e-5


def test_a_slow_link_costs_what_its_rate_says(nodes: Nodes, home: Path) -> None:
    """Of two ranks each sends as many bytes as it has: once to be summed, the other half summed (a ring's
    2 (n - 1) / n). What the simulation of docs/scaling.md adds to a step is these bytes over the link's rate."""
    seconds: dict[int | None, float] = {}
    sent = 0
    for rate in (None, 4_000_000):
        nodes.limit(rate)
        run = nodes.home / f"rate-{rate}"
        settings = ("--set", "lora.r=64", "--set", "lora.lora_alpha=64", "--set", "checkpoint.save_steps=100")
        agents = on_both(nodes, home / "config.toml", *settings, "--output", run)
        assert [agent.wait(PATIENCE) for agent in agents] == [0, 0], agents[0].text
        metrics = read_metrics(run)[1:]
        sent = metrics[-1]["sent_bytes"]
        seconds[rate] = statistics.median(entry["step_seconds"] for entry in metrics)
    predicted = sent * 8 / 4_000_000
    added = seconds[4_000_000] - seconds[None]
    print(json.dumps({"sent_bytes": sent, "predicted_s": predicted, "added_s": added}))
    assert predicted > 1
    assert added == pytest.approx(predicted, rel=0.3)
