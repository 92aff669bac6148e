"""SmolLM2's first layers over single bytes: a model of trained weights that takes a test as little as a random one."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from grpo.config.schema import Model
from grpo.model.source import open_source
from grpo.model.weight_source import dense
from tests.helpers.small_chat import SPECIAL, TOKENS, save_byte_tokenizer
from tests.helpers.tiny_run import SMOLLM2

EMBEDDING = "model.embed_tokens.weight"


def save_first_layers(folder: Path, layers: int) -> Path:
    """In `folder`, in bfloat16. The embedding has rows for TOKENS alone, of token 0 for bytes that SmolLM2 lacks."""
    source = open_source(Model(name=SMOLLM2))
    known = source.tokenizer().get_vocab()
    rows = torch.tensor([0] * len(SPECIAL) + [known.get(token, 0) for token in TOKENS[len(SPECIAL) :]])
    left_out = tuple(f"model.layers.{number}." for number in range(layers, source.config.num_hidden_layers))
    tensors = {name: dense(source.read(name)) for name in sorted(source.names) if not name.startswith(left_out)}
    tensors[EMBEDDING] = tensors[EMBEDDING][rows]
    config = source.config
    config.num_hidden_layers, config.vocab_size = layers, len(TOKENS)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = range(len(SPECIAL))
    config.save_pretrained(folder)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return save_byte_tokenizer(folder)
