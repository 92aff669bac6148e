"""grpo/rollout/vllm_delta_tiles.py: of the choices that vLLM's kernels have, one is left, a middle one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import triton

from grpo.rollout import vllm_delta_tiles
from grpo.rollout.vllm_delta_tiles import distance, settle_tiles, tuner_of


def choices(**sides: list[int]) -> list[triton.Config]:
    """As vLLM's kernels have them."""
    (name, sizes) = next(iter(sides.items())) if sides else ("", [0])
    return [
        triton.Config({name: size} if name else {}, num_warps=warps, num_stages=stages)
        for size in sizes
        for warps in (2, 4, 8)
        for stages in (2, 3, 4)
    ]


def test_each_kernel_keeps_one_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = SimpleNamespace(configs=choices(BK=[32, 64, 128]), fn=None)
    wrapped = SimpleNamespace(fn=SimpleNamespace(fn=tuner))  # heuristics around a tuner around a kernel
    other = SimpleNamespace(configs=choices(), fn=None)
    module = SimpleNamespace(kernel=wrapped, again=tuner, other=other, number=3, name="x")
    monkeypatch.setattr(vllm_delta_tiles, "modules", lambda: iter([module]))
    assert settle_tiles() == 2 and settle_tiles() == 0
    (kept,) = tuner.configs
    assert (kept.kwargs, kept.num_warps, kept.num_stages) == ({"BK": 64}, 4, 2)
    assert len(other.configs) == 1 and tuner_of(3) is None
    assert distance(kept) == (1, 0, 1)


@pytest.mark.gpu
def test_vllms_kernels_have_choices() -> None:
    from grpo.rollout.vllm_environment import set_environment

    set_environment()
    found = [tuner_of(value) for module in vllm_delta_tiles.modules() for value in vars(module).values()]
    assert any(tuner is not None for tuner in found)
