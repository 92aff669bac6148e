"""How a checkpoint says that its weights are quantised: which kinds are read, and what of a weight shares a scale.

The kinds are bitsandbytes' NF4 and int8, and 8 bit with scales for whole tensors, rows or blocks, as FP8 is written by
transformers ("fp8", of Qwen, DeepSeek and Mistral, and "fbgemm_fp8"), by compressed-tensors and by ModelOpt, the last
of which has a file of its own; and MXFP4 of experts, as gpt-oss is published. What tensors in 8 bit hold is read in
`eight_bit_source.py`. Torch is not imported: a memory plan asks here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo.errors import UserError
from grpo.model.checks import one_line, read_object

SCALES = ("weight_scale_inv", "weight_scale", "SCB")
"""Last parts of the names of a weight's scales."""
FORM, ZERO_POINT = "weight_format", "weight_zero_point"
"""bitsandbytes' number of the order of codes, 0 for row after row; compressed-tensors' zero points."""

MODELOPT_FILE = "hf_quant_config.json"
"""ModelOpt's own, beside config.json."""
DENSE_OR_8BIT = ("dense", "float-quantized", "int-quantized", "naive-quantized", "mixed-precision")
"""Formats of compressed-tensors in which a weight is itself, or one code a number."""
MXFP4_ENTRIES = ("_blocks", "_scales")
"""What follows the name of experts in MXFP4: their codes, their exponents."""
READ_INSTEAD = "use an int8, FP8, NF4, MXFP4 (of experts) or an unquantised checkpoint"

Block = tuple[int | None, int | None]
"""Rows and columns that share a scale; None: all there are."""
MODELOPT_FP8: dict[str, Block] = {
    "FP8": (None, None), "FP8_PB_WO": (128, 128), "FP8_PER_CHANNEL_PER_TOKEN": (1, None)
}  # fmt: skip
"""ModelOpt's ways to FP8, each with what shares a scale."""


@dataclass(frozen=True)
class Quantization:
    """What a configuration says of 8-bit weights."""

    kind: str | None
    """"int8" or "FP8"; None where weights are not in 8 bit."""
    blocks: tuple[Block, ...] = ()
    """The blocks that a scale may belong to, the commonest first."""


def with_modelopt(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The entries of config.json in `folder`, with ModelOpt's own file where they say nothing of quantisation."""
    file = folder / MODELOPT_FILE
    if stated(values) or not file.is_file():
        return values
    return values | {"quantization_config": {"quant_method": "modelopt"} | read_object(file)}


def stated(values: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of a config.json, which models of several inputs may have in their text model's part."""
    for part in (values, values.get("text_config")):
        if isinstance(part, Mapping) and part.get("quantization_config"):
            return part["quantization_config"]
    return {}


def check_quantization(values: Mapping[str, Any], file: Path) -> None:
    """Raise UserError for weights that are quantised in a form which is not read. file: where `values` are from."""
    stored = stated(values)
    try:
        reason = next(complaints(stored), None)
        if reason is None:
            quantization(values)
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        reason = f"quantization_config is not understood ({one_line(error)})"
    if reason is not None:
        if isinstance(stored, Mapping) and "quantization" in stored:
            file = file.with_name(MODELOPT_FILE)
        raise UserError(f"{file}: {reason}; {READ_INSTEAD}")


def complaints(stored: Mapping[str, Any]) -> Iterator[str]:
    """What of a `quantization_config` is not read, in words."""
    method = stored.get("quant_method", "bitsandbytes")
    if method == "fp8":
        if (kind := stored.get("fmt") or "e4m3") != "e4m3":
            yield f"FP8 weights of the kind {kind!r} are not read"
    elif method == "compressed-tensors":
        yield from compressed_tensors_complaints(stored)
    elif method == "modelopt":
        algorithm = (stored.get("quantization") or stored).get("quant_algo")
        if algorithm not in (None, *MODELOPT_FP8):
            yield f"weights quantised by ModelOpt's {algorithm!r} are not read"
    elif method not in ("bitsandbytes", "fbgemm_fp8", "mxfp4"):
        yield f"weights quantised with {method!r} are not read"


def compressed_tensors_complaints(stored: Mapping[str, Any]) -> Iterator[str]:
    """The same of compressed-tensors, whose groups of layers may each be kept otherwise."""
    if (stored.get("transform_config") or {}).get("config_groups"):
        yield "weights that are rotated (transform_config) are not read"
    sparse = (stored.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        yield f"sparse weights ({sparse!r}) are not read"
    for group in (stored.get("config_groups") or {}).values():
        weights = group.get("weights") or {}
        form = group.get("format") or stored.get("format") or "dense"
        if form not in DENSE_OR_8BIT or (weights and weights.get("num_bits") != 8):
            bits = f" of {weights['num_bits']} bits" if "num_bits" in weights else ""
            yield f"weights quantised with 'compressed-tensors' as {form!r}{bits} are not read"
        if weights.get("symmetric") is False:
            yield "weights quantised with zero points (symmetric = false) are not read"


def quantization(values: Mapping[str, Any]) -> Quantization:
    """What a config.json says, one that `check_quantization` passes."""
    stored = stated(values)
    method = stored.get("quant_method", "bitsandbytes" if stored else None)
    if method == "fp8":
        block = stored.get("weight_block_size")
        return Quantization("FP8", (block_of(*block) if block else (None, None),))
    if method == "fbgemm_fp8":
        return Quantization("FP8", ((1, None),))
    if method == "bitsandbytes" and stored.get("load_in_8bit"):
        return Quantization("int8", ((1, None),))
    if method == "compressed-tensors":
        arguments = [group.get("weights") or {} for group in (stored.get("config_groups") or {}).values()]
        arguments = [one for one in arguments if one]
        kinds = ["int8" if one.get("type", "int") == "int" else "FP8" for one in arguments]
        return Quantization(kinds[0], tuple(map(strategy_block, arguments))) if kinds else Quantization(None)
    if method == "modelopt":
        algorithm = (stored.get("quantization") or stored).get("quant_algo")
        return Quantization("FP8", (MODELOPT_FP8[algorithm],)) if algorithm else Quantization(None)
    return Quantization(None)


def strategy_block(arguments: Mapping[str, Any]) -> Block:
    """What shares a scale by compressed-tensors' description of a weight."""
    strategy = arguments.get("strategy") or ("group" if arguments.get("group_size") else "tensor")
    if strategy == "block" and arguments.get("block_structure"):
        return block_of(*arguments["block_structure"])
    if strategy == "group":
        return block_of(1, arguments["group_size"])
    return (1, None) if strategy == "channel" else (None, None)


def block_of(rows: Any, columns: Any) -> Block:
    """Raises ValueError for what is no size."""
    if any(not isinstance(size, int) or isinstance(size, bool) or size < 1 for size in (rows, columns)):
        raise ValueError(f"blocks of {rows} x {columns}")
    return rows, columns


def weight_of(name: str) -> str:
    """The weight that the entry `name` goes with, if it is one of its scales; `name` itself otherwise."""
    layer, _, entry = name.rpartition(".")
    return f"{layer}.weight" if layer and entry in (*SCALES, FORM, ZERO_POINT) else name
