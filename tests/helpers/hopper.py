"""Compiling a Triton kernel for Hopper on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for_hopper(
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    *,
    aligned: Collection[str] = (),
    warps: int = 4,
) -> dict[str, Any]:
    """What sm_90a gets of `kernel`: "ttgir", "ptx" and so on.

    `constants`: values of its constexpr parameters; `types` of the others in Triton's spelling, "i32" where not named;
    `aligned`: those that are multiples of 16.
    """
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}).asm
