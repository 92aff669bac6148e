"""What keeps small steps of weights in bfloat16, and what does not; the same bits after a resumption."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from grpo.config.schema import Train
from grpo.errors import UserError
from grpo.memory.full_finetuning import FORMS, GRADIENT_BYTES, LOW_BYTES
from grpo.training.weight_optimizer import (
    STRIDE,
    WeightOptimizer,
    joined,
    split,
    stochastically_rounded,
)

RATE, STEPS = 1e-6, 200


def weights(dtype: torch.dtype = torch.bfloat16, rows: int = 64) -> list[nn.Parameter]:
    """A matrix and a norm, of the sizes that weights of models have."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(rows, 256, generator=generator) * 0.05
    return [nn.Parameter(matrix.to(dtype)), nn.Parameter(torch.ones(256, dtype=dtype))]


def train(**changes: Any) -> Train:
    return Train(learning_rate=RATE, weight_decay=0.0, **changes)


def gradients_like(parameters: list[nn.Parameter], step: int) -> list[torch.Tensor]:
    """Of one sign for each weight, so that every step adds to the last."""
    signs = torch.Generator().manual_seed(1)
    sizes = torch.Generator().manual_seed(2 + step)
    found = []
    for each in parameters:
        sign = torch.randn(each.shape, generator=signs).sign()
        found.append(sign * torch.rand(each.shape, generator=sizes).add_(0.5))
    return found


def run(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for parameter, gradient in zip(parameters, gradients_like(parameters, step), strict=True):
            parameter.grad = gradient.to(parameter.grad_dtype or parameter.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def value(optimizer: WeightOptimizer, parameter: nn.Parameter) -> torch.Tensor:
    """The weights as the optimiser has them, in float32."""
    state = optimizer.state[parameter]
    if "low" not in state:
        return parameter.detach().float()
    return joined(parameter.detach().flatten(), state["low"]).view(parameter.shape)


def kept(found: torch.Tensor, start: torch.Tensor, truth: torch.Tensor) -> float:
    """The projection of the change on the true one, over that one's size."""
    change, true = (found - start).flatten(), (truth - start).flatten()
    return float(change @ true / (true @ true))


def truth_of(**changes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(start, end) of the matrix trained in float32 from bfloat16 values."""
    parameters = [nn.Parameter(each.detach().float()) for each in weights()]
    start = parameters[0].detach().clone()
    run(torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99)), parameters, range(STEPS))
    return start, parameters[0].detach()


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_keeps_steps_that_bfloat16_cannot_show(form: Any, eight_bit: bool) -> None:
    start, truth = truth_of()
    parameters = weights()
    optimizer = WeightOptimizer(parameters, form, train(), eight_bit=eight_bit)
    run(optimizer, parameters, range(STEPS))
    share = kept(value(optimizer, parameters[0]), start, truth)
    assert share == pytest.approx(1, abs=0.15 if form == "stochastic" else 0.03 if eight_bit else 2e-3)


@pytest.mark.parametrize("library", ["torch", "bitsandbytes"])
def test_the_libraries_own_optimisers_lose_them(library: str) -> None:
    """Hence the forms: rounding to nearest keeps less than a hundredth of the change."""
    start, truth = truth_of()
    parameters = weights()
    chosen: Any = torch.optim.AdamW
    if library == "bitsandbytes":
        from bitsandbytes.optim import AdamW8bit as chosen  # type: ignore[no-redef]
    run(chosen(parameters, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99)), parameters, range(STEPS))
    assert abs(kept(parameters[0].detach().float(), start, truth)) < 0.01


def test_float32_weights_take_the_very_steps_of_torch() -> None:
    mine, theirs = weights(torch.float32), weights(torch.float32)
    run(WeightOptimizer(mine, "float32", train()), mine, range(5))
    run(torch.optim.AdamW(theirs, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99)), theirs, range(5))
    assert all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))


def test_halves_of_float32_take_the_steps_of_float32() -> None:
    start, truth = truth_of()
    parameters = weights()
    optimizer = WeightOptimizer(parameters, "float32", train())
    run(optimizer, parameters, range(STEPS))
    assert torch.equal(value(optimizer, parameters[0]), truth), "bit for bit"
    assert torch.equal(parameters[0].detach(), truth.bfloat16()), "what is served is the nearest"
    assert not torch.equal(start, truth)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False, max_value=2.0**127, min_value=-(2.0**127))))
def test_two_halves_are_the_number(numbers: list[float]) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    high, low = torch.empty(len(values), dtype=torch.bfloat16), torch.empty(len(values), dtype=torch.int16)
    split(values.clone(), high, low)
    assert torch.equal(joined(high, low).view(torch.int32), values.view(torch.int32))
    neighbours = (values.bfloat16().float() - values).abs()
    assert bool(((high.float() - values).abs() <= neighbours).all()), "the upper half is the nearest bfloat16"


@settings(max_examples=20, deadline=None)
@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
def test_random_rounding_is_exact_on_average(number: float) -> None:
    noise = torch.Generator().manual_seed(0)
    rounded = stochastically_rounded(torch.full((20000,), number), noise).float()
    spacing = float(torch.tensor(number).bfloat16()) * 2**-7
    assert set(rounded.unique().tolist()) <= {float(x) for x in rounded} and len(rounded.unique()) <= 2
    assert abs(float(rounded.double().mean()) - float(torch.tensor(number))) <= 5 * spacing / math.sqrt(20000)


def test_what_is_served_of_the_change_is_measured() -> None:
    """Small steps from bfloat16 values: hardly any shows at first, all of it in the long run."""
    matrix = torch.randn(256 * STRIDE, 1, generator=torch.Generator().manual_seed(0)) * 0.05
    parameters = [nn.Parameter(matrix.bfloat16())]
    optimizer = WeightOptimizer(parameters, "compensated", train())
    assert optimizer.survival() is None
    run(optimizer, parameters, range(3))
    early = optimizer.survival()
    run(optimizer, parameters, range(3, 300))
    late = optimizer.survival()
    assert early is not None and late is not None
    assert early < 0.3 and 0.8 < late < 1.2
    parameters = weights(torch.float32)
    optimizer = WeightOptimizer(parameters, "float32", train())
    run(optimizer, parameters, range(2))
    assert optimizer.survival() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_optimiser_goes_on_with_the_same_bits(form: Any, eight_bit: bool) -> None:
    from grpo.run.tensor_state import packed, unpacked

    def made() -> tuple[list[nn.Parameter], WeightOptimizer]:
        parameters = weights()
        return parameters, WeightOptimizer(parameters, form, train(seed=3), eight_bit=eight_bit)

    whole, optimizer = made()
    run(optimizer, whole, range(6))
    first, before = made()
    run(before, first, range(3))
    state = unpacked(packed(before.state_dict()))
    again, after = made()
    for parameter, saved in zip(again, first, strict=True):
        parameter.data.copy_(saved)
    after.load_state_dict(state)
    run(after, again, range(3, 6))
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    assert optimizer.survival() == after.survival()


def test_another_form_is_refused() -> None:
    parameters = weights()
    state = WeightOptimizer(parameters, "float32", train()).state_dict()
    with pytest.raises(UserError, match="begun with train.weight_update = 'float32'"):
        WeightOptimizer(weights(), "stochastic", train()).load_state_dict(state)


def test_gradients_are_clipped_by_the_norm_of_all_of_them() -> None:
    parameters, unclipped = weights(torch.float32), weights(torch.float32)
    optimizer = WeightOptimizer(parameters, "float32", train())
    reference = torch.optim.AdamW(unclipped, lr=RATE, weight_decay=0.0, betas=(0.9, 0.99))
    for step in range(3):
        for pair, gradient in zip(
            zip(parameters, unclipped, strict=True), gradients_like(parameters, step), strict=True
        ):
            pair[0].grad, pair[1].grad = gradient.clone(), gradient.clone()
        norm = optimizer.clip(0.1)
        expected = float(torch.nn.utils.clip_grad_norm_(unclipped, 0.1))
        assert norm == pytest.approx(expected, rel=1e-5)
        optimizer.step()
        reference.step()
    for one, other in zip(parameters, unclipped, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_decay_leaves_norms_alone() -> None:
    parameters = weights(torch.float32)
    before = [each.detach().clone() for each in parameters]
    optimizer = WeightOptimizer(parameters, "float32", Train(learning_rate=0.1, weight_decay=0.5))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not torch.equal(parameters[0], before[0]) and torch.equal(parameters[1], before[1])


@pytest.mark.parametrize("form", FORMS)
def test_it_takes_the_bytes_that_the_plan_says(form: Any) -> None:
    parameters = [weights(rows=4096)[0]]
    numbers = parameters[0].numel()
    for eight_bit, moments in ((False, 8), (True, 2 + 8 / 256)):
        optimizer = WeightOptimizer(parameters, form, train(), eight_bit=eight_bit)
        state = optimizer.state[parameters[0]]
        taken = sum(tensor.nbytes for name, tensor in state.items() if name not in ("start", "moved"))
        assert taken == numbers * (LOW_BYTES[form] + moments)
        assert (parameters[0].grad_dtype or parameters[0].dtype).itemsize == GRADIENT_BYTES[form]
