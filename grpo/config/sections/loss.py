"""`[loss]`: the keys from rewards to the loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo.config.sections.section import PositiveFloat, PositiveInt, Section


class Loss(Section):
    """`[loss]`: from rewards to advantages to the loss. Equations and papers: `docs/algorithms.md`."""

    loss_type: Literal["grpo", "dapo", "dr_grpo", "bnpo", "gspo", "cispo", "sapo"] = "dapo"
    """Objective and its normalisation."""
    function: str | None = None
    """Your own loss instead: "package.module:function" or "path/file.py:function"."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL penalty against the reference model. 0: no reference forward."""
    reference: Literal["start", "base"] = "start"
    """The reference: the adapter as the run finds it, as in TRL (a fresh one is the base), or the base without it."""
    reference_storage: Literal["16bit", "8bit", "4bit"] = "8bit"
    """With `full_finetuning` and `beta`: how the model of the start, which is the reference, is held beside the one in
    training. What rounding does to it is a part of the penalty: of a small model 0.003 nats a token in 8 bit, 0.4 in
    4."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL penalty (Schulman's names)."""
    kl_importance_weight: bool = True
    """Multiply the KL estimate by the importance ratio, which makes its gradient unbiased off policy
    (TRL's `use_bias_correction_kl`)."""
    epsilon: PositiveFloat = 0.2
    """Clip: the ratio may fall to `1 - epsilon`."""
    epsilon_high: PositiveFloat | None = None
    """Clip: the ratio may rise to `1 + epsilon_high`. Default: `epsilon`; for cispo the absolute cap, default 5."""
    delta: PositiveFloat | None = None
    """Two-sided clip: cap on the ratio where the advantage is negative."""
    sapo_temperature_pos: PositiveFloat = 1.0
    """SAPO's gate temperature for positive advantages."""
    sapo_temperature_neg: PositiveFloat = 1.05
    """SAPO's gate temperature for negative advantages."""
    importance_sampling_level: Literal["token", "sequence"] = "token"
    """Ratio per token or, as in GSPO, per sequence."""
    advantage_level: Literal["episode", "turn"] = "episode"
    """One advantage for all turns of an episode, or one for each turn from what the episode earns from it on."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divide advantages by the standard deviation of the group, of the batch, or not."""
    leave_one_out: bool = False
    """Baseline from the group's other completions (RLOO) instead of the whole group."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Normalise the weighted sum of rewards, or each reward before summing (GDPO)."""
    mask_truncated_completions: bool = False
    """Leave completions that ran into the length limit out of the loss."""
    entropy_coef: float = 0.0
    """Weight of an entropy bonus."""
    top_entropy_quantile: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Train only on this share of tokens, those of highest entropy."""
    importance_sampling_correction: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
    ] = "token_truncate"
    """Correction of the rollout-trainer mismatch: weight by the ratio of trainer to rollout probability, truncated or
    masked at the bounds below, per token or per sequence; "geometric_mask" drops sequences by the mean per token."""
    importance_sampling_clip_max: PositiveFloat = 2.0
    """Upper bound of that ratio."""
    importance_sampling_clip_min: Annotated[float, Field(ge=0)] = 0.0
    """Lower bound of that ratio."""
    off_policy_mask_threshold: PositiveFloat | None = None
    """Drop sequences with negative advantage whose mean log-ratio to the rollout exceeds this (DeepSeek-V3.2)."""
    dynamic_sampling: bool = False
    """Replace groups with equal rewards by new prompts until the batch is full (DAPO)."""
    dynamic_sampling_max_rounds: PositiveInt = 4
    """How many times to sample before training on what there is."""

    @model_validator(mode="after")
    def cispo_cap_is_absolute(self) -> Loss:
        if self.loss_type == "cispo" and self.epsilon_high is not None and self.epsilon_high < 1:
            raise ValueError(
                f"epsilon_high = {self.epsilon_high} is below 1: for cispo it is the absolute cap on the "
                "ratio, such as 5"
            )
        return self

    @model_validator(mode="after")
    def nothing_is_ignored(self) -> Loss:
        if self.delta is not None and self.loss_type in ("cispo", "sapo"):
            raise ValueError(f"delta caps a ratio beside a clip, which {self.loss_type} has not; leave it out")
        if self.multi_objective_aggregation == "normalize_then_sum" and self.scale_rewards != "group":
            raise ValueError(
                f'multi_objective_aggregation = "normalize_then_sum" scales each reward by its group; leave '
                f'scale_rewards = "{self.scale_rewards}" out'
            )
        if self.multi_objective_aggregation == "normalize_then_sum" and self.advantage_level == "turn":
            raise ValueError(
                'advantage_level = "turn" compares what turns earn in all; leave multi_objective_aggregation out'
            )
        return self

    @model_validator(mode="after")
    def bounds_in_order(self) -> Loss:
        if self.importance_sampling_clip_min >= self.importance_sampling_clip_max:
            raise ValueError("importance_sampling_clip_min must be below importance_sampling_clip_max")
        return self
