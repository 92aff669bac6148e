"""The state of torch's generators, taken before something is computed so that it can be computed again with the same
dropout: a layer in the backward pass, a step that ran out of memory, an update that is replayed elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class RandomState:
    """The generators on the CPU and on `device`, as they are now or as `states` says.

    `states`: "cpu" and, of a GPU, "cuda"; kept as such in dumps.
    """

    def __init__(self, device: torch.device, states: Mapping[str, Tensor] | None = None):
        self.device = device
        self.states = dict(states) if states is not None else current_states(device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Draw from this state inside, and from where the generators were afterwards."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            self.restore()
            yield

    def restore(self) -> None:
        """Go back to this state; on a GPU only its own generator's, where the state has one."""
        torch.set_rng_state(self.states["cpu"])
        if self.device.type == "cuda" and "cuda" in self.states:
            torch.cuda.set_rng_state(self.states["cuda"], self.device)


def current_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators on the CPU and on `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
