"""grpo/training/peak_memory.py: what is held, of what torch counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.training.peak_memory import PeakMemory

STRETCHES = st.lists(st.tuples(st.integers(0, 1 << 40), st.integers(0, 1 << 40)), min_size=1, max_size=8)


@given(STRETCHES)
def test_the_peak_is_of_the_stretch_that_held_most_without_what_was_released_in_it(stretches):
    counted, held = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: counted[-1])
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
        peak = PeakMemory(torch.device("cuda"))
        for allocated, released in stretches:
            counted.append(allocated)
            held.append(allocated - released)
            peak.note(released)
    assert peak.most == max(0, *held)


def test_without_a_gpu_it_is_what_the_process_has_resident():
    peak = PeakMemory(torch.device("cpu"))
    peak.note()
    assert 0.01 < peak.gib() < 1000
