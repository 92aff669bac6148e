"""What a checkpoint offers to its reader, of whatever kind it is.

A `Source` names its tensors as transformers does and reads them one at a time, so that loading never holds more than
one 16-bit tensor. The kinds are in `safetensors_source.py` and `gguf_source.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from grpo.kernels import eight_bit, mxfp4, nf4
from grpo.model.decoder_config import DecoderConfig
from grpo.model.vision import Vision


@dataclass(frozen=True)
class NF4Tensor:
    """A weight as bitsandbytes stores it.

    `codes` uint8 [out * in / 2], two codes a byte, even column in the high half; `absmax` float32 [out * in / 64].
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        return nf4.dequantize_bitsandbytes(self.codes, self.absmax, self.shape, dtype)


@dataclass(frozen=True)
class EightBitTensor:
    """A weight in 8 bit, as kernels/eight_bit.py has it: `codes` int8 or float8_e4m3fn [out, in], `scales` float32."""

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in `dtype`."""
        return eight_bit.dequantize(self.codes, self.scales, dtype)


@dataclass(frozen=True)
class MXFP4Tensor:
    """Matrices of experts in MXFP4, which a graph has transposed: `codes` uint8 [experts, out, in / 32, 16], the even
    column in the low half of a byte, and `exponents` uint8 [experts, out, in / 32]."""

    codes: Tensor
    exponents: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, blocks, _ = self.codes.shape
        return experts, blocks * mxfp4.BLOCK, rows

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrices [experts, in, out] in `dtype`; exact in bfloat16 and float32."""
        experts, columns, rows = self.shape
        matrices = torch.empty(experts, rows, columns, dtype=dtype, device=self.codes.device)
        for matrix, codes, exponents in zip(matrices, self.codes, self.exponents, strict=True):
            matrix.copy_(mxfp4.value(codes, exponents, dtype))
        return matrices.mT


Packed = NF4Tensor | EightBitTensor | MXFP4Tensor


def dense(weight: Tensor | Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """`weight`, dequantised to `dtype` where it is packed, else as it is."""
    return weight if isinstance(weight, Tensor) else weight.dense(dtype)


class Source(Protocol):
    """A checkpoint that can be read tensor by tensor."""

    path: Path
    config: DecoderConfig
    """transformers' configuration of the decoder of text."""
    names: set[str]
    notices: list[str]
    """A sentence each about what of the checkpoint is not read."""
    vision: Vision | None
    """What the model says of images; None where they are not read."""
    tower: dict[str, str]
    """The vision tower's tensors, as transformers' module has them -> as `read` knows them."""

    @property
    def stored_as(self) -> str:
        """What most of the weights are kept in: "bfloat16", "float16", "float32", "NF4", "int8", "FP8", or a GGUF type
        as "Q4_1"."""
        ...

    def read(self, name: str) -> Tensor | Packed:
        """The tensor called `name`, on the CPU, in the checkpoint's precision."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives, without reading the values."""
        ...

    def stored_name(self, name: str) -> str:
        """What the checkpoint calls the tensor `name`."""
        ...

    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        ...
