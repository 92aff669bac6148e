"""grpo/run/importing.py: what is left out of a command's imports is there afterwards, for whoever asks for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

CODE = """
import gc, importlib.util, sys
from grpo.run.importing import UNUSED, lean
with lean():
    import grpo.training.run
    assert all(importlib.util.find_spec(name) is None for name in UNUSED)
assert gc.isenabled() and not set(UNUSED) & set(sys.modules), sorted(sys.modules)
assert importlib.util.find_spec("bitsandbytes") is not None
import torch
from peft import LoraConfig, get_peft_model
get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
assert not set(UNUSED) & set(sys.modules), "an adapter is put on a layer without them too"
from bitsandbytes.optim import AdamW8bit
print("whole")
"""


@pytest.mark.slow
def test_a_command_imports_without_what_it_does_not_use() -> None:

    assert subprocess.check_output([sys.executable, "-c", CODE], text=True, cwd=ROOT).strip().endswith("whole")


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
