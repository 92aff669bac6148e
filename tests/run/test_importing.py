"""A command's imports: what is left out of them (grpo/run/importing.py) is there afterwards for whoever asks for it;
none sets a variable for vLLM or imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from grpo.rollout.vllm_environment import VARIABLES
from tests.helpers.paths import ROOT

# Everything that a command, the Python API or a trainer's process imports before vLLM is started.
CODE = """
import gc, importlib, importlib.util, json, os, sys
before = dict(os.environ)
from grpo.run.importing import UNUSED, lean
with lean():
    for name in ("grpo", "grpo.api.loaded_policy", "grpo.session", "grpo.training.run", "grpo.rollout.episodes",
                 "grpo.training.self_check", "grpo.training.evaluation", "grpo.rollout.vllm_environment"):
        importlib.import_module(name)
    assert all(importlib.util.find_spec(name) is None for name in UNUSED)
changed = [name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)]
assert gc.isenabled() and not set(UNUSED) & set(sys.modules), sorted(sys.modules)
has_vllm = "vllm" in sys.modules
assert importlib.util.find_spec("bitsandbytes") is not None
import torch
from peft import LoraConfig, get_peft_model
get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
assert not set(UNUSED) & set(sys.modules), "an adapter is put on a layer without them too"
from bitsandbytes.optim import AdamW8bit
print(json.dumps({"changed": changed, "vllm": has_vllm}))
"""


@pytest.mark.slow
def test_a_command_imports_without_what_it_does_not_use_and_leaves_vllm_alone() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["vllm"] and not set(found["changed"]) & set(VARIABLES)


def test_what_was_imported_before_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo.run import importing

    monkeypatch.setattr(importing, "UNUSED", ("json", "wave"))
    monkeypatch.delitem(sys.modules, "wave", raising=False)
    with importing.lean():
        import json

        assert json.dumps(1) == "1"
        with pytest.raises(ImportError):
            import wave
        from importlib.util import find_spec

        assert find_spec("wave") is None
    import wave  # noqa: F811

    assert find_spec("wave") is not None, "whoever imported it by name is told the truth afterwards"
    assert wave.__name__ == "wave"
