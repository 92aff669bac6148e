"""Weights as bitsandbytes keeps them in a 4-bit checkpoint: NF4 codes, and block scales that are quantised once more.

What `save_pretrained` of a model loaded with `load_in_4bit` and double quantisation writes, made without bitsandbytes
and tested against it. Reading such entries is `source.py`'s, the codes are `kernels/nf4.py`'s.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grpo.kernels import nf4
from grpo.kernels.nf4_lookup import CODE
from grpo.model.safetensors_source import NF4_STATE

SCALES_PER_BLOCK = 256
"""Scales of 64 weights each that share one scale of their own."""


@cache
def dynamic_map() -> Tensor:
    """The 256 values that scales are rounded to, ascending, float32.

    For every power of ten from 1e-6 to 1, the centres of 1, 2, 4, ... 64 equal parts of [0.1, 1], in both signs, and
    0 and 1: the dynamic tree of Dettmers, arXiv:1511.04561, as bitsandbytes has it.
    """
    values = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1)
        centres = (edges[:-1] + edges[1:]) / 2 * 10 ** (exponent - 6)
        values += [centres, -centres]
    return torch.cat(values).sort().values


def quantise_scales(absmax: Tensor) -> dict[str, Any]:
    """Scales float32 [n] -> "absmax" uint8 [n], "nested_absmax" float32 [n / 256 rounded up], "offset" float."""
    offset = absmax.mean()
    centred = absmax - offset
    padded = torch.nn.functional.pad(centred, (0, -len(centred) % SCALES_PER_BLOCK)).view(-1, SCALES_PER_BLOCK)
    largest = padded.abs().amax(1)
    unit = (padded * (1.0 / largest.clamp(min=1e-38))[:, None]).clamp(-1, 1)
    bounds = (dynamic_map()[:-1] + dynamic_map()[1:]) / 2
    codes = torch.bucketize(unit.view(-1), bounds, out_int32=True).to(torch.uint8)
    return {"absmax": codes[: len(centred)].clone(), "nested_absmax": largest, "offset": float(offset)}


def packed_entries(name: str, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Checkpoint entries of `weight` [out, in] float, `in` a multiple of 64; `dtype`: what it is to be unpacked to."""
    codes, absmax = nf4.quantize(weight)
    scales = quantise_scales(absmax)
    state = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
        "nested_blocksize": SCALES_PER_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": scales["offset"],
    }
    return {
        name: codes,
        f"{name}.absmax": scales["absmax"],
        f"{name}.quant_map": torch.tensor(CODE, dtype=torch.float32),
        f"{name}.nested_absmax": scales["nested_absmax"],
        f"{name}.nested_quant_map": dynamic_map().clone(),
        f"{name}{NF4_STATE}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def unpacked(name: str, entries: dict[str, Tensor]) -> Tensor:
    """The weight that a reader makes of `packed_entries`, float32."""
    state = json.loads(bytes(entries[f"{name}{NF4_STATE}"].tolist()))
    nested = entries[f"{name}.nested_absmax"], entries[f"{name}.nested_quant_map"], state["nested_offset"]
    scales = nf4.unnest_absmax(entries[f"{name}.absmax"], *nested)
    return nf4.dequantize_bitsandbytes(entries[name], scales, tuple(state["shape"]), torch.float32)


def quantization_config(dtype: torch.dtype, dense: list[str]) -> dict[str, Any]:
    """The entry of config.json that tells transformers and vLLM the form; modules named in `dense` are not packed."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
