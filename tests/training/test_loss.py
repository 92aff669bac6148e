"""The loss against plain sums written out token by token; micro-batches, metrics, empty batches, users' own losses."""

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grpo.config.schema import Loss
from grpo.errors import UserError
from grpo.training.advantages import may_skip_equal_groups
from grpo.training.loss import OBJECTIVES, BatchTotals, batch_totals, compute_loss, resolve_loss
from grpo.training.loss_metrics import EffectiveSampleSize, Maximum, Mean, Total, merge_metrics
from grpo.training.loss_terms import entropy_quantile, kl_estimate, rollout_weights
from tests.helpers.loss_batches import MAX_COMPLETION_LENGTH, gradients, lengths_of, random_inputs, select, totals_of
from tests.helpers.paths import ROOT

CORRECTIONS = ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
ALL_PARTS = {
    "beta": 0.2,
    "entropy_coef": 0.1,
    "top_entropy_quantile": 0.6,
    "mask_truncated_completions": True,
    "off_policy_mask_threshold": 0.05,
    "importance_sampling_correction": "sequence_truncate",
    "importance_sampling_clip_min": 0.7,
}


# A plain form -------------------------------------------------------------------------------------------------------


def plain_policy_term(settings, ratio, advantage, logprob):
    """The objective at one token, as its paper has it, maximised."""
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    if settings.loss_type == "cispo":
        cap = 5.0 if settings.epsilon_high is None else settings.epsilon_high
        return min(ratio.item(), cap) * advantage * logprob
    if settings.loss_type == "sapo":
        tau = settings.sapo_temperature_pos if advantage > 0 else settings.sapo_temperature_neg
        tau = torch.tensor(tau).double()  # a float32 constant in TRL, and so here
        return 4 / tau / (1 + torch.exp(-tau * (ratio - 1))) * advantage
    unclipped = ratio if settings.delta is None or ratio <= settings.delta else ratio.new_tensor(settings.delta)
    clipped = min(max(ratio, ratio.new_tensor(1 - settings.epsilon)), ratio.new_tensor(1 + high))
    return min(unclipped * advantage, clipped * advantage)


def plain_rollout_weights(settings, gaps):
    """Importance weights of one sequence's tokens from their log-ratios."""
    level, action = settings.importance_sampling_correction.split("_")
    low, high = settings.importance_sampling_clip_min, settings.importance_sampling_clip_max
    if level == "geometric":
        inside = low <= math.exp(sum(gaps) / max(len(gaps), 1)) <= high
        return [1.0 if inside else 0.0] * len(gaps)
    if level == "sequence":
        gaps = [sum(gaps)] * len(gaps)
    ratios = [math.exp(gap) for gap in gaps]
    if action == "truncate":
        return [min(max(ratio, low), high) for ratio in ratios]
    return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]


def plain_kl(settings, logprob, reference):
    difference = logprob - reference
    return {"k1": difference, "k2": difference**2 / 2, "k3": torch.exp(-difference) - 1 + difference}[
        settings.kl_estimator
    ]


def plain_loss(inputs, settings):
    """The loss of a whole optimiser step in float64, one token after another; no quantile of entropies."""
    by_sequence = settings.loss_type == "gspo" or settings.importance_sampling_level == "sequence"
    sums, entropies = [], []
    for number in range(inputs.num_sequences):
        tokens = [t for t in range(len(inputs.sequence)) if inputs.sequence[t] == number]
        if settings.mask_truncated_completions and inputs.truncated[number]:
            tokens = []
        advantage = inputs.advantages[number]
        logs = [inputs.logprobs[t] - inputs.old_logprobs[t] for t in tokens]
        if by_sequence:
            logs = [sum(logs) / max(len(tokens), 1)] * len(tokens)
        weights = [1.0] * len(tokens)
        if settings.importance_sampling_correction != "none":
            gaps = [(inputs.old_logprobs[t] - inputs.rollout_logprobs[t]).item() for t in tokens]
            weights = plain_rollout_weights(settings, gaps)
        if settings.off_policy_mask_threshold is not None and tokens and advantage < 0:
            drift = sum((inputs.rollout_logprobs[t] - inputs.logprobs[t]).item() for t in tokens) / len(tokens)
            weights = [0.0 if drift > settings.off_policy_mask_threshold else weight for weight in weights]
        terms = []
        for t, log, weight in zip(tokens, logs, weights, strict=True):
            ratio = torch.exp(log)
            own = advantage if inputs.token_advantages is None else inputs.token_advantages[t]
            term = -weight * plain_policy_term(settings, ratio, own, inputs.logprobs[t])
            if settings.beta:
                kl = plain_kl(settings, inputs.logprobs[t], inputs.ref_logprobs[t])
                term = term + settings.beta * kl * (ratio if settings.kl_importance_weight else 1)
            terms.append(term)
            entropies.append(inputs.entropy[t])
        sums.append(terms)
    tokens = sum(len(terms) for terms in sums)
    if settings.loss_type in ("grpo", "gspo", "sapo"):
        loss = sum(sum(terms) / max(len(terms), 1) for terms in sums) / len(sums)
    elif settings.loss_type == "dr_grpo":
        loss = sum(sum(terms) for terms in sums) / (len(sums) * MAX_COMPLETION_LENGTH)
    else:
        loss = sum(sum(terms) for terms in sums) / tokens
    return loss - settings.entropy_coef * sum(entropies) / tokens


def assert_equals_plain(inputs, settings):
    loss, _ = compute_loss(inputs, totals_of(inputs, settings), settings)
    expected = plain_loss(inputs, settings)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients(loss, inputs), gradients(expected, inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("correction", ["none", *CORRECTIONS])
def test_equals_the_plain_form(loss_type, correction):
    options = {"importance_sampling_correction": correction, "importance_sampling_clip_min": 0.6}
    assert_equals_plain(random_inputs(), Loss(loss_type=loss_type, **options))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_kl_penalty_equals_the_plain_form(estimator, weighted, level):
    settings = Loss(beta=0.3, kl_estimator=estimator, kl_importance_weight=weighted, importance_sampling_level=level)
    assert_equals_plain(random_inputs(), settings)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("seed", range(4))
def test_all_parts_together_equal_the_plain_form(loss_type, seed):
    assert_equals_plain(
        random_inputs(seed=seed), Loss(loss_type=loss_type, **ALL_PARTS | {"top_entropy_quantile": 1.0})
    )


@pytest.mark.parametrize("seed", range(4))
def test_off_policy_mask_drops_drifted_sequences_of_negative_advantage(seed):
    inputs = random_inputs(seed=seed)
    settings = Loss(off_policy_mask_threshold=0.1, importance_sampling_correction="none")
    loss, metrics = compute_loss(inputs, totals_of(inputs, settings), settings)
    drift = torch.stack([
        (inputs.rollout_logprobs - inputs.logprobs)[inputs.sequence == number].mean()
        for number in range(inputs.num_sequences)
    ])  # fmt: skip
    dropped = (inputs.advantages < 0) & (drift > 0.1)
    kept = replace(inputs, mask=~dropped[inputs.sequence])
    expected, _ = compute_loss(kept, totals_of(inputs, settings), Loss(importance_sampling_correction="none"))
    torch.testing.assert_close(loss, expected)
    assert merge_metrics([metrics])["off_policy_masked"] == pytest.approx(dropped.double().mean().item())


def test_two_sided_clip_bounds_the_loss_of_a_bad_sample():
    inputs = random_inputs(lengths=[3])
    far = replace(inputs, logprobs=(inputs.old_logprobs + 3).detach().requires_grad_(), advantages=torch.tensor([-1.0]))
    for delta, expected in ((None, math.exp(3)), (4.0, 4.0)):
        settings = Loss(delta=delta, importance_sampling_correction="none")
        loss, _ = compute_loss(far, totals_of(far, settings), settings)
        assert loss.item() == pytest.approx(expected)
        assert bool(gradients(loss, far)[0].any()) == (delta is None)
        assert_equals_plain(far, settings)


def test_on_policy_every_loss_has_the_policy_gradient():
    """At ratio 1 the gradient is -A / normaliser for each token, whatever the clip."""
    inputs = random_inputs(on_policy=True)
    lengths = torch.tensor(lengths_of(inputs))
    advantages = inputs.advantages[inputs.sequence]
    tokens, sequences = len(inputs.sequence), inputs.num_sequences
    per_sequence = (lengths * sequences)[inputs.sequence]
    normalisers = {
        "grpo": per_sequence,
        "gspo": per_sequence,
        "sapo": per_sequence,
        "dr_grpo": sequences * MAX_COMPLETION_LENGTH,
    }
    for loss_type in OBJECTIVES:
        settings = Loss(loss_type=loss_type, importance_sampling_correction="none")
        loss, metrics = compute_loss(inputs, totals_of(inputs, settings), settings)
        expected = -advantages / normalisers.get(loss_type, tokens)
        if loss_type == "gspo":  # the ratio of the sequence spreads a token's gradient over its tokens: the same sum
            expected = -(inputs.advantages / (lengths * sequences))[inputs.sequence]
        torch.testing.assert_close(gradients(loss, inputs)[0], expected)
        assert merge_metrics([metrics])["importance_ratio_mean"] == 1


# Estimators ---------------------------------------------------------------------------------------------------------


def test_weighted_k1_and_k3_have_the_gradient_of_the_reverse_kl():
    """Exactly, by summing over a small vocabulary instead of sampling; k2 has it without the weight."""
    torch.manual_seed(0)
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    (expected,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    ratio = (logprobs - logprobs.detach()).exp()
    for estimator, weight in (("k1", ratio), ("k3", ratio), ("k2", 1.0)):
        sampled = logprobs.detach().exp() * kl_estimate(logprobs, reference, estimator) * weight
        (gradient,) = torch.autograd.grad(sampled.sum(), logits, retain_graph=True)
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("loss_type", get_args(Loss.model_fields["loss_type"].annotation))
def test_tokens_may_have_advantages_of_their_own(loss_type):
    inputs, settings = random_inputs(seed=3), Loss(loss_type=loss_type, off_policy_mask_threshold=0.1)
    generator = torch.Generator().manual_seed(4)
    own = torch.randn(len(inputs.sequence), generator=generator, dtype=torch.float64)
    lengths = torch.bincount(inputs.sequence).double()
    means = torch.zeros_like(lengths).index_add(0, inputs.sequence, own) / lengths
    assert_equals_plain(replace(inputs, token_advantages=own, advantages=means), settings)
    same = replace(inputs, token_advantages=inputs.advantages[inputs.sequence])
    assert torch.equal(*(compute_loss(one, totals_of(one, settings), settings)[0] for one in (inputs, same)))


def test_truncation_and_masking_at_the_bounds():
    """Both bounds belong to what is kept."""
    gaps = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64).log()
    sequence, lengths = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([2.0, 2.0, 1.0])
    weights = {mode: rollout_weights(gaps, sequence, 3, mode, 0.5, 2.0, lengths)[0].tolist() for mode in CORRECTIONS}
    assert weights == {
        "token_truncate": [0.5, 0.5, 1.0, 2.0, 2.0],
        "token_mask": [0.0, 0.5, 1.0, 2.0, 0.0],
        "sequence_truncate": [0.5, 0.5, 2.0, 2.0, 2.0],
        "sequence_mask": [0.0, 0.0, 2.0, 2.0, 0.0],
        "geometric_mask": [0.0, 0.0, 1.0, 1.0, 0.0],
    }


@given(
    st.lists(st.floats(0, 12, width=32), min_size=1, max_size=40),
    st.floats(0, 1, exclude_min=True, allow_subnormal=False),
)
def test_the_entropy_threshold_is_torchs_quantile(values, share):
    entropy = torch.tensor(values, dtype=torch.float64)
    assert entropy_quantile(entropy, share) == pytest.approx(float(torch.quantile(entropy, 1 - share)), abs=1e-12)


def test_totals_leave_masked_tokens_out_of_counts_and_quantile():
    settings = Loss(top_entropy_quantile=0.5, mask_truncated_completions=True)
    entropy = torch.tensor([1.0, 2.0, 9.0, 9.0, 3.0, 4.0])
    totals = batch_totals([2, 2, 2], settings, 12, truncated=[False, True, False], entropy=entropy)
    assert totals == BatchTotals(3, 4, 12, entropy_threshold=2.5, num_entropy_tokens=2)
    assert batch_totals([2, 2, 2], Loss(), 12) == BatchTotals(3, 6, 12)


# Batching -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, ALL_PARTS, {"importance_sampling_level": "sequence", "beta": 0.1}])
@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_micro_batches_and_packing_change_nothing(loss_type, options):
    inputs, settings = random_inputs(), Loss(loss_type=loss_type, **options)
    totals = totals_of(inputs, settings)
    whole, whole_metrics = compute_loss(inputs, totals, settings)
    expected, expected_metrics = gradients(whole, inputs), merge_metrics([whole_metrics])
    for split in ([[0, 1], [2, 3, 4, 5]], [[4], [1], [5], [0], [3], [2]], [[5, 2, 1], [], [3, 0, 4]]):
        parts = [compute_loss(select(inputs, numbers), totals, settings) for numbers in split]
        loss = torch.stack([part for part, _ in parts]).sum()
        torch.testing.assert_close(loss, whole, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(gradients(loss, inputs), expected, rtol=1e-12, atol=1e-13)
        metrics = merge_metrics([metrics for _, metrics in parts])
        assert metrics.keys() == expected_metrics.keys()
        assert metrics == pytest.approx(expected_metrics, rel=1e-12)


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_groups_with_equal_rewards_can_be_skipped_only_where_they_add_nothing(loss_type):
    inputs = random_inputs()
    inputs = replace(inputs, advantages=inputs.advantages * torch.tensor([1, 0, 1, 0, 0, 1.0]))
    for options in ({}, {"top_entropy_quantile": 0.5}, {"beta": 0.1}, {"entropy_coef": 0.1}):
        settings = Loss(loss_type=loss_type, **options)
        totals = totals_of(inputs, settings)
        whole, _ = compute_loss(inputs, totals, settings)
        part, _ = compute_loss(select(inputs, [0, 2, 5]), totals, settings)
        same = all(map(torch.allclose, gradients(whole, inputs), gradients(part, inputs)))
        assert same == may_skip_equal_groups(settings), options


# Nothing to train on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_empty_and_masked_micro_batches_give_a_zero_loss_with_zero_gradient(loss_type):
    settings = Loss(loss_type=loss_type, **ALL_PARTS)
    inputs = random_inputs()
    totals = totals_of(inputs, settings)
    masked = replace(inputs, mask=torch.zeros_like(inputs.mask))
    for empty in (masked, select(inputs, []), select(inputs, [2])):  # the third sequence is truncated
        loss, metrics = compute_loss(empty, totals, settings)
        assert loss.item() == 0
        loss.backward()
        figures = merge_metrics([metrics])
        assert figures.pop("loss") == 0
        assert all(math.isfinite(value) for value in figures.values())
    assert not inputs.logprobs.grad.any()
    nothing = BatchTotals(0, 0, MAX_COMPLETION_LENGTH, entropy_threshold=0.0, num_entropy_tokens=0)
    assert compute_loss(select(inputs, []), nothing, settings)[0].item() == 0


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_what_is_masked_may_be_anything(loss_type):
    settings = Loss(loss_type=loss_type, **ALL_PARTS)
    inputs = random_inputs()
    mask = inputs.mask.clone()
    mask[[1, 6, 20]] = False
    inputs = replace(inputs, mask=mask)
    totals = totals_of(inputs, settings)
    expected, _ = compute_loss(inputs, totals, settings)
    spoilt = {}
    for name, value in (("logprobs", -math.inf), ("old_logprobs", math.nan), ("rollout_logprobs", math.inf),
                        ("ref_logprobs", -math.inf), ("entropy", math.nan)):  # fmt: skip
        values = getattr(inputs, name).detach().clone()
        values[~mask] = value
        spoilt[name] = values.requires_grad_(name in ("logprobs", "entropy"))
    inputs_spoilt = replace(inputs, **spoilt)
    loss, metrics = compute_loss(inputs_spoilt, totals, settings)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, inputs_spoilt), gradients(expected, inputs))
    assert all(math.isfinite(value) for value in merge_metrics([metrics]).values())


def test_a_token_without_rollout_logprob_is_not_corrected_and_not_measured():
    inputs = random_inputs()
    rollout = inputs.rollout_logprobs.clone()
    rollout[::2] = math.nan
    unknown = replace(inputs, rollout_logprobs=rollout)
    same = replace(inputs, rollout_logprobs=torch.where(rollout.isnan(), inputs.old_logprobs, rollout))
    for correction in CORRECTIONS:
        settings = Loss(importance_sampling_correction=correction, off_policy_mask_threshold=9.0)
        loss, metrics = compute_loss(unknown, totals_of(inputs, settings), settings)
        expected, _ = compute_loss(same, totals_of(inputs, settings), settings)
        torch.testing.assert_close(loss, expected)
    gaps = (inputs.old_logprobs - inputs.rollout_logprobs)[1::2]
    assert merge_metrics([metrics])["mismatch_logp_mean"] == pytest.approx(gaps.abs().mean().item())


@pytest.mark.parametrize("loss_type", OBJECTIVES)
@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_extreme_ratios_in_float32_leave_finite_gradients(loss_type, shift):
    inputs = random_inputs()
    inputs = replace(
        inputs,
        logprobs=(inputs.logprobs.detach().float() + shift).requires_grad_(),
        old_logprobs=inputs.old_logprobs.float(),
        rollout_logprobs=inputs.rollout_logprobs.float() - shift,
        ref_logprobs=inputs.ref_logprobs.float(),
    )
    settings = Loss(loss_type=loss_type, **ALL_PARTS)
    loss, _ = compute_loss(inputs, totals_of(inputs, settings), settings)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradients(loss, inputs)[0]).all()


@pytest.mark.parametrize("options, missing, name", [
    ({"beta": 0.1}, "ref_logprobs", "beta needs ref_logprobs"),
    ({"entropy_coef": 0.1}, "entropy", "entropy_coef needs entropy"),
    ({"mask_truncated_completions": True}, "truncated", "mask_truncated_completions needs truncated"),
])  # fmt: skip
def test_what_the_settings_need_but_the_caller_left_out_is_named(options, missing, name):
    inputs = replace(random_inputs(), **{missing: None})
    with pytest.raises(ValueError, match=name):
        compute_loss(inputs, BatchTotals(6, 29, 12), Loss(**options))
    with pytest.raises(ValueError, match="top_entropy_quantile needs"):
        batch_totals([3], Loss(top_entropy_quantile=0.5), 12)


# Metrics ------------------------------------------------------------------------------------------------------------


def test_mismatch_metrics_are_the_plain_formulas():
    inputs = random_inputs()
    loss, metrics = compute_loss(inputs, totals_of(inputs, Loss()), Loss())
    figures = merge_metrics([metrics])
    gaps = inputs.old_logprobs - inputs.rollout_logprobs
    w = gaps.exp()
    assert figures["loss"] == pytest.approx(loss.item())
    assert figures["mismatch_logp_mean"] == pytest.approx(gaps.abs().mean().item())
    assert figures["mismatch_logp_max"] == pytest.approx(gaps.abs().max().item())
    assert figures["mismatch_kl"] == pytest.approx((w - gaps - 1).mean().item())
    assert figures["mismatch_ess"] == pytest.approx((w.sum() ** 2 / (len(w) * (w**2).sum())).item())
    assert figures["correction_weight_mean"] == pytest.approx(w.clamp(max=2).mean().item())
    assert figures["correction_clip_ratio"] == pytest.approx((w > 2).double().mean().item())
    ratio = (inputs.logprobs - inputs.old_logprobs).exp()
    assert figures["importance_ratio_mean"] == pytest.approx(ratio.mean().item())
    assert figures["importance_ratio_max"] == pytest.approx(ratio.max().item())
    assert figures["entropy"] == pytest.approx(inputs.entropy.mean().item())


def test_merging_weighs_by_what_was_counted():
    parts = [
        {"mean": Mean(6.0, 3.0), "top": Maximum(1.0), "sum": Total(1.0), "size": EffectiveSampleSize(2.0, 2.0, 2.0)},
        {"mean": Mean(1.0, 1.0), "top": Maximum(4.0), "sum": Total(2.0), "size": EffectiveSampleSize(3.0, 9.0, 1.0)},
        {"mean": Mean(0.0, 0.0), "other": Mean(0.0, 0.0), "none": Maximum(-math.inf)},
    ]
    assert merge_metrics(parts) == {"mean": 7 / 4, "top": 4.0, "sum": 3.0, "size": 25 / 33}
    assert merge_metrics([]) == {}


# A user's own loss --------------------------------------------------------------------------------------------------


def own(tmp_path, body, name="my_loss"):
    path = tmp_path / "own.py"
    path.write_text(f"import torch\n\n\ndef my_loss(inputs, totals, settings):\n    {body}\n")
    return Loss(function=f"{path}:{name}", mask_truncated_completions=True)


def test_without_a_function_the_built_in_loss_is_meant():
    assert resolve_loss(Loss()) is compute_loss


def test_the_documented_loss_of_ones_own_works_and_is_batched_exactly():
    path = ROOT / "docs" / "examples" / "my_loss.py"
    settings = Loss(function=f"{path}:capped_reinforce", importance_sampling_clip_max=1.5)
    function = resolve_loss(settings)
    inputs = random_inputs()
    totals = totals_of(inputs, settings)
    loss, metrics = function(inputs, totals, settings)
    weight = (inputs.logprobs - inputs.rollout_logprobs).detach().exp().clamp(max=1.5)
    expected = -(weight * inputs.advantages[inputs.sequence]) / len(weight)
    torch.testing.assert_close(gradients(loss, inputs)[0], expected)
    parts = [function(select(inputs, numbers), totals, settings) for numbers in ([3, 1], [0, 2, 4, 5])]
    torch.testing.assert_close(sum(part for part, _ in parts).item(), loss.item())
    figures = merge_metrics([metrics for _, metrics in parts])
    assert figures["weight"] == pytest.approx(weight.mean().item())
    assert {"entropy", "mismatch_kl", "loss"} <= figures.keys()


def test_an_own_loss_may_return_the_loss_alone_and_sees_truncated_sequences_masked(tmp_path):
    settings = own(tmp_path, "return (inputs.logprobs * inputs.mask).sum()")
    inputs = random_inputs()
    loss, metrics = resolve_loss(settings)(inputs, totals_of(inputs, settings), settings)
    torch.testing.assert_close(loss, inputs.logprobs[inputs.sequence != 2].sum())
    assert merge_metrics([metrics])["loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("body, message", [
    ("return 1.0", r"returned a float; return a scalar tensor"),
    ("return inputs.logprobs", r"returned a Tensor of shape \[29\]"),
    ("return inputs.logprobs.detach().sum()", "without a gradient"),
    ("return inputs.logprobs.sum(), {'x': 'high'}", "metric 'x' is a str; return a number"),
])  # fmt: skip
def test_what_an_own_loss_returns_is_checked(tmp_path, body, message):
    settings = own(tmp_path, body)
    inputs = random_inputs()
    with pytest.raises(UserError, match=message) as caught:
        resolve_loss(settings)(inputs, totals_of(inputs, settings), settings)
    assert "own.py:my_loss" in str(caught.value)


def test_an_own_loss_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(UserError, match="no reference; write path/file.py:function"):
        resolve_loss(Loss(function="dapo"))
    with pytest.raises(UserError, match=r"there is no file .*missing\.py"):
        resolve_loss(Loss(function=str(tmp_path / "missing.py:f")))
    with pytest.raises(UserError, match="my_los.*did you mean 'my_loss'"):
        resolve_loss(own(tmp_path, "return 0", name="my_los"))
    (tmp_path / "value.py").write_text("weight = 3\n")
    with pytest.raises(UserError, match="is a int; name a function"):
        resolve_loss(Loss(function=str(tmp_path / "value.py:weight")))
