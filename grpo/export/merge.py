"""A base with an adapter folded in, W + s B A, read tensor by tensor: what every export of a whole model is made of.

`MergedSource` is a `Source` like the base below it and holds no more than one weight at a time. The sum is made in
float32 and left there; the one rounding is the writer's. Only plain LoRA on linear layers is taken: what else an
adapter may hold (DoRA, trained biases, embeddings or whole modules) is refused, never left out silently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.kernels import nf4
from grpo.model.safetensors_source import damage_as_user_error
from grpo.model.weight_source import NF4Tensor, Source
from grpo.policy.adapter_files import check_plain_lora
from grpo.run.model_reference import ADAPTER_CONFIG, read_adapter_config

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Delta:
    """The update of one weight, s B A. `a` [r, in] and `b` [out, r] float32."""

    a: Tensor
    b: Tensor
    scale: float


class Adapter:
    """A LoRA adapter in peft's format, read one weight at a time. `config` is its adapter_config.json."""

    def __init__(self, folder: Path):
        """Raises UserError for a folder without an adapter, and for one that is not plain LoRA."""
        from safetensors import safe_open

        self.folder = folder
        self.config = read_adapter_config(folder)
        check_plain_lora(self.config, folder / ADAPTER_CONFIG)
        self.file = folder / ADAPTER_WEIGHTS
        if not self.file.is_file():
            raise UserError(f"{folder}: no {ADAPTER_WEIGHTS}; pickled adapters can run code and are never loaded")
        with damage_as_user_error(self.file):
            self._handle = safe_open(self.file, framework="pt")
            self.modules = self._find_modules(set(self._handle.keys()))

    def _find_modules(self, names: set[str]) -> set[str]:
        modules = set()
        for name in names:
            module, dot, kind = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
            if not dot or kind not in ("A.weight", "B.weight"):
                raise UserError(f"{self.file}: holds {name}, which is not LoRA on a linear layer and cannot be merged")
            modules.add(module)
        unpaired = next((module for module in sorted(modules) if not self._keys(module) <= names), None)
        if unpaired is not None or not modules:
            raise UserError(f"{self.file}: {unpaired or 'every layer'} lacks its lora_A or lora_B; copy it again")
        return modules

    @staticmethod
    def _keys(module: str) -> set[str]:
        return {f"{PEFT_PREFIX}{module}.lora_A.weight", f"{PEFT_PREFIX}{module}.lora_B.weight"}

    def delta(self, module: str) -> Delta:
        """The update of the linear layer `module` (transformers' name)."""
        with damage_as_user_error(self.file):
            a, b = (self._handle.get_tensor(key).float() for key in sorted(self._keys(module)))
        rank = a.shape[0]
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return Delta(a, b, self.config["lora_alpha"] / divisor)

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of the layer that the update of `module` fits. Raises UserError if A and B do not match."""
        with damage_as_user_error(self.file):
            a, b = (tuple(self._handle.get_slice(key).get_shape()) for key in sorted(self._keys(module)))
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise UserError(f"{self.file}: A {a} and B {b} of {module} do not belong together; copy it again")
        return b[0], a[1]


class MergedSource:
    """`base` with `adapter` folded in (None: as it is), under the interface of a Source. Weights are dense."""

    def __init__(self, base: Source, adapter: Adapter | None):
        """base: one that is accounted for. Raises UserError where the adapter's layers are not those of the base."""
        self.base, self.adapter = base, adapter
        self.path, self.config, self.stored_as = base.path, base.config, base.stored_as
        self.names, self.notices = set(base.names), base.notices
        if adapter is not None:
            check_fits(adapter, base, self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """As the base's."""
        return self.base.shape(name)

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU: float32 where the adapter or dequantising changed it, else as stored."""
        weight = self.base.read(name)
        if isinstance(weight, NF4Tensor):
            weight = nf4.dequantize_bitsandbytes(weight.codes, weight.absmax, weight.shape, torch.float32)
        module = name.removesuffix(".weight")
        if self.adapter is None or module not in self.adapter.modules or module == name:
            return weight
        delta = self.adapter.delta(module)
        return torch.addmm(weight.float(), delta.b, delta.a, alpha=delta.scale)

    def tokenizer(self) -> Any:
        """As the base's."""
        return self.base.tokenizer()


def check_fits(adapter: Adapter, base: Source, names: set[str]) -> None:
    """Raise UserError unless every layer of `adapter` is one of the base, of the same shape."""
    for module in sorted(adapter.modules):
        name = f"{module}.weight"
        if name not in names:
            raise UserError(f"{adapter.folder}: the adapter changes {module}, which {base.path} lacks; {OTHER_BASE}")
        ours, theirs = adapter.shape(module), base.shape(name)
        if ours != theirs:
            raise UserError(
                f"{adapter.folder}: the adapter's {module} is {ours[0]} x {ours[1]}, that of {base.path} "
                f"{' x '.join(map(str, theirs))}; {OTHER_BASE}"
            )


OTHER_BASE = "it was trained on another base, name that one with --base"
