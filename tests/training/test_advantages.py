"""Advantages against a plain form in Python floats, and the properties that hold for all rewards."""

import math
import statistics

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from grpo.config.schema import Loss
from grpo.training.advantages import compute_advantages, may_skip_equal_groups, reward_metrics

NAN = float("nan")
VARIANTS = [
    {"scale_rewards": scale, "leave_one_out": leave_one_out}
    for scale in ("group", "batch", "none")
    for leave_one_out in (False, True)
] + [{"multi_objective_aggregation": "normalize_then_sum", "leave_one_out": flag} for flag in (False, True)]
SCORES = st.one_of(st.just(NAN), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.floats(-5, 5))


def random_rewards(missing=True):
    """Three groups of five, three functions; one row unscored, one group with a single score of the last function."""
    rewards = torch.rand(3, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).round(decimals=1)
    if missing:
        rewards[0, 1, 0] = rewards[1, :4, 2] = rewards[2, 3, :] = NAN
    return rewards


# A plain form -------------------------------------------------------------------------------------------------------


def present(values):
    return [value for value in values if not math.isnan(value)]


def mean(values):
    return statistics.fmean(present(values)) if present(values) else NAN


def deviation(values):
    return statistics.stdev(present(values)) if len(present(values)) > 1 else NAN


def centred(group, leave_one_out):
    if not leave_one_out:
        return [value - mean(group) for value in group]
    return [value - mean(group[:place] + group[place + 1 :]) for place, value in enumerate(group)]


def weighted_sum(row, weights):
    if all(math.isnan(value) for value, weight in zip(row, weights, strict=True) if weight):
        return NAN
    return sum(value * weight for value, weight in zip(row, weights, strict=True) if weight and not math.isnan(value))


def plain_advantages(rewards, weights, settings):
    groups = rewards.tolist()
    if settings.multi_objective_aggregation == "normalize_then_sum":
        normal = []
        for group in groups:
            columns = [list(column) for column in zip(*group, strict=True)]
            scaled = [
                [value / (deviation(column) + 1e-4) for value in centred(column, settings.leave_one_out)]
                for column in columns
            ]
            normal.append([list(row) for row in zip(*scaled, strict=True)])
        sums = []
        for group, normal_group in zip(groups, normal, strict=True):
            unscored = [math.isnan(weighted_sum(row, weights)) for row in group]
            values = [
                sum(value * weight for value, weight in zip(row, weights, strict=True) if not math.isnan(value))
                for row in normal_group
            ]
            sums.append([NAN if missing else value for value, missing in zip(values, unscored, strict=True)])
        flat = [value for group in sums for value in group]
        result = [[(value - mean(flat)) / (deviation(flat) + 1e-4) for value in group] for group in sums]
    else:
        sums = [[weighted_sum(row, weights) for row in group] for group in groups]
        batch = deviation([value for group in sums for value in group])
        result = []
        for group in sums:
            scale = {"group": deviation(group) + 1e-4, "batch": batch + 1e-4, "none": 1.0}[settings.scale_rewards]
            result.append([value / scale for value in centred(group, settings.leave_one_out)])
    return torch.tensor(result, dtype=torch.float64).nan_to_num(nan=0.0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("missing", [False, True])
def test_equals_the_plain_form(options, missing):
    settings, weights = Loss(**options), [1.0, 2.0, 0.5]
    rewards = random_rewards(missing)
    advantages = compute_advantages(rewards, torch.tensor(weights), settings)
    torch.testing.assert_close(advantages.values, plain_advantages(rewards, weights, settings), rtol=1e-10, atol=1e-10)
    if missing:
        assert advantages.values[2, 3] == 0
        assert advantages.reward[2, 3].isnan()


@given(st.data())
def test_equals_the_plain_form_for_any_rewards(data):
    prompts, group, functions = (data.draw(st.integers(1, high)) for high in (3, 5, 3))
    count = prompts * max(group, 2) * functions
    values = data.draw(st.lists(SCORES, min_size=count, max_size=count))
    rewards = torch.tensor(values, dtype=torch.float64).reshape(prompts, -1, functions)
    weights = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0]), min_size=functions, max_size=functions))
    settings = Loss(**data.draw(st.sampled_from(VARIANTS)))
    assume(any(weights))
    advantages = compute_advantages(rewards, torch.tensor(weights), settings)
    assert advantages.values.isfinite().all()
    expected = plain_advantages(rewards, weights, settings)
    torch.testing.assert_close(advantages.values, expected, rtol=1e-8, atol=1e-8)
    for group_rewards, is_zero in zip(rewards.tolist(), advantages.zero_std.tolist(), strict=True):
        if settings.multi_objective_aggregation == "normalize_then_sum":
            columns = [c for c, weight in zip(zip(*group_rewards, strict=True), weights, strict=True) if weight]
            assert is_zero == all(len(set(present(column))) <= 1 for column in columns)
        else:
            sums = present(weighted_sum(row, weights) for row in group_rewards)
            assert is_zero == (len(set(sums)) <= 1)


@given(
    st.lists(st.lists(st.integers(-8, 8).map(float), min_size=4, max_size=4), min_size=1, max_size=4),
    st.permutations(range(4)),
    st.integers(-16, 16),
    st.sampled_from(VARIANTS),
)
def test_advantages_sum_to_zero_ignore_a_shift_and_follow_a_permutation(groups, order, shift, options):
    settings = Loss(**options)
    rewards = torch.tensor(groups, dtype=torch.float64)[:, :, None]

    def values(rewards):
        return compute_advantages(rewards, torch.ones(1), settings).values

    advantages = values(rewards)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(len(groups), dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(values(rewards + shift), advantages, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(values(rewards[:, order]), advantages[:, order], atol=1e-9, rtol=1e-9)
    best, advantage = rewards[:, :, 0].argmax(1), advantages
    assert (advantage.gather(1, best[:, None])[:, 0] >= 0).all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equal_rewards_are_recognised_exactly_and_give_exactly_zero(options):
    """0.1 eight times has a mean that is not 0.1 in binary; a difference of one unit in the last place is one."""
    tenth, next_up = 0.1, math.nextafter(0.1, 1)
    rewards = torch.full((3, 8, 1), tenth, dtype=torch.float64)
    rewards[1, 3] = next_up
    rewards[2, 3] = NAN
    advantages = compute_advantages(rewards, torch.ones(1), Loss(**options))
    assert advantages.zero_std.tolist() == [True, False, True]
    assert not advantages.values[[0, 2]].any()


def test_equal_sums_of_unequal_rewards_carry_a_signal_only_where_rewards_are_normalised_alone():
    rewards = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    summed = compute_advantages(rewards, torch.ones(2), Loss())
    assert summed.zero_std.tolist() == [True, False] and not summed.values[0].any()
    alone = compute_advantages(rewards, torch.ones(2), Loss(multi_objective_aggregation="normalize_then_sum"))
    assert alone.zero_std.tolist() == [False, False] and not alone.values[1].eq(0).all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_function_of_weight_zero_never_changes_training(options):
    rewards, settings = random_rewards(), Loss(**options)
    watched = torch.cat([rewards, torch.rand(3, 5, 1, dtype=torch.float64)], dim=-1)
    expected = compute_advantages(rewards, torch.tensor([1.0, 2.0, 0.5]), settings)
    advantages = compute_advantages(watched, torch.tensor([1.0, 2.0, 0.5, 0.0]), settings)
    torch.testing.assert_close(advantages.values, expected.values)
    torch.testing.assert_close(advantages.reward, expected.reward, equal_nan=True)
    assert advantages.zero_std.equal(expected.zero_std)


def test_without_any_score_nothing_is_learned_and_nothing_reported():
    rewards = torch.full((2, 4, 1), NAN, dtype=torch.float64)
    for options in VARIANTS:
        advantages = compute_advantages(rewards, torch.ones(1), Loss(**options))
        assert not advantages.values.any() and advantages.zero_std.all()
    assert reward_metrics(rewards, advantages, ["own"]) == {"frac_reward_zero_std": 1.0}


def test_metrics_cover_all_scored_completions():
    rewards = torch.tensor([[[1.0, 0.0], [3.0, NAN]], [[1.0, 1.0], [NAN, NAN]]], dtype=torch.float64)
    advantages = compute_advantages(rewards, torch.tensor([1.0, 2.0]), Loss())
    metrics = reward_metrics(rewards, advantages, ["correct", "format"])
    assert metrics == pytest.approx({
        "reward": 7 / 3,
        "reward_std": statistics.stdev([1, 3, 3]),
        "frac_reward_zero_std": 0.5,
        "rewards/correct": 5 / 3,
        "rewards/correct/std": statistics.stdev([1, 3, 1]),
        "rewards/format": 0.5,
        "rewards/format/std": statistics.stdev([0, 1]),
        "reward_min": 1.0, "rewards/correct/min": 1.0, "rewards/format/min": 0.0,
        "reward_max": 3.0, "rewards/correct/max": 3.0, "rewards/format/max": 1.0,
    })  # fmt: skip


def test_groups_may_be_skipped_only_if_the_loss_is_the_policy_term_alone():
    assert may_skip_equal_groups(Loss())
    for options in ({"beta": 0.01}, {"entropy_coef": -0.01}, {"function": "own.py:loss"}):
        assert not may_skip_equal_groups(Loss(**options))


def test_settings_that_would_be_ignored_are_refused():
    with pytest.raises(ValidationError, match="scales each reward by its group"):
        Loss(multi_objective_aggregation="normalize_then_sum", scale_rewards="none")
    with pytest.raises(ValidationError, match="delta caps a ratio beside a clip"):
        Loss(loss_type="cispo", delta=2.0)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        compute_advantages(torch.zeros(2, 4, 3), torch.ones(2), Loss())
