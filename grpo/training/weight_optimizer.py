"""AdamW on the weights that are served, in place, which keeps the steps that are too small for them.

A step at a learning rate of 1e-6 is a thousandth of the distance between neighbouring bfloat16 numbers: rounded to the
nearest, nearly all of them vanish (docs/full-finetuning.md has the figures). Three forms of the update keep them:

    float32      The weight is a float32 number of which generation reads the upper half: rounded to bfloat16, the
                 nearest one. The lower 16 bits are kept beside it (Kalamkar et al., 2019, arXiv:1905.12322, split
                 numbers so; here the upper half is rounded, not cut). Gradients are summed in float32.
    compensated  The same weight, with gradients in bfloat16. Kahan's sum in bfloat16 takes as much, and keeps less.
    stochastic   Nothing beside the weight: it is rounded up or down at random, in the proportion that makes the
                 expected value exact (Gupta et al., 2015, arXiv:1502.02551).

The arithmetic is float32 on a piece of a weight at a time: torch's AdamW, or bitsandbytes' kernel for moments in 8 bit
(Dettmers et al., 2021, arXiv:2110.02861), neither of which keeps small steps of a bfloat16 weight by itself. Decay
leaves norms and biases alone, as transformers' trainers do. All memory is taken at once, when the optimiser is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from grpo.config.schema import Train
from grpo.errors import UserError
from grpo.memory.full_finetuning import BLOCK, Form

PIECE = 1 << 24
"""Numbers of a weight that exist in float32 at once."""
STRIDE = 1 << 10
"""One in so many numbers is followed, to say how much of their change is served."""
LEAST_IN_8BIT = 4096
"""Numbers of a weight below which its moments stay in float32, as in bitsandbytes."""


class WeightOptimizer(torch.optim.Optimizer):
    """AdamW over `parameters` in bfloat16 or float32, by `form`."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        form: Form,
        train: Train,
        *,
        eight_bit: bool = False,
        paged: bool = False,
    ):
        """`eight_bit`: keep moments so; `paged`: in memory that moves between GPU and host by need."""
        self.form, self.seed, self.eight_bit, self.paged = form, train.seed, eight_bit, paged
        matrices = [each for each in parameters if each.ndim > 1]
        vectors = [each for each in parameters if each.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": train.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (train.adam_beta1, train.adam_beta2)
        defaults = {"lr": train.learning_rate, "betas": betas, "eps": train.adam_epsilon}
        super().__init__([group for group in groups if group["params"]], defaults)
        self.gradient_scale = 1.0
        """What every gradient is multiplied by in the next step."""
        self.steps = 0
        self.codes = code_tables(matrices[0].device) if eight_bit else None
        for parameter in parameters:
            parameter.grad_dtype = torch.float32 if form == "float32" or parameter.ndim <= 1 else parameter.dtype
            self.state[parameter] = self._new_state(parameter)

    @property
    def weights(self) -> Iterator[nn.Parameter]:
        """All of them, in order."""
        return (parameter for group in self.param_groups for parameter in group["params"])

    def _new_state(self, weight: nn.Parameter) -> dict[str, Tensor]:
        flat = weight.detach().flatten()
        like: dict[str, Any] = {"device": weight.device}
        state = {"start": flat[::STRIDE].clone(), "moved": torch.zeros_like(flat[::STRIDE], dtype=torch.float32)}
        if weight.dtype == torch.bfloat16 and self.form != "stochastic":
            state["low"] = torch.zeros(flat.shape, dtype=torch.int16, **like)
        if not self.in_eight_bit(weight):
            return state | {name: torch.zeros(flat.shape, dtype=torch.float32, **like) for name in ("mean", "square")}
        scales = -(-len(flat) // BLOCK)
        for name in ("mean", "square"):
            state[name] = self._moment(len(flat), weight.device)
            state[f"{name}_scale"] = torch.zeros(scales, dtype=torch.float32, **like)
        return state

    def in_eight_bit(self, weight: Tensor) -> bool:
        """Whether `weight`'s moments are kept so."""
        return self.eight_bit and weight.numel() >= LEAST_IN_8BIT

    def _moment(self, size: int, device: torch.device) -> Tensor:
        if not (self.paged and device.type == "cuda"):
            return torch.zeros(size, dtype=torch.uint8, device=device)
        from bitsandbytes.functional import fill, get_paged

        moment = get_paged(size, dtype=torch.uint8, device=device)
        fill(moment, 0)
        return moment

    def clip(self, most: float) -> float:
        """Let the next step scale all gradients down to the norm `most` together; returns what their norm is."""
        norms = [
            torch.linalg.vector_norm(each.grad, dtype=torch.float32) for each in self.weights if each.grad is not None
        ]
        if not norms:
            return 0.0
        norm = float(torch.linalg.vector_norm(torch.stack(norms)))
        self.gradient_scale = min(1.0, most / (norm + 1e-6))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """One step of every weight that has a gradient."""
        self.steps += 1
        stepped = [
            (number, group, weight)
            for number, (group, weight) in enumerate((g, w) for g in self.param_groups for w in g["params"])
            if weight.grad is not None
        ]
        following = [weight for _, _, weight in stepped[1:]] + [None]
        if stepped:
            self._fetch(stepped[0][2])
        for (number, group, weight), after in zip(stepped, following, strict=True):
            if after is not None:
                self._fetch(after)
            self._step_weight(weight, group, torch.Generator(weight.device).manual_seed(self._noise_seed(number)))
        self.gradient_scale = 1.0

    def _fetch(self, weight: nn.Parameter) -> None:
        """Start moving `weight`'s moments to the GPU, where they are paged: page by page, on demand, takes longer."""
        moments = [self.state[weight][name] for name in ("mean", "square")]
        if all(getattr(moment, "is_paged", False) for moment in moments):
            from bitsandbytes.functional import prefetch_tensor

            for moment in moments:
                prefetch_tensor(moment)

    def _noise_seed(self, number: int) -> int:
        """Of what rounds weight `number` in this step: a function of the run's seed, so that resumed runs agree."""
        return ((self.seed * 1_000_003 + self.steps) * 1_000_003 + number) % (1 << 63)

    def _step_weight(self, weight: nn.Parameter, group: dict[str, Any], noise: torch.Generator) -> None:
        state, served, gradient = self.state[weight], weight.data.view(-1), weight.grad
        assert gradient is not None
        flat_gradient = gradient.reshape(-1)
        for start in range(0, len(served), PIECE):
            piece = slice(start, min(start + PIECE, len(served)))
            value = self._value(served[piece], state, piece)
            before = value[::STRIDE].clone()
            self._adamw(value, flat_gradient[piece].float() * self.gradient_scale, state, piece, group)
            followed = slice(start // STRIDE, start // STRIDE + len(before))
            state["moved"][followed] += value[::STRIDE] - before
            self._serve(value, served[piece], state, piece, noise)

    def _value(self, served: Tensor, state: dict[str, Tensor], piece: slice) -> Tensor:
        """What the weights are, in float32: a new tensor, or the weights themselves where they are that."""
        return joined(served, state["low"][piece]) if "low" in state else served.float()

    def _serve(
        self, value: Tensor, served: Tensor, state: dict[str, Tensor], piece: slice, noise: torch.Generator
    ) -> None:
        """Round `value` to the weights that are served, and keep what that takes off."""
        if "low" in state:
            split(value, served, state["low"][piece])
        elif served.dtype == torch.bfloat16:
            served.copy_(stochastically_rounded(value, noise))

    def _adamw(
        self, value: Tensor, gradient: Tensor, state: dict[str, Tensor], piece: slice, group: dict[str, Any]
    ) -> None:
        """One step of `value`, float32, in place."""
        beta1, beta2 = group["betas"]
        mean, square = state["mean"][piece], state["square"][piece]
        if self.codes is not None and mean.dtype == torch.uint8:
            scales = slice(piece.start // BLOCK, -(-piece.stop // BLOCK))
            torch.ops.bitsandbytes.optimizer_update_8bit_blockwise(
                "adam", gradient, value, as_paged(mean, state["mean"]), as_paged(square, state["square"]),
                beta1, beta2, 0.0, 0.0, group["eps"], self.steps, float(group["lr"]), *self.codes,
                state["mean_scale"][scales], state["square_scale"][scales], group["weight_decay"], 1.0, False,
            )  # fmt: skip
            return
        steps = torch.tensor(float(self.steps - 1), device=value.device if value.is_cuda else "cpu")
        adamw(
            [value], [gradient], [mean], [square], [], [steps], foreach=False, fused=value.is_cuda, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=float(group["lr"]), weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip

    @torch.no_grad()
    def survival(self) -> float | None:
        """The share of all change since the start that the served weights show, of one weight in STRIDE.

        <served now - served at first, change> / <change, change>; None before there is any.
        """
        shown = whole = 0.0
        for weight in self.weights:
            state = self.state[weight]
            served = weight.detach().flatten()[::STRIDE].float() - state["start"].float()
            shown += float(torch.dot(served, state["moved"]))
            whole += float(torch.dot(state["moved"], state["moved"]))
        return shown / whole if whole > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Nested plain values and tensors: the form, the number of steps, and what is kept of each weight."""
        kept = [dict(self.state[weight]) for weight in self.weights]
        return {"form": self.form, "eight_bit": self.eight_bit, "steps": self.steps, "weights": kept}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, in place. Raises UserError for that of another form."""
        if state_dict["form"] != self.form:
            begun = state_dict["form"]
            raise UserError(
                f"the run was begun with train.weight_update = {begun!r}, and goes on with that alone, not with "
                f"{self.form!r}; set it"
            )
        self.steps = int(state_dict["steps"])
        for weight, saved in zip(self.weights, state_dict["weights"], strict=True):
            for name, tensor in self.state[weight].items():
                tensor.copy_(saved[name])


def build_weight_optimizer(
    parameters: Sequence[nn.Parameter], form: Form, train: Train, notice: Callable[[str], None]
) -> WeightOptimizer:
    """As `[train]` says. On a CPU moments are in float32, and `notice` says so where that was not asked for."""
    on_gpu = parameters[0].is_cuda
    if parameters[0].dtype == torch.bfloat16:
        notice(f"all weights are trained; their update keeps small steps by train.weight_update = {form!r}")
    if train.optim != "adamw" and not on_gpu:
        notice(f"train.optim = {train.optim!r} needs a GPU; adamw is used on this CPU")
    eight_bit = train.optim != "adamw" and on_gpu
    return WeightOptimizer(parameters, form, train, eight_bit=eight_bit, paged=train.optim.startswith("paged"))


def code_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """bitsandbytes' 256 values of a signed and of an unsigned 8-bit moment."""
    try:
        from bitsandbytes.functional import create_dynamic_map
    except ImportError:
        raise UserError('train.optim with 8-bit moments needs bitsandbytes; pip install it, or set "adamw"') from None
    return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)


def as_paged(part: Tensor, whole: Tensor) -> Tensor:
    """`part` of `whole`, known to bitsandbytes as paged memory where that is."""
    if getattr(whole, "is_paged", False):
        part.is_paged, part.page_deviceid = True, whole.page_deviceid
    return part


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers whose nearest bfloat16 is `high`, `low` (int16) units of a float32's last place away."""
    return (high.view(torch.int16).to(torch.int32).mul_(1 << 16).add_(low)).view(torch.float32)


def split(value: Tensor, high: Tensor, low: Tensor) -> None:
    """The inverse of `joined`, exact: writes `high` (bfloat16) and `low` (int16) of `value` (float32, which is used
    up). Halves are rounded away from zero, so that what is left fits."""
    bits = value.view(torch.int32)
    low.copy_(bits & 0xFFFF)  # the same 16 bits as a signed number: from 0x8000 on negative
    upper = bits.sub_(low).bitwise_right_shift_(16)
    high.view(torch.int16).copy_(upper)


def stochastically_rounded(value: Tensor, noise: torch.Generator) -> Tensor:
    """`value` (float32) in bfloat16, up or down with the probability of its distance from the other; used up."""
    bits = value.view(torch.int32)
    bits.add_(torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=noise))
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
