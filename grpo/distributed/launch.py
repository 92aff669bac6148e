"""What torchrun tells a process of its place among the others, read once and then taken out of the environment.

vLLM and the libraries below it would act on the same variables: here each process has a vLLM of its own, alone in its
world. So each also sees one GPU only, its own, as the first. Nothing is connected here (grpo/distributed/ranks.py
does), and torch is not imported: the GPU must be chosen before CUDA looks.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from dataclasses import dataclass

from grpo.errors import UserError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What every launcher of torch.distributed sets."""
TORCHRUN_VARIABLES = (
    "GROUP_RANK", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "TORCHELASTIC_MAX_RESTARTS", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
)  # fmt: skip
"""What torchrun sets besides."""


class RankLost(Exception):
    """Another process of the job ended while this one waited for it."""


@dataclass(frozen=True)
class Launch:
    """One process's place in a job. `Launch()` is a process by itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Which of its machine's processes it is."""
    address: str = ""
    port: int = 0
    """Of the store through which the processes find each other."""
    store_is_there: bool = False
    """Whether torchrun keeps that store; otherwise rank 0 does."""
    restarts: int = 0
    """How many times this machine's torchrun started its processes again; other machines' may have counted others."""

    @property
    def first(self) -> bool:
        """Whether this process writes what is written once: the run folder and the screen."""
        return self.rank == 0


def read_launch(environment: MutableMapping[str, str] = os.environ) -> Launch:
    """This process's place by `environment`, which loses every such variable; afterwards CUDA shows one GPU.

    Raises UserError where only some of the variables are there.
    """
    if environment.get("WORLD_SIZE", "1") == "1":
        for name in (*RANK_VARIABLES, *TORCHRUN_VARIABLES):
            environment.pop(name, None)
        return Launch()
    if missing := [name for name in RANK_VARIABLES if name not in environment]:
        raise UserError(f"WORLD_SIZE is set and {missing[0]} is not; start several processes with torchrun")
    values = {name: environment.pop(name, "") for name in (*RANK_VARIABLES, *TORCHRUN_VARIABLES)}
    try:
        launch = Launch(
            rank=int(values["RANK"]),
            size=int(values["WORLD_SIZE"]),
            local_rank=int(values["LOCAL_RANK"]),
            address=values["MASTER_ADDR"],
            port=int(values["MASTER_PORT"]),
            store_is_there=values["TORCHELASTIC_USE_AGENT_STORE"] == "True",
            restarts=int(values["TORCHELASTIC_RESTART_COUNT"] or 0),
        )
        show_one_gpu(launch.local_rank, environment)
    except ValueError:
        shown = ", ".join(f"{name}={values[name]}" for name in RANK_VARIABLES)
        raise UserError(f"{shown}: not what torchrun sets; start several processes with torchrun") from None
    return launch


def show_one_gpu(number: int, environment: MutableMapping[str, str]) -> None:
    """Let CUDA show this process the GPU `number` of those that the job may use, and no other."""
    shown = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = None if shown is None else [gpu for gpu in shown.split(",") if gpu]
    if gpus is None:
        environment["CUDA_VISIBLE_DEVICES"] = str(number)
    else:
        # Past the last there is none; that other ranks have one is for them to compare.
        environment["CUDA_VISIBLE_DEVICES"] = gpus[number] if number < len(gpus) else ""


def check_share(prompts: int, ranks: int) -> None:
    """Raise UserError for more ranks than prompts a step."""
    if ranks > prompts:
        raise UserError(
            f"rollout.prompts_per_step = {prompts}: {ranks} ranks were started, and a group of completions is never "
            "divided; raise it, or start fewer"
        )


def refuse_several(command: str, environment: MutableMapping[str, str] = os.environ) -> None:
    """Raise UserError if torchrun started this process as one of several: `command` runs in one."""
    if environment.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"{command} uses one GPU; start it without torchrun (grpo.train runs under it)")
