"""The gate at the start sees whatever fault is planted in whatever kind of model, in float32 and in bfloat16.

The faults are found in each model (`tests/helpers/planted.py`); of one that changes no logprob, such as a factor before
a norm, nothing is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.training import self_check
from grpo.training.self_check import check_start
from tests.helpers.families import NEWCOMERS, save_family
from tests.helpers.family_tail import TAIL
from tests.helpers.graph_comparison import gate_session
from tests.helpers.planted import faults
from tests.helpers.tiny import save_tiny

pytestmark = [pytest.mark.vllm, pytest.mark.wide]

KINDS = {
    "dense": "llama",
    "windows": "cohere2",
    "states": "qwen3_5_text",
    "convolutions": "lfm2",
    "layers of several sizes": "gemma4_text",
    "experts": "qwen3_moe",
    "sinks": "gpt_oss",
}


@pytest.fixture(
    scope="module",
    params=[*((kind, "bfloat16") for kind in KINDS), ("dense", "float32"), ("states", "float32")],
    ids=lambda each: f"{each[0]}-{each[1]}",
)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    kind, dtype = request.param
    folder, family = tmp_path_factory.mktemp("model"), KINDS[kind]
    (save_family if family in NEWCOMERS | TAIL else save_tiny)(folder, family)
    opened = gate_session(folder, dtype)
    yield opened
    opened.engine.close()


def acts(session: Any, fault: Any) -> bool:
    """Whether the fault changes a logprob, of the graph's that it is in or of vLLM's."""
    prompt = self_check.gate_prompt(session)
    with self_check.served_move(session, self_check.even_move):
        before = self_check.sample(session, prompt, 1.0)
        ours = self_check.scored(session.policy, prompt, before)
        with fault():
            after = self_check.sample(session, prompt, 1.0)
            same = after.tokens == before.tokens and torch.equal(after.logprobs, before.logprobs)
            return not same or not torch.equal(self_check.scored(session.policy, prompt, before), ours)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_planted_fault_is_a_sentence(session: Any, data: st.DataObject) -> None:
    planted = faults(session)
    # Adapters are many: a kind of fault is drawn before one of its kind.
    groups = sorted({name.split(" of ")[0] if "adapter" in name else name for name in planted})
    group = data.draw(st.sampled_from(groups))
    name = data.draw(st.sampled_from([each for each in planted if each == group or each.startswith(f"{group} of ")]))
    try:
        with planted[name]():
            check_start(session)
    except UserError as error:
        assert str(error).startswith("self-test: ") and "\n" not in str(error)
    else:
        assert not acts(session, planted[name]), name


def test_without_a_fault_it_passes(session: Any) -> None:
    assert check_start(session) is None
