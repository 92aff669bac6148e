"""vLLM's environment variables are set where vLLM starts; that an import sets none is tests/run/test_importing.py's."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo.errors import UserError
from grpo.rollout.vllm_environment import IN_THIS_PROCESS, PROMPT_GRAPHS, VARIABLES, set_environment


@given(st.dictionaries(st.sampled_from(sorted(set(VARIABLES) - {IN_THIS_PROCESS}) + ["HOME"]), st.text(max_size=3)))
def test_what_the_user_has_set_stays(own: dict[str, str]) -> None:
    environment = dict(own)
    set_environment(environment)
    assert environment == VARIABLES | own


@pytest.mark.parametrize("own", [{}, {PROMPT_GRAPHS: "0"}, {PROMPT_GRAPHS: "1"}])
@pytest.mark.parametrize(("wanted", "imported"), [(True, False), (True, True), (False, False)])
def test_graphs_of_prompts_are_asked_for_before_vllm_is_imported(
    own: dict[str, str], wanted: bool, imported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    if imported:
        monkeypatch.setitem(sys.modules, "vllm", pytest)
    environment = dict(own)
    set_environment(environment, prompt_graphs=wanted)
    ours = {PROMPT_GRAPHS: "1"} if wanted and not imported else {}
    assert environment == VARIABLES | ours | own


@pytest.mark.parametrize("value", ["1", "true", ""])
def test_weights_in_another_process_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=f"^{IN_THIS_PROCESS} = '{value}': vLLM samples in this process.*unset it$"):
        set_environment({IN_THIS_PROCESS: value})
