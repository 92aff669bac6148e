"""The processes of one run: what they tell each other, over groups of their own.

Every rank has the whole model, its own vLLM and the same optimiser; it samples a share of each step's prompts. Twice a
step the ranks meet: after the rollout, where each tells the others the rewards and lengths of its completions, and
after the backward pass, where gradients are summed. Completions themselves stay where they were sampled.

torch's default process group is vLLM's, which is alone in each process; so the groups here are not registered with
torch at all. Messages are JSON and safetensors (grpo/run/tensor_state.py), never pickle. Not here: who is started where
(grpo/distributed/launch.py), where they find each other (meeting.py), and what a step is (grpo/training/trainer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import PrefixStore, ProcessGroupGloo

from grpo.distributed.launch import Launch, RankLost
from grpo.distributed.meeting import meet
from grpo.errors import UserError
from grpo.run.tensor_state import packed, unpacked

ROLLOUT_TIMEOUT = timedelta(hours=12)
"""How long one waits for the others' rollouts. A rank that dies is noticed at once, by its closed connection."""


class Ranks:
    """The processes of a run as one of them sees them. `Ranks()` is a run of one: nothing is sent."""

    def __init__(self, rank: int = 0, size: int = 1, control: Any = None, gradients: Any = None):
        """`control` exchanges messages on the CPU, `gradients` sums tensors where they are: torch's process groups."""
        self.rank, self.size = rank, size
        self._control, self._gradients = control, gradients
        self.bytes_sent = 0
        """What this rank has handed over so far, each message and gradient counted once."""
        self.check: Callable[[], None] = lambda: None
        """Asked first where a rank is lost: raises if this run was asked to end as well."""

    @property
    def first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank; nested plain values and tensors, which arrive on the CPU."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(packed(value)), dtype=torch.uint8)
        self.bytes_sent += len(message)
        with self._waiting():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            self._control.allgather([sizes], [torch.tensor([len(message)])]).wait()
            longest = int(max(sizes))
            padded = torch.zeros(longest, dtype=torch.uint8)
            padded[: len(message)] = message
            received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
            self._control.allgather([received], [padded]).wait()
        pairs = zip(received, sizes, strict=True)
        return [unpacked(data[: int(length)].numpy().tobytes()) for data, length in pairs]

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's `value`."""
        if self.size == 1:
            return value
        data = torch.frombuffer(bytearray(packed(value)), dtype=torch.uint8) if self.first else torch.empty(0)
        length = torch.tensor([len(data)])
        with self._waiting():
            self._control.broadcast([length]).wait()
            if not self.first:
                data = torch.empty(int(length), dtype=torch.uint8)
            self._control.broadcast([data]).wait()
        if self.first:
            self.bytes_sent += len(data)
            return value
        return unpacked(data.numpy().tobytes())

    def gather_indexed(self, local: dict[int, Any], count: int) -> list[Any]:
        """The `count` values of all ranks in order, of which this one has `local`, by place."""
        indexed = {index: value for values in self.gather(local) for index, value in values.items()}
        return [indexed[index] for index in range(count)]

    @torch.no_grad()
    def broadcast_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Give `parameters` the values that rank 0 has."""
        if self.size == 1:
            return
        values = self.broadcast([parameter.detach() for parameter in parameters])
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace each gradient by its sum over ranks, in one all-reduce; a rank that has none adds zero."""
        flat = torch.cat([gradient_of(parameter).flatten() for parameter in parameters])
        self.bytes_sent += flat.nbytes
        with self._waiting():
            self._gradients.allreduce([flat]).wait()
        parts = flat.split([parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    def require_same(self, facts: dict[str, Any]) -> None:
        """Raise UserError on rank 0, which ends the others, naming the first of `facts` in which a rank differs."""
        for rank, theirs in enumerate(self.gather(facts)):
            for name, value in facts.items() if self.first else ():
                if theirs[name] != value:
                    raise UserError(
                        f"{name}: rank {rank} has {theirs[name]} where rank 0 has {value}; start as many ranks on a "
                        "node as it has GPUs, on machines that are alike"
                    )

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.check()
            raise RankLost(f"the connection to another rank ended ({str(error).splitlines()[0]})") from None


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """The gradient, or zeros where there is none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def connect(launch: Launch, device: torch.device) -> Ranks:
    """Meet the other processes of `launch`; gradients will be summed on `device`. Raises RankLost if one stays away."""
    if launch.size == 1:
        return Ranks()
    try:
        store = meet(launch)
        control = ProcessGroupGloo(PrefixStore("control", store), launch.rank, launch.size, timeout=ROLLOUT_TIMEOUT)
        gradients: Any = control
        if device.type == "cuda":
            from torch.distributed import ProcessGroupNCCL

            options = ProcessGroupNCCL.Options()
            options._timeout = ROLLOUT_TIMEOUT
            gradients = ProcessGroupNCCL(PrefixStore("gradients", store), launch.rank, launch.size, options)
    except RuntimeError as error:
        raise RankLost(f"not all {launch.size} ranks have come ({str(error).splitlines()[0]})") from None
    return Ranks(launch.rank, launch.size, control, gradients)


def owners(count: int, optimizer_steps: int, size: int) -> list[int]:
    """Which of `size` ranks samples each of `count` prompts.

    The prompts are used in `optimizer_steps` runs, one for each; of every run each rank has neighbouring ones, their
    numbers differing by at most one, so that every optimiser step has work for all ranks.
    """
    lengths = [end - begin for begin, end in split_evenly(count, optimizer_steps)]
    return [index * size // length for length in lengths for index in range(length)]


def split_evenly(count: int, parts: int) -> list[tuple[int, int]]:
    """Where each of `parts` runs of `count` things begins and ends; their lengths differ by at most one."""
    bounds = [count * part // parts for part in range(parts + 1)]
    return list(zip(bounds, bounds[1:], strict=False))
