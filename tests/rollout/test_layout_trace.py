"""grpo/rollout/layout_trace.py: what is kept of vLLM's layouts is what the installed vLLM has, and a family that nobody
wrote a line for is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.families.table import listed
from grpo.model.layout import Record, is_recorded
from grpo.model.layout_records import FAMILIES, LAYOUTS, SEEN
from grpo.model.source import open_source
from grpo.session import find_layout
from grpo.training.self_check import check_start
from tests.helpers.families import NEWCOMERS, family_config, spread
from tests.helpers.family_tail import TAIL
from tests.helpers.graph_comparison import gate_session
from tests.helpers.tiny import COMMON
from tests.helpers.tiny import FAMILIES as FIRST

pytestmark = pytest.mark.vllm
EVERY = list(dict.fromkeys([*FIRST, *NEWCOMERS, *TAIL]))
QUICK = ("llama", "phi3", "nemotron", "smollm3")


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.wide) for name in EVERY],
)
def test_what_is_kept_of_a_family_is_what_vllm_has(family: str) -> None:
    from grpo.rollout.layout_trace import trace
    from tests.helpers.write_layouts import version

    config = AutoConfig.for_model(family, **{**COMMON, **FIRST[family]}) if family in FIRST else family_config(family)
    found = trace(config).digest()
    assert found == FAMILIES[family]
    assert SEEN.get(version(), {}).get(family, found) == found, "run python -m tests.helpers.write_layouts"


def test_every_listed_family_is_kept_and_digests_are_those_of_their_content() -> None:
    from grpo.model.families.table import family_of

    assert {name for name in listed() if not family_of(name).text_as} == set(FAMILIES)
    assert all(Record(**layout).digest() == digest for digest, layout in LAYOUTS.items())
    assert all(set(seen.values()) <= set(LAYOUTS) for seen in SEEN.values())


def test_a_record_holds_for_the_versions_that_were_seen() -> None:
    assert is_recorded("olmo3", "0.32.0+cpu") and not is_recorded("olmo3", "0.31.2")
    assert is_recorded("llama", "0.26.0") and is_recorded("olmo3", None)
    assert not is_recorded("starcoder2", None)


@pytest.mark.parametrize(
    "family", ["starcoder2", *(pytest.param(name, marks=pytest.mark.wide) for name in ("vaultgemma", "bitnet"))]
)
def test_a_family_that_nobody_wrote_a_line_for_passes_the_gate(family: str, tmp_path: Path) -> None:
    assert family not in listed()
    torch.manual_seed(0)
    save(tmp_path, family)
    find_layout(open_source(Model(name=str(tmp_path))).config, str(tmp_path))
    session = gate_session(tmp_path, "float32")
    try:
        notice = check_start(session)
    finally:
        session.engine.close()
    assert notice is not None and f"{family!r} is none of those that this project's tests compare" in notice


def save(folder: Path, family: str) -> None:
    # Some families have heads of 128 unless told otherwise.
    config = AutoConfig.for_model(family, **COMMON, head_dim=COMMON["hidden_size"] // COMMON["num_attention_heads"])
    spread(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "transformers' GPT2LMHeadModel has no model.embed_tokens"),
        ("phi", "transformers' PhiForCausalLM has no model.norm"),
        ("diffllama", "vLLM .* cannot build it"),
    ],
)
def test_a_decoder_that_the_two_cannot_share_is_a_sentence(family: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"architecture '{family}' is not supported: {reason}.*; use a model") as error:
        find_layout(AutoConfig.for_model(family, **COMMON), str(tmp_path))
    assert "\n" not in str(error.value)
