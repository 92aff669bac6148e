"""vLLM's environment variables are set where vLLM starts: importing this package changes none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.rollout.vllm_environment import IN_THIS_PROCESS, VARIABLES, set_environment
from tests.helpers.paths import ROOT

# Everything that a command, the Python API or a trainer's process imports before vLLM is started.
IMPORTS = """
import os
before = dict(os.environ)
import importlib, sys
for name in ("grpo", "grpo.api.loaded_policy", "grpo.session", "grpo.training.run", "grpo.rollout.episodes",
             "grpo.training.self_check", "grpo.training.evaluation", "grpo.rollout.vllm_environment"):
    importlib.import_module(name)
changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
print(sorted(changed & set(grpo_names())), "vllm" in sys.modules)
"""


@pytest.mark.slow
def test_an_import_sets_no_variable_and_imports_no_vllm() -> None:
    program = IMPORTS.replace("grpo_names()", repr(list(VARIABLES)))
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


@given(st.dictionaries(st.sampled_from(sorted(set(VARIABLES) - {IN_THIS_PROCESS}) + ["HOME"]), st.text(max_size=3)))
def test_what_the_user_has_set_stays(own: dict[str, str]) -> None:
    environment = dict(own)
    set_environment(environment)
    assert environment == VARIABLES | own


@pytest.mark.parametrize("value", ["1", "true", ""])
def test_weights_in_another_process_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=f"^{IN_THIS_PROCESS} = '{value}': vLLM samples in this process.*unset it$"):
        set_environment({IN_THIS_PROCESS: value})
