"""Families that overflow in float16 are refused with a sentence, before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest

from grpo.config.schema import parse_config
from grpo.errors import UserError
from grpo.session import read_model
from tests.helpers.small_chat import save_small_chat_model
from tests.helpers.tiny import FAMILIES, save_tiny


def read(folder: Any, dtype: str) -> Any:
    """The model of `folder` but its weights, to be computed in `dtype`."""
    tables = {"model": {"name": str(folder), "dtype": dtype, "device": "cpu"}, "task": {"name": "arithmetic"}}
    return read_model(parse_config(tables), notice=lambda sentence: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_that_overflows_in_float16_is_refused(family, tmp_path):
    save_small_chat_model(tmp_path)
    save_tiny(tmp_path, family, vocab_size=259, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    assert read(tmp_path, "bfloat16").tokenizer
    if family not in ("gemma2", "gemma3_text"):
        assert read(tmp_path, "float16").tokenizer
        return
    with pytest.raises(UserError) as error:
        read(tmp_path, "float16")
    said = f"{tmp_path / 'config.json'}: the activations of {family} overflow in float16, which vLLM refuses; "
    assert str(error.value).startswith(said) and 'model.dtype = "bfloat16"' in str(error.value)


@pytest.mark.vllm
def test_they_are_those_that_vllm_refuses():
    from vllm.config import model

    from grpo.model.checks import BEYOND_FLOAT16
    from grpo.model.families.table import listed

    assert set(BEYOND_FLOAT16) == set(model._FLOAT16_NOT_SUPPORTED_MODELS) & set(listed())
