"""The most memory that a run has held so far.

Not here: what is to be expected before anything is loaded (grpo/memory).
"""

from __future__ import annotations

import resource

import torch


class PeakMemory:
    """On a GPU what torch allocated, in a process without one what was resident.

    torch goes on counting a KV cache whose memory was released, so whoever releases it says when a stretch of the run
    is over and how much of what torch counts was not held in it.
    """

    def __init__(self, device: torch.device):
        self.device, self.most = device, 0

    def note(self, released: int = 0) -> None:
        """A stretch is over in which `released` bytes of those that torch counts were not held."""
        if self.device.type == "cuda":
            self.most = max(self.most, torch.cuda.max_memory_allocated(self.device) - released)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def gib(self) -> float:
        """The most so far, in 2^30 bytes."""
        return self.most / 2**30
