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


def quantize_folder_8bit(folder: Path, form: str) -> dict[str, Tensor]:
    """Turn `folder`'s projections into one of EIGHT_BIT_FORMS, as it is found on the hub; their float32 values."""
    write, config = EIGHT_BIT_FORMS[form]
    file = folder / "model.safetensors"
    tensors, values = load_file(file), {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        entries, values[name] = write(tensors[name].float())
        del tensors[name]
        tensors |= {f"{name.removesuffix('weight')}{key}": value.clone() for key, value in entries.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if "quantization" in config:
        (folder / "hf_quant_config.json").write_text(json.dumps(config))
    else:
        values_of_model = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values_of_model | {"quantization_config": config}))
    return values


Entries = dict[str, Tensor]


def bitsandbytes_int8(weight: Tensor) -> tuple[Entries, Tensor]:
    """bitsandbytes' own codes and absmax."""
    from bitsandbytes.functional import int8_vectorwise_quant

    codes, absmax, _ = int8_vectorwise_quant(weight.half())
    entries = {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return entries, codes.double().mul(absmax[:, None].double() / 127).float()


def fp8(weight: Tensor, tall: int | None, wide: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """(codes e4m3, scales a block, float32 values)."""
    rows, columns = weight.shape
    tall, wide = tall or rows, wide or columns
    padded = torch.nn.functional.pad(weight, (0, -columns % wide, 0, -rows % tall))
    blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, tall))
    scales = blocks.abs().amax((1, 3)) / 448
    whole = scales.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[:rows, :columns]
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * whole


def fp8_with(name: str, tall: int | None, wide: int | None, **others: Tensor) -> Any:
    """A writer of FP8 whose scales are called `name`; a number where they are one for the tensor."""

    def write(weight: Tensor) -> tuple[Entries, Tensor]:
        codes, scales, values = fp8(weight, tall, wide)
        return {"weight": codes, name: scales.reshape(()) if scales.numel() == 1 else scales, **others}, values

    return write


def compressed_tensors(kind: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": kind, "symmetric": True, **weights}}
    form = "float-quantized" if kind == "float" else "int-quantized"
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def int8_channels(weight: Tensor) -> tuple[Entries, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = torch.round(weight / scales).to(torch.int8)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


ONE = torch.ones(())
EIGHT_BIT_FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bitsandbytes": (bitsandbytes_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}),
    "qwen": (
        fp8_with("weight_scale_inv", 128, 128),
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    ),
    "ministral": (
        fp8_with("weight_scale_inv", None, None, activation_scale=ONE),
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    ),
    "compressed-tensor": (
        fp8_with("weight_scale", None, None, input_scale=ONE),
        compressed_tensors("float", strategy="tensor"),
    ),
    "compressed-channel": (fp8_with("weight_scale", 1, None), compressed_tensors("float", strategy="channel")),
    "compressed-block": (
        fp8_with("weight_scale", 32, 64),
        compressed_tensors("float", strategy="block", block_structure=[32, 64]),
    ),
    "compressed-int8": (int8_channels, compressed_tensors("int", strategy="channel")),
    "fbgemm": (
        fp8_with("weight_scale", 1, None, input_scale_ub=ONE),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    ),
    "modelopt": (
        fp8_with("weight_scale", None, None, input_scale=ONE),
        {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}},
    ),
}  # fmt: skip
"""Where an 8-bit checkpoint is from -> how it keeps a weight, and what its configuration says."""
