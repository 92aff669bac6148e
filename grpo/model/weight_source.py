"""What a checkpoint offers to its reader, of whatever kind it is.

A `Source` names its tensors as transformers does and reads them one at a time, so that loading never holds more than
one 16-bit tensor. The kinds are in `safetensors_source.py` and `gguf_source.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from grpo.model.decoder_config import DecoderConfig


@dataclass(frozen=True)
class NF4Tensor:
    """A weight as bitsandbytes stores it.

    `codes` uint8 [out * in / 2], two codes a byte, even column in the high half; `absmax` float32 [out * in / 64].
    """

    codes: Tensor
    absmax: Tensor
    shape: tuple[int, int]


class Source(Protocol):
    """A checkpoint that can be read tensor by tensor."""

    path: Path
    config: DecoderConfig
    """transformers' configuration of the decoder of text."""
    names: set[str]
    notices: list[str]
    """A sentence each about what of the checkpoint is not read."""

    @property
    def stored_as(self) -> str:
        """What most of the weights are kept in: "bfloat16", "float16", "float32", "NF4", or a GGUF type as "Q4_1"."""
        ...

    def read(self, name: str) -> Tensor | NF4Tensor:
        """The tensor called `name`, on the CPU, in the checkpoint's precision."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that `read` gives, without reading the values."""
        ...

    def tokenizer(self) -> Any:
        """transformers' tokenizer."""
        ...
