"""Checkpoints in the forms that users have them, made from a tiny model: bitsandbytes 4-bit folders and GGUF files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from safetensors.torch import load_file, save_file
from torch import Tensor


def edit_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of `folder`'s one safetensors file; None removes. Names are written with "__" for "."."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def quantize_folder(folder: Path, *, nested: bool, quant_type: str = "nf4") -> dict[str, Tensor]:
    """Turn `folder`'s projections into bitsandbytes' 4-bit form, as `save_pretrained` of a 4-bit model writes it.

    Returns bitsandbytes' own dequantised float32 weights.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    file = folder / "model.safetensors"
    tensors, plain = load_file(file), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        codes, state = quantize_4bit(tensors[name], blocksize=64, quant_type=quant_type, compress_statistics=nested)
        plain[name] = dequantize_4bit(codes, state)
        tensors[name] = codes
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": nested, "bnb_4bit_compute_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return plain


GGUF_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(file: Path, model: Any, surplus: dict[str, Tensor] | None = None) -> None:
    """The Llama `model` as llama.cpp stores it: its names, its order of rotary dimensions, a byte-level tokenizer.

    surplus: tensors to add, under the file's own names.
    """
    config = model.config
    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    write_tokenizer(writer, config)
    for name, tensor in model.state_dict().items():
        stored, heads = name, 0
        if name == "model.embed_tokens.weight":
            stored = "token_embd.weight"
        elif name == "model.norm.weight":
            stored = "output_norm.weight"
        elif name == "lm_head.weight":
            stored = "output.weight"
        else:
            _, _, layer, *inside, kind = name.split(".")
            stored = f"blk.{layer}.{GGUF_NAMES['.'.join(inside)]}.{kind}"
            heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(inside[-1], 0)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        writer.add_tensor(stored, (interleave(tensor, heads) if heads else tensor).contiguous().numpy())
    for name, tensor in (surplus or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def interleave(weight: Tensor, heads: int) -> Tensor:
    """Row 2i of a head is transformers' row i, row 2i + 1 its row i + dim / 2: llama.cpp rotates neighbours."""
    rows = weight.shape[0] // heads
    order = [half * rows // 2 + row for row in range(rows // 2) for half in (0, 1)]
    return torch.cat([head[order] for head in weight.split(rows)])


def write_tokenizer(writer: GGUFWriter, config: Any) -> None:
    special = ["<pad>", "<eos>", "<bos>"]
    symbols = [chr(0x21 + number) for number in range(94)] + [chr(0x100 + number) for number in range(100)]
    tokens = [*special, *symbols[: config.vocab_size - len(special) - 1], "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
