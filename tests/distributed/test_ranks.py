"""Several ranks make the run that one would: the same tokens, the same adapter, one record; and they end together."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed import TCPStore

import grpo
from grpo.config.schema import Config, parse_config
from grpo.distributed.launch import Launch, check_share, read_launch, refuse_several
from grpo.distributed.meeting import PORT
from grpo.distributed.ranks import Ranks, connect, owners
from grpo.errors import UserError
from grpo.model.base_weights import BaseWeights
from grpo.model.source import open_source
from grpo.policy.policy import Policy
from grpo.rollout.sampler import Group, RemoteSample
from grpo.training.loss_metrics import EffectiveSampleSize, Maximum, Mean, Total, as_message, from_message
from grpo.training.run import uneven_share
from tests.helpers.forked_runs import Finished, ForkedRuns
from tests.helpers.paths import ROOT
from tests.helpers.same_run import completions
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny import save_tiny
from tests.helpers.tiny_run import read_metrics, run_tables, save_rewards, write_config
from tests.training import test_learner
from tests.training.test_learner import LOSSES, Recorder, assert_same

T = TypeVar("T")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def together(size: int, work: Callable[[Ranks], T]) -> list[T | BaseException]:
    """What `work` returns or raises on each of `size` ranks, which are threads here."""
    port, found = free_port(), dict[int, T | BaseException]()

    def one(rank: int) -> None:
        try:
            found[rank] = work(connect(Launch(rank, size, rank, "127.0.0.1", port), torch.device("cpu")))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(size)]


# A place among the others


def test_the_place_is_read_once_and_every_rank_sees_its_own_gpu() -> None:
    """vLLM takes the launcher's variables for its own, so none may be left."""
    given = {
        "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500",
        "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2",
    }  # fmt: skip
    environment = {**given, "HOME": "/root"}
    assert read_launch(environment) == Launch(3, 8, 1, "node0", 29500, True, 2)
    assert environment == {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "1"}
    for shown, seen in (("4,6", "6"), ("5", ""), ("", ""), ("GPU-a,GPU-b,GPU-c", "GPU-b")):
        environment = {**given, "CUDA_VISIBLE_DEVICES": shown}
        read_launch(environment)
        assert environment == {"CUDA_VISIBLE_DEVICES": seen}


def test_a_process_by_itself_keeps_its_gpus() -> None:
    assert read_launch({}) == Launch()
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert read_launch(environment) == Launch() and environment == {"CUDA_VISIBLE_DEVICES": "2,3"}


@pytest.mark.parametrize("environment", [{"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": "two"}])
def test_half_a_launch_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(UserError, match="torchrun"):
        read_launch(environment)


def test_what_runs_in_one_process_says_so_under_torchrun() -> None:
    refuse_several("grpo.sft", {})
    with pytest.raises(UserError, match=r"grpo\.sft uses one GPU; start it without torchrun"):
        refuse_several("grpo.sft", {"WORLD_SIZE": "2"})


def test_the_python_api_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"grpo\.load uses one GPU"):
        grpo.load("nobody/has-this-model")


# Shares


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 9))
def test_every_optimiser_step_has_work_for_every_rank(prompts: int, parts: int, size: int) -> None:
    owning = owners(prompts, parts, size)
    assert len(owning) == prompts
    bounds = [prompts * part // parts for part in range(parts + 1)]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        part = owning[begin:end]
        counts = [part.count(rank) for rank in range(size)]
        assert part == sorted(part) and max(counts) - min(counts) <= 1
    assert owners(prompts, parts, 1) == [0] * prompts


def config_with(prompts: int, optimizer_steps: int = 1) -> Any:
    return parse_config(
        {
            "model": {"name": "m"},
            "task": {"name": "t"},
            "rollout": {"prompts_per_step": prompts},
            "train": {"optimizer_steps_per_rollout": optimizer_steps},
        }
    )


def test_more_ranks_than_prompts_are_refused_and_uneven_shares_are_said() -> None:
    assert uneven_share(config_with(8), 4) is None and uneven_share(config_with(7), 1) is None
    assert "6 does not divide evenly among 4 ranks:" in str(uneven_share(config_with(6), 4))
    assert "among 4 ranks in each of 4 optimiser steps" in str(uneven_share(config_with(8, optimizer_steps=4), 4))
    check_share(4, 4)
    with pytest.raises(UserError, match="prompts_per_step = 3: 4 ranks were started"):
        check_share(3, 4)


# Messages


def test_every_rank_gets_what_every_rank_says() -> None:
    def say(ranks: Ranks) -> Any:
        mine = {"rank": ranks.rank, "text": "x" * 10 * ranks.rank, "tensor": torch.arange(ranks.rank)}
        return (
            ranks.gather(mine),
            ranks.broadcast(f"from {ranks.rank}"),
            ranks.gather_indexed({2 - ranks.rank: ranks.rank}, 3),
        )

    for gathered, first, merged in together(3, say):  # type: ignore[misc]
        assert [entry["rank"] for entry in gathered] == [0, 1, 2]
        assert [len(entry["text"]) for entry in gathered] == [0, 10, 20]
        assert [entry["tensor"].tolist() for entry in gathered] == [[], [0], [0, 1]]
        assert first == "from 0" and merged == [2, 1, 0]


def test_gradients_are_summed_and_values_are_the_first_ranks() -> None:
    def work(ranks: Ranks) -> Any:
        a = torch.nn.Parameter(torch.full((2, 3), float(ranks.rank)))
        b = torch.nn.Parameter(torch.full((4,), 10.0 + ranks.rank))
        ranks.broadcast_parameters([a, b])
        if ranks.rank != 1:  # which backpropagates nothing
            (a.sum() * (ranks.rank + 1) + b.sum()).backward()
        ranks.sum_gradients([a, b])
        return a, b, ranks.bytes_sent

    for a, b, sent in together(3, work):  # type: ignore[misc]
        assert torch.equal(a, torch.zeros(2, 3)) and torch.equal(b, torch.full((4,), 10.0))
        assert torch.equal(a.grad, torch.full((2, 3), 1.0 + 3.0)) and torch.equal(b.grad, torch.full((4,), 2.0))
        assert sent >= 10 * 4


def test_ranks_of_one_start_meet_whatever_was_said_before_and_however_often_each_was_restarted() -> None:
    """torchrun's store, which outlives a start, still names the port of one that is gone."""
    agents = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agents.set(PORT, str(free_port()))
    found: dict[int, Any] = {}

    def one(rank: int) -> None:
        launch = Launch(rank, 3, rank, "127.0.0.1", agents.port, store_is_there=True, restarts=2 * rank)
        if rank == 0:
            time.sleep(0.5)  # the others look first
        found[rank] = connect(launch, torch.device("cpu")).gather(rank)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {rank: [0, 1, 2] for rank in range(3)}


def test_ranks_that_are_not_alike_are_named() -> None:
    def work(ranks: Ranks) -> None:
        ranks.require_same({"the GPU": "NVIDIA H200", "the version of vllm": "0.26" if ranks.rank < 2 else "0.25"})

    first, *others = together(3, work)
    assert isinstance(first, UserError)
    assert "the version of vllm: rank 2 has 0.25 where rank 0 has 0.26" in str(first)
    assert others == [None, None]  # the job ends with the first


def test_metrics_survive_the_way_between_ranks() -> None:
    metrics = {
        "loss": Total(torch.tensor(0.1, dtype=torch.float64)),
        "kl": Mean(1 / 3, 7.0),
        "max": Maximum(float("-inf")),
        "ess": EffectiveSampleSize(1.0, 2.0, 3.0),
    }
    assert from_message(json.loads(json.dumps(as_message(metrics)))) == {**metrics, "loss": Total(0.1)}


# Learning


def shared_out(rank: int, size: int, parts: int) -> list[Group]:
    """test_learner's groups, as rank `rank` has them."""
    everything = test_learner.groups()
    return [
        group
        if owner == rank
        else Group(
            group.prompt,
            [RemoteSample(one.length, one.truncated, True, one.rewards, one.rewards_by_turn) for one in group.samples],
        )
        for group, owner in zip(everything, owners(len(everything), parts, size), strict=True)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder, "llama")
    return folder


def recorder(config: Config) -> Recorder:
    """A learner with a model of its own."""
    base = BaseWeights(open_source(config.model), config.model, device=torch.device("cpu"), dtype=torch.float32)
    policy = Policy(base, config.lora, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in policy.adapter_layers().values():
            layer.lora_B["default"].weight.normal_(std=0.05, generator=generator)
    return Recorder(policy, config, max_steps=1, notice=print)


SETTINGS = [*((loss, {}) for loss in LOSSES), ({"beta": 0.1}, {"optimizer_steps_per_rollout": 2, "num_iterations": 2})]


@pytest.mark.parametrize(("loss", "train"), SETTINGS, ids=lambda one: " ".join(map(str, one.values())) or "-")
def test_ranks_together_learn_what_one_learns(tiny: Path, loss: dict[str, Any], train: dict[str, Any]) -> None:
    """Whatever normalises a loss (tokens, entropies, truncated ones left out) is counted over all ranks; one of the
    three has only a group that is skipped."""

    config = test_learner.config_for(tiny, loss=loss, train=train)

    def learn(learner: Recorder, ranks: Ranks) -> Any:
        learner.seen, learner.ranks = [], ranks
        groups = shared_out(ranks.rank, ranks.size, config.train.optimizer_steps_per_rollout)
        return learner.seen, learner.update(groups, test_learner.advantages(config), step=1)

    expected, metrics = learn(recorder(config), Ranks())
    learners = [recorder(config) for _ in range(3)]  # not in threads, which share torch's generator
    for found, others in together(3, lambda ranks: learn(learners[ranks.rank], ranks)):  # type: ignore[misc]
        assert_same(found, expected)
        assert others.keys() == metrics.keys()
        for name, value in metrics.items():
            assert others[name] == (value and pytest.approx(value, rel=1e-4, abs=1e-6)), name


# Whole runs


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    save_small_chat_model(folder / "model")
    save_rewards(folder)
    tables = run_tables(
        folder,
        rollout={"prompts_per_step": 5, "max_prompt_length": 400},
        # A step small enough that a difference of one rounding does not grow from step to step.
        train={"max_steps": 5, "optimizer_steps_per_rollout": 2, "learning_rate": 1e-3},
        loss={"beta": 0.02},
        eval={"every": 5, "limit": 5, "max_completion_length": 8},
        checkpoint={"save_steps": 2},
        log={"samples": 2, "samples_every": 2},
    )
    write_config(folder / "config.toml", tables)
    return folder


@pytest.fixture(scope="module")
def runs(home: Path) -> Iterator[ForkedRuns]:
    with ForkedRuns(home / "config.toml", home) as runs:
        yield runs


@pytest.fixture(scope="module")
def alone(runs: ForkedRuns, home: Path) -> Path:
    done = runs.run(home / "config.toml", "--output", home / "alone")
    assert done.code == 0, done.err
    return home / "alone"


def launched(
    runs: ForkedRuns, *arguments: str | Path, size: int = 2, faults: dict[int, tuple[Any, ...]] | None = None
) -> list[Finished]:
    """`grpo.train` with `arguments` on `size` ranks, as a launcher starts them; `faults`: by rank."""
    port = str(free_port())
    started = [
        runs.start(
            *arguments,
            fault=(faults or {}).get(rank, ()),
            environment={
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(size)
    ]
    return [one.wait() for one in started]


def same_tokens(one: Path, other: Path) -> bool:
    """Whether the logged completions are the same, and their rewards."""
    return completions(one) == completions(other)


def distance(one: Path, other: Path) -> float:
    """Relative distance between two runs' adapters."""
    mine, others = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    apart = sum(float((mine[name] - others[name]).double().square().sum()) for name in mine)
    return (apart / sum(float(tensor.double().square().sum()) for tensor in mine.values())) ** 0.5


@pytest.mark.vllm
def test_two_ranks_give_the_tokens_of_one_and_its_adapter(runs: ForkedRuns, home: Path, alone: Path) -> None:
    """Five prompts a step on two ranks, in two optimiser steps: neither divides."""
    first, second = launched(runs, home / "config.toml", "--output", home / "two")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert same_tokens(alone, home / "two")
    assert distance(alone, home / "two") < 1e-5
    assert "does not divide evenly among 2 ranks" in first.out
    assert second.out == "" and "prompts_per_step" not in second.err
    one, two = read_metrics(alone), read_metrics(home / "two")
    assert len(one) == len(two) == 5
    for mine, others in zip(one, two, strict=True):
        assert others.pop("ranks") == 2 and others.pop("sent_bytes") > 0 and others.pop("idle_seconds") >= 0
        assert mine.keys() == others.keys()
        for name, value in mine.items():
            if not re.search("second|memory", name):
                assert others[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    evaluated = [json.loads((run / "eval.jsonl").read_text().splitlines()[-1]) for run in (alone, home / "two")]
    assert {k: v for k, v in evaluated[0].items() if "second" not in k} == {
        k: v for k, v in evaluated[1].items() if "second" not in k
    }


@pytest.mark.vllm
def test_a_run_of_two_ranks_goes_on_with_one_and_with_three(runs: ForkedRuns, home: Path, alone: Path) -> None:
    run = home / "resumed"
    assert [
        done.code for done in launched(runs, home / "config.toml", "--set", "train.max_steps=2", "--output", run)
    ] == [
        0,
        0,
    ]
    done = runs.run("--resume", run, "--set", "train.max_steps=3")
    assert done.code == 0, done.err
    finished = launched(runs, "--resume", run, "--set", "train.max_steps=5", size=3)
    assert [done.code for done in finished] == [0, 0, 0], finished[0].err
    assert [entry["step"] for entry in read_metrics(run)] == [1, 2, 3, 4, 5]
    assert distance(alone, run) < 1e-5


@pytest.mark.vllm
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_ends_the_others_and_what_was_done_is_kept(
    runs: ForkedRuns, home: Path, alone: Path, dying: int
) -> None:
    run = home / f"died-{dying}"
    moment = "60"  # of vLLM's steps, twelve or so a step of the run
    done = launched(runs, home / "config.toml", "--output", run, faults={dying: ("kill", "rollout", moment)})
    assert done[dying].code == -9 and done[1 - dying].code == 1
    assert f"grpo.train, rank {1 - dying}: the connection to another rank ended" in done[1 - dying].err
    assert "Traceback" not in done[1 - dying].err
    steps = len(read_metrics(run))
    assert 1 <= steps < 5
    again = launched(runs, "--resume", run)
    assert [one.code for one in again] == [0, 0], again[0].err
    assert same_tokens(alone, run) and distance(alone, run) < 1e-5


@pytest.mark.vllm
def test_numbers_that_are_not_finite_on_one_rank_are_left_out_on_all(runs: ForkedRuns, home: Path) -> None:
    """The dump holds the whole batch, as it would from one rank."""
    run = home / "poisoned"
    options = ("--set", "train.optimizer_steps_per_rollout=1", "--output", run)
    done = launched(runs, home / "config.toml", *options, faults={1: ("poison", "loss", "2")})
    assert [one.code for one in done] == [0, 0], done[0].err
    assert [entry["update_skipped"] for entry in read_metrics(run)] == [0, 1, 0, 0, 0]
    from grpo.replay import read_dump

    dumped = read_dump(run / "nonfinite" / "step-2").batch
    assert [len(group.sequences) for group in dumped.groups] == [4] * 5


@pytest.mark.vllm
def test_more_ranks_than_prompts_end_with_a_sentence(runs: ForkedRuns, home: Path) -> None:
    run = home / "too-many"
    done = launched(runs, home / "config.toml", "--set", "rollout.prompts_per_step=2", "--output", run, size=3)
    assert [one.code for one in done] == [2, 2, 2]
    assert "prompts_per_step = 2: 3 ranks were started" in done[0].err
    assert done[1].err == done[2].err == ""
    assert not run.exists()


@pytest.mark.vllm
@pytest.mark.long
def test_torchrun_starts_a_failed_job_again_from_its_last_checkpoint(home: Path, alone: Path) -> None:
    """The real launcher and real starts: a reward kills one rank in the fourth step, once."""
    killer = home / "killer.py"
    killer.write_text(
        f"""
import os, pathlib, signal

def score(completions, trainer_state, **kwargs):
    mark = pathlib.Path({str(home)!r}) / "killed"
    if trainer_state.global_step == 4 and not mark.exists():
        mark.touch()
        os.kill(os.getppid(), signal.SIGKILL)
    return [sum(c.isalpha() for c in completion[-1]["content"]) / 100 for completion in completions]
"""
    )
    tables = f"rewards=[{{function='{killer}:score'}}, {{function='{home / 'scores.py'}:length'}}]"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1",
        "--monitor-interval", "1", "-m", "grpo.train", str(home / "config.toml"), "--set", tables,
        "--output", str(home / "restarted"),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (home / "killed").exists()
    assert [entry["step"] for entry in read_metrics(home / "restarted")] == [1, 2, 3, 4, 5]
    assert same_tokens(alone, home / "restarted") and distance(alone, home / "restarted") < 1e-5
