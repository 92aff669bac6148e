"""Every loss that TRL has, against TRL's own `GRPOTrainer._compute_loss`: value and gradients in float64.

TRL's method runs on a stand-in for the trainer, whose forward pass returns the given log-probabilities. Its rollout
weights are computed inside another method, so they are written out here.
"""

import inspect
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer

from grpo.config.schema import Loss
from grpo.training.loss import OBJECTIVES, compute_loss
from grpo.training.loss_metrics import merge_metrics
from tests.helpers.loss_batches import MAX_COMPLETION_LENGTH, gradients, lengths_of, random_inputs, totals_of

VARIANTS = {
    "plain": {},
    "clip higher": {"epsilon": 0.1, "epsilon_high": 1.3},
    "by sequence": {"importance_sampling_level": "sequence", "epsilon": 0.05},
    "two-sided clip": {"delta": 1.4},
    "kl": {"beta": 0.3},
    "kl without importance weight": {"beta": 0.3, "kl_importance_weight": False},
    "kl by sequence": {"beta": 0.3, "importance_sampling_level": "sequence"},
    "entropy bonus": {"entropy_coef": 0.2},
    "entropy mask": {"top_entropy_quantile": 0.4},
    "entropy mask and bonus": {"top_entropy_quantile": 0.4, "entropy_coef": 0.2, "beta": 0.1},
    "truncated masked": {"mask_truncated_completions": True, "beta": 0.1, "entropy_coef": 0.1},
    "truncated and entropy masked": {"mask_truncated_completions": True, "top_entropy_quantile": 0.5},
    "off-policy sequence mask": {"off_policy_mask_threshold": 0.05},
    "token truncate": {"importance_sampling_correction": "token_truncate", "importance_sampling_clip_min": 0.8},
    "token mask": {"importance_sampling_correction": "token_mask", "importance_sampling_clip_min": 0.8},
    "sequence truncate": {"importance_sampling_correction": "sequence_truncate", "importance_sampling_clip_min": 0.8},
    "sequence mask": {"importance_sampling_correction": "sequence_mask", "importance_sampling_clip_max": 1.5},
    "everything": {
        "beta": 0.2,
        "entropy_coef": 0.1,
        "top_entropy_quantile": 0.7,
        "mask_truncated_completions": True,
        "off_policy_mask_threshold": 0.05,
        "importance_sampling_correction": "token_truncate",
        "importance_sampling_clip_max": 1.2,
    },
}
CASES = [
    pytest.param(loss_type, options, id=f"{loss_type}, {name}")
    for loss_type in OBJECTIVES
    for name, options in VARIANTS.items()
    if not ("delta" in options and loss_type in ("cispo", "sapo"))
]


def loss_settings(loss_type, options):
    return Loss(**{"loss_type": loss_type, "importance_sampling_correction": "none", **options})


def pad(values, lengths):
    return torch.nn.utils.rnn.pad_sequence(values.split(lengths), batch_first=True)


class StubAccelerator:
    num_processes, sync_gradients = 1, True

    def pad_across_processes(self, tensor, **_):
        return tensor

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, **_):
        return tensor


def trl_trainer(settings, logprobs, entropy):
    """Just enough of a GRPOTrainer for `_compute_loss`."""
    high = 5.0 if settings.loss_type == "cispo" else settings.epsilon
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logprobs, entropy, None),
        aux_loss_enabled=False,
        accelerator=StubAccelerator(),
        args=SimpleNamespace(
            delta=settings.delta,
            use_bias_correction_kl=settings.kl_importance_weight,
            sapo_temperature_pos=settings.sapo_temperature_pos,
            sapo_temperature_neg=settings.sapo_temperature_neg,
            steps_per_generation=1,
        ),
        beta=settings.beta,
        epsilon_low=settings.epsilon,
        epsilon_high=high if settings.epsilon_high is None else settings.epsilon_high,
        loss_type="grpo" if settings.loss_type == "gspo" else settings.loss_type,
        importance_sampling_level="sequence" if settings.loss_type == "gspo" else settings.importance_sampling_level,
        top_entropy_quantile=settings.top_entropy_quantile,
        off_policy_mask_threshold=settings.off_policy_mask_threshold,
        get_off_policy_mask=GRPOTrainer.get_off_policy_mask,
        use_vllm=True,
        vllm_importance_sampling_correction=settings.importance_sampling_correction != "none",
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_COMPLETION_LENGTH,
        _entropy_bonus_enabled=settings.entropy_coef != 0,
        use_adaptive_entropy=False,
        entropy_coef=settings.entropy_coef,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    trainer.get_high_entropy_mask = partial(inspect.unwrap(GRPOTrainer.get_high_entropy_mask), trainer)
    return trainer


def rollout_ratio(settings, old, rollout, mask):
    """What TRL calls `importance_sampling_ratio`: [B, T], or [B, 1] by sequence."""
    level, action = settings.importance_sampling_correction.split("_")
    difference = (old - rollout) * mask
    ratio = torch.exp(difference.sum(1, keepdim=True) if level == "sequence" else difference)
    low, high = settings.importance_sampling_clip_min, settings.importance_sampling_clip_max
    return ratio.clamp(low, high) if action == "truncate" else ratio * ((ratio >= low) & (ratio <= high))


def trl_loss(inputs, settings):
    """TRL's loss of the whole batch, and its metrics."""
    lengths = lengths_of(inputs)
    logprobs, entropy = pad(inputs.logprobs, lengths), pad(inputs.entropy, lengths)
    mask = pad(torch.ones_like(inputs.logprobs), lengths)
    if settings.mask_truncated_completions:
        mask = mask * ~inputs.truncated[:, None]
    old = logprobs.detach() if inputs.old_logprobs is None else pad(inputs.old_logprobs, lengths)
    rollout = pad(inputs.rollout_logprobs, lengths)
    prompt = torch.ones(len(lengths), 2, dtype=torch.int64)
    batch = {
        "prompt_ids": prompt,
        "prompt_mask": prompt,
        "completion_ids": mask.long(),
        "completion_mask": mask,
        "advantages": inputs.advantages,
        "num_items_in_batch": mask.sum(),
        "ref_per_token_logps": pad(inputs.ref_logprobs, lengths),
        "sampling_per_token_logps": rollout,
    }
    if inputs.old_logprobs is not None:
        batch["old_per_token_logps"] = old
    if settings.importance_sampling_correction != "none":
        batch["importance_sampling_ratio"] = rollout_ratio(settings, old, rollout, mask)
    trainer = trl_trainer(settings, logprobs, entropy)
    loss = inspect.unwrap(GRPOTrainer._compute_loss)(trainer, trainer.model, batch)
    return loss, {name: values[0] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("on_policy", [False, True], ids=["off policy", "on policy"])
@pytest.mark.parametrize("loss_type, options", CASES)
def test_value_and_gradient_equal_trl(loss_type, options, on_policy):
    inputs, settings = random_inputs(on_policy=on_policy), loss_settings(loss_type, options)
    loss, _ = compute_loss(inputs, totals_of(inputs, settings), settings)
    expected, _ = trl_loss(inputs, settings)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    gradient = gradients(loss, inputs)
    torch.testing.assert_close(gradient, gradients(expected, inputs), rtol=1e-10, atol=1e-10)
    assert gradient[0].any()


@pytest.mark.parametrize("loss_type", OBJECTIVES)
def test_metrics_equal_trl(loss_type):
    inputs = random_inputs()
    settings = loss_settings(loss_type, {"beta": 0.2, "epsilon_high": 1.1 if loss_type == "cispo" else 0.1})
    _, metrics = compute_loss(inputs, totals_of(inputs, settings), settings)
    ours, (_, theirs) = merge_metrics([metrics]), trl_loss(inputs, settings)
    names = {"kl": "kl", "entropy": "entropy"}
    if loss_type == "cispo":
        names["clip_ratio"] = "cispo_clip_ratio"
    elif loss_type != "sapo":
        names |= {
            "clip_ratio": "clip_ratio/region_mean",
            "clip_ratio_low": "clip_ratio/low_mean",
            "clip_ratio_high": "clip_ratio/high_mean",
        }
    for name, theirs_name in names.items():
        assert ours[name] == pytest.approx(theirs[theirs_name], rel=1e-6), name
        assert ours[name] != 0, name


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_changes_the_loss(name):
    """Otherwise agreement with TRL would show nothing about it."""
    if name == "plain":
        return
    inputs, plain = random_inputs(), loss_settings("dapo", {})
    settings = loss_settings("dapo", VARIANTS[name])
    loss, _ = compute_loss(inputs, totals_of(inputs, settings), settings)
    expected, _ = compute_loss(inputs, totals_of(inputs, plain), plain)
    difference = torch.cat(gradients(loss, inputs)) - torch.cat(gradients(expected, inputs))
    assert difference.abs().max() > 1e-4
