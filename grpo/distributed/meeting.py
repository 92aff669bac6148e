"""Where the ranks of one start of a job meet: a store that rank 0 opens for this start alone.

torchrun's own store outlives a start, and what was said in it before lies there still. Which start a rank belongs to it
cannot tell: every agent counts its own restarts, not all of them the same ones, and the agent of a machine that came
later has counted none. So rank 0 opens a store each time and writes its port into torchrun's, where the others try
until one answers: by then the processes of the start before are gone, and so is their store.
"""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import TCPStore

from grpo.distributed.launch import Launch

START_TIMEOUT = timedelta(minutes=10)
"""How long the ranks wait for each other to start."""
TRY_TIMEOUT = timedelta(seconds=5)
"""How long one tries a port that may be of a start before."""
PORT = "grpo/port"


def meet(launch: Launch, *, patience: timedelta = START_TIMEOUT) -> TCPStore:
    """The store of this start. Raises RuntimeError, as torch's stores do, after `patience`."""
    if not launch.store_is_there:
        return TCPStore(
            launch.address, launch.port, launch.size, is_master=launch.first, timeout=patience, multi_tenant=True
        )
    agents = TCPStore(launch.address, launch.port, is_master=False, timeout=patience, wait_for_workers=False)
    if launch.first:
        opened = TCPStore(
            launch.address, 0, launch.size, is_master=True, timeout=patience, wait_for_workers=False, multi_tenant=True
        )
        agents.set(PORT, str(opened.port))
        return opened
    return found(launch, agents, patience)


def found(launch: Launch, agents: TCPStore, patience: timedelta) -> TCPStore:
    """The store that rank 0 wrote into the `agents`' one, as soon as it answers."""
    end = time.monotonic() + patience.total_seconds()
    while True:
        port = int(agents.get(PORT))
        try:
            store = TCPStore(launch.address, port, is_master=False, timeout=TRY_TIMEOUT, wait_for_workers=False)
        except RuntimeError:
            if time.monotonic() > end:
                raise
            continue
        store.set_timeout(patience)
        return store
