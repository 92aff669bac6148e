"""Whatever kind of model's config.json is passed, what is said of it before its weights are read is one sentence."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from grpo.config.schema import parse_config
from grpo.errors import UserError
from grpo.session import read_model
from tests.helpers.tiny import COMMON


@pytest.mark.wide
@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_a_configuration_of_every_type_that_transformers_knows_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **more: object) -> None:
        raise AssertionError("the network was asked for something that nobody named")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    save_file({"another.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = parse_config({"model": {"name": str(tmp_path)}, "task": {"name": "arithmetic"}})
    for model_type in CONFIG_MAPPING_NAMES:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **COMMON}))
        with pytest.raises(UserError) as error:
            read_model(config, notice=lambda sentence: None)
        sentence = str(error.value)
        assert sentence.startswith(str(tmp_path)) and "\n" not in sentence, (model_type, sentence)


@pytest.mark.parametrize(
    ("model_type", "more", "reason"),
    [
        ("t5", {}, "it has an encoder beside its decoder; use a decoder of text"),
        ("whisper", {}, "it has an encoder beside its decoder; use a decoder of text"),
        (
            "bert",
            {},
            "its models are encoders, .* predict no next one, unless config.json says is_decoder = true; use a",
        ),
        ("xlm-roberta", {}, "its models are encoders"),
        ("distilbert", {}, "it is an encoder, as embedding models are, and predicts no next token"),
        ("vit", {}, "transformers has no causal language model of it, so it predicts no next token"),
        ("deepseek_v3", {"kv_lora_rank": 16}, r"its attention keeps keys and values in latent form \(MLA\)"),
        ("minicpm3", {"kv_lora_rank": 16}, r"its attention keeps keys and values in latent form \(MLA\)"),
        ("mamba", {}, "its configuration has no num_attention_heads, so its layers are no attention"),
        ("gpt2", {}, "transformers' GPT2LMHeadModel has no model.embed_tokens"),
    ],
)
def test_what_cannot_be_trained_says_why(model_type: str, more: dict[str, int], reason: str, tmp_path: Path) -> None:
    save_file({"another.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    plain = {} if model_type == "mamba" else COMMON
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **plain, **more}))
    config = parse_config({"model": {"name": str(tmp_path)}, "task": {"name": "arithmetic"}})
    with pytest.raises(UserError, match=f"architecture '{model_type}' is not supported: {reason}"):
        read_model(config, notice=lambda sentence: None)
