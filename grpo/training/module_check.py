"""Which module of the two graphs is the first to differ, and whether any does.

Logprobs say that something differs, not what, and they hide what is small beside the rounding of all layers. So the
modules are compared one by one, each on what vLLM gave it: the training graph is run over a prompt with every linear
layer's result replaced by vLLM's. What reaches the next linear layer has then come through one attention, one norm or
one activation since the two were the same, and differs by their rounding alone; and every linear layer is given vLLM's
input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo.policy.fused_layers import FusedLayer
from grpo.policy.packing import predicting_states
from grpo.policy.policy import Policy
from grpo.session import Session

if TYPE_CHECKING:
    from grpo.rollout.watch import Seen

KEPT_BYTES = 4 << 30
"""Host memory for vLLM's results of one prompt, at most; of a very large model a shorter one is compared."""
PLACES = 32
"""Tokens of the prompt that are compared: the last half of these, and others spread over it."""
BY_A_LINEAR = {torch.float32: 2e-3, torch.float16: 2e-3, torch.bfloat16: 0.01}
"""Largest relative difference that a linear layer may make from the same input: a rounding or two; in float32 a GPU
may multiply in TF32."""
BEFORE_A_LINEAR = {torch.float32: 2e-3, torch.float16: 0.012, torch.bfloat16: 0.08}
"""Largest relative difference of what reaches a linear layer. What lies between two of them rounds several times, and
attention's weights are exponentials of rounded scores: 0.024 in bfloat16 and 1e-6 in float32 were seen, in a real model
on a CPU."""


class Difference(NamedTuple):
    """How far the two graphs are apart at a module."""

    module: str
    reached: bool
    """Whether it is in what reaches the module, by what comes before; otherwise the module makes it."""
    size: float
    limit: float

    @property
    def is_over(self) -> bool:
        """Whether rounding does not explain it."""
        return not self.size <= self.limit

    def __str__(self) -> str:
        what = f"what reaches {self.module}" if self.reached else f"the result of {self.module}"
        return f"{what} differs by {self.size:.2g} of its size, over {self.limit:.2g}"


def first_difference(session: Session, prompt: Sequence[int]) -> Difference | None:
    """The first module that differs on `prompt` with the adapter as it is; None if none does."""
    return next((found for found in differences(session, prompt) if found.is_over), None)


def differences(session: Session, prompt: Sequence[int]) -> Iterator[Difference]:
    """At every module, in the order that they run: of what reaches it, where that is seen, and of what it makes."""
    from grpo.rollout.watch import watched_linears  # vLLM is imported only where it is started

    policy, fused = session.policy, has_fused_layers(session.policy)
    if not fused:
        prompt = prompt[-tokens_kept(policy) :]
    places = compared_places(len(prompt))
    seen = watched_linears(session.engine, prompt, places, everywhere=not fused)
    reaching = {} if fused else differences_before(policy, seen, prompt, places)
    for module, difference in reaching.items():
        yield difference
        yield difference_by(policy, module, seen)
    # A layer whose pass was not seen, as one inside a CUDA graph is not, is left to the logprobs.
    linears = ((name, part) for name, linear in session.base.linears.items() for part in linear.parts)
    yield from (difference_by(policy, part, seen) for name, part in linears if part not in reaching and name in seen)


class AmongOthers(NamedTuple):
    """A prompt as sequences of a packed row."""

    prompts: list[list[int]]
    completions: list[list[int]]
    own: list[int]
    """Where in the row the prompt's tokens are, in order."""


def packed_among_others(prompt: Sequence[int]) -> AmongOthers:
    """`prompt`, of two tokens or more, behind a sequence of its tokens in another order, and its second half behind
    another continuation of the first, which both share."""
    half, quarter = len(prompt) // 2, max(1, len(prompt) // 4)
    first, second = list(prompt[:half]), list(prompt[half:])
    other, aside = list(prompt[: quarter + 1])[::-1], second[:quarter][::-1]
    begins, again = len(other), len(other) + half + len(aside)
    own = [*range(begins, begins + half), *range(again, again + len(second))]
    return AmongOthers([other, first, first], [[0], [*aside, 0], [*second, 0]], own)


def has_fused_layers(policy: Policy) -> bool:
    """Whether a kernel for a whole layer stands between its modules, so that these are not run one by one."""
    return any(isinstance(layer, FusedLayer) for layer in policy.decoder.model.layers)


def tokens_kept(policy: Policy) -> int:
    """Tokens whose results of all linear layers fit in KEPT_BYTES."""
    row = sum(linear.out_features for linear in policy.base.linears.values()) * policy.base.dtype.itemsize
    return max(2, KEPT_BYTES // row)


def compared_places(tokens: int) -> list[int]:
    """At most PLACES places in a prompt of so many tokens."""
    last = range(max(0, tokens - PLACES // 2), tokens)
    spread = range(0, last.start, max(1, -(-last.start // (PLACES // 2))))
    return [*spread, *last]


def difference_by(policy: Policy, part: str, seen: dict[str, Seen]) -> Difference:
    """What the linear module `part` makes of vLLM's input, beside what vLLM makes of it."""
    name, (first, rows) = place_of(policy, part)
    with torch.no_grad():
        ours = policy.decoder.get_submodule(part)(seen[name].x[None].to(policy.base.device))[0]
    size = relative(ours, seen[name].y[:, first : first + rows])
    return Difference(part, False, size, BY_A_LINEAR[policy.base.dtype])


def place_of(policy: Policy, part: str) -> tuple[str, tuple[int, int]]:
    """(vLLM's linear layer, (first row, rows)) of the graph's linear module `part`."""
    for name, linear in policy.base.linears.items():
        if part in linear.parts:
            return name, linear.parts[part]
    raise KeyError(part)


def differences_before(
    policy: Policy, seen: dict[str, Seen], prompt: Sequence[int], places: list[int]
) -> dict[str, Difference]:
    """The graph's linear modules in the order that they run, each with how far its input is from vLLM's.

    seen: with what vLLM's layers gave everywhere. The prompt is computed as rows are packed in training: behind another
    sequence, and its second half behind another continuation of the first.
    """
    found: dict[str, Difference] = {}
    hooks = []
    row = packed_among_others(prompt)
    for name, linear in policy.base.linears.items():
        if name not in seen:
            continue
        for part, rows in linear.parts.items():
            hook = replace_result(found, part, seen[name], rows, row.own, places, BEFORE_A_LINEAR[policy.base.dtype])
            hooks.append(policy.decoder.get_submodule(part).register_forward_hook(hook))
    try:
        with torch.no_grad(), as_in_training(policy):
            predicting_states(policy.decoder.model, row.prompts, row.completions, policy.base.device)
    finally:
        for handle in hooks:
            handle.remove()
    return found


@contextmanager
def as_in_training(policy: Policy) -> Iterator[None]:
    """Inside, modules do what they do in a training step: a family may do more there. Not where the adapter's own
    dropout would be a part of that."""
    policy.model.train(not policy.lora.lora_dropout)
    try:
        yield
    finally:
        policy.model.eval()


def replace_result(
    found: dict[str, Difference],
    part: str,
    seen: Seen,
    rows: tuple[int, int],
    own: list[int],
    places: list[int],
    limit: float,
) -> Callable[..., Tensor]:
    """A hook on the module `part` that notes how far its input is from vLLM's, and gives vLLM's result.

    own: where in the row the prompt's tokens are; `places` of them are compared.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].reshape(-1, args[0].shape[-1])
        size = relative(x[[own[place] for place in places]], seen.x)
        found[part] = Difference(part, True, size, limit)
        assert seen.everywhere is not None
        result = output.detach().clone().reshape(len(x), -1)
        result[own] = seen.everywhere[:, rows[0] : rows[0] + rows[1]].to(output)
        return result.reshape(output.shape)

    return hook


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of a row of [places, features], in root mean square, over its size or a usual row's: some
    models make the first token's a thousand times as large, and some rows are next to nothing. Computed where
    `ours` is: a host takes seconds for all modules."""
    theirs = theirs.to(ours.device)
    gap = (ours.float() - theirs.float()).pow(2).mean(-1).sqrt()
    size = theirs.float().pow(2).mean(-1).sqrt()
    return float((gap / torch.maximum(size, size.median()).clamp_min(1e-30)).max())
