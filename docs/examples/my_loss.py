"""A loss of your own: REINFORCE with the ratio to the rollout as a capped weight, and nothing else.

    loss = -1/L sum_t stop_gradient(min(pi / pi_rollout, cap)) A log pi

Use it with `function = "docs/examples/my_loss.py:capped_reinforce"` in `[loss]`. It is called for every micro-batch;
dividing by a constant of the optimiser step (`totals`) makes their gradients add up to that of the whole step.
"""

from grpo.config.schema import Loss
from grpo.training.loss import BatchTotals, LossInputs


def capped_reinforce(inputs: LossInputs, totals: BatchTotals, settings: Loss):
    ratio = (inputs.logprobs - inputs.rollout_logprobs).detach().exp()
    weight = ratio.clamp(max=settings.importance_sampling_clip_max)
    advantages = inputs.advantages[inputs.sequence]
    loss = -(weight * advantages * inputs.logprobs)[inputs.mask].sum() / totals.num_tokens
    return loss, {"weight": weight[inputs.mask].mean()}
