"""grpo/rollout/vllm_start.py: vLLM's own way is back after a start or a stop, whatever became of it."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from grpo.rollout.vllm_start import SAMPLES, quick_start, without_searches


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_it_stays(fails: bool) -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    own, collect = getattr(GPUModelRunner, SAMPLES), gc.collect
    try:
        with quick_start():
            # vLLM's names: one that it no longer has would bring back nine seconds.
            assert getattr(GPUModelRunner, SAMPLES) is not own
            assert getattr(GPUModelRunner, SAMPLES)(None, hidden_states=torch.zeros(3)).numel() == 0
            assert gc.collect() == 0 == gc.collect(1) and not gc.isenabled()
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert getattr(GPUModelRunner, SAMPLES) is own and gc.collect is collect and gc.isenabled()


@pytest.mark.parametrize("enabled", [False, True])
def test_what_was_switched_off_before_stays_so(enabled: bool) -> None:
    was = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with without_searches(), without_searches():
            assert not gc.isenabled() and gc.collect() == 0
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_a_vllm_with_its_runner_elsewhere_starts_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_model_runner", None)
    collect = gc.collect
    with quick_start():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.collect is collect


def test_every_start_has_a_pool_of_its_own_for_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gives a pool up with the last graph in it, and vLLM keeps its number."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "_global_graph_pool", (0, 1))  # vLLM's name
    with quick_start():
        assert type(current_platform)._global_graph_pool is None
