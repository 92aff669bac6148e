"""How much of an adapter's effect the 16-bit policy shows: the metric `adapter_survival`.

    effect   = logprobs with the adapter - logprobs without it, of the tokens of a few completions
    survival = <effect in 16 bit, effect in float32> / <effect in float32, effect in float32>

Float32 here means the same frozen values, widened layer by layer as they are used, with A and B as the optimiser has
them. 1: what was learned is what is sampled. Near 0: the optimiser moves numbers that rounding takes back. While an
effect is smaller than the rounding noise of the logprobs themselves the value scatters, also beyond 1.

Not here: vLLM's logprobs, whose distance from the training graph's is `mismatch_kl`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from grpo.model.head import Head
from grpo.model.image_tokens import images_within
from grpo.model.layout import EMBEDDING, HEAD
from grpo.model.rope import Rotary
from grpo.policy.graph import ATTENTION, rebuild_buffers, set_module, set_tensor
from grpo.policy.image_rows import ImageRows
from grpo.policy.lora_linear import ADAPTER, BaseLinear, LoraLinear
from grpo.policy.packing import predicting_states
from grpo.policy.policy import Policy

if TYPE_CHECKING:
    from grpo.images import Image
    from grpo.policy.vision_tower import VisionTower

SEQUENCES, TOKENS, LONGEST = 16, 1024, 256
"""How many completions are measured at most, how many tokens in all, and of one completion. The noise of rounding falls
with the root of the tokens: with 50 of them a first step's value is anywhere between 0.5 and 1.5."""
HEAD_ROWS = 8192
"""Rows of the output head that are widened at once."""


@torch.no_grad()
def adapter_survival(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    images: Sequence[Sequence[Image]] | None = None,
) -> float | None:
    """The share of the adapter's effect that shows in 16 bit, on the first of `completions` (SEQUENCES, TOKENS).

    images: of each sequence; of those that an environment showed, and what follows them, nothing is measured. None
    where there is nothing to measure: a float32 policy, an adapter of zeros, no completion, or no memory for it.
    """
    shown = images or [()] * len(prompts)
    if policy.tower is not None:
        given = [before_images(policy.tower, *each) for each in zip(prompts, completions, shown, strict=True)]
        completions, shown = [one for one, _ in given], [one for _, one in given]
    heads, tails, seen = measured_sequences(prompts, completions, shown)
    if policy.base.dtype == torch.float32 or not tails or policy.adapter_is_zero():
        return None
    try:
        truth = float32_effect(policy, heads, tails, seen)
        with policy.model.disable_adapter():
            without = policy.score(heads, tails, temperature=1.0, images=seen).logprobs
        effect = policy.score(heads, tails, temperature=1.0, images=seen).logprobs.float() - without.float()
    except torch.OutOfMemoryError:
        return None
    size = float(truth @ truth)
    return float(effect @ truth) / size if size > 0 else None


def measured_sequences(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], images: Sequence[Sequence[Image]]
) -> tuple[list[list[int]], list[list[int]], list[Sequence[Image]]]:
    """The first prompts and completions, as far as SEQUENCES and TOKENS go, with the prompts' images; those with an
    empty completion left out."""
    heads: list[list[int]] = []
    tails: list[list[int]] = []
    seen: list[Sequence[Image]] = []
    tokens = 0
    for prompt, completion, shown in zip(prompts, completions, images, strict=True):
        if completion and tokens < TOKENS and len(tails) < SEQUENCES:
            heads.append(list(prompt))
            tails.append(list(completion[:LONGEST]))
            seen.append(shown)
            tokens += len(tails[-1])
    return heads, tails, seen


def before_images(
    tower: VisionTower, prompt: Sequence[int], completion: Sequence[int], images: Sequence[Image]
) -> tuple[Sequence[int], Sequence[Image]]:
    """A completion up to the first image that an environment showed, and its prompt's images."""
    placeholder = tower.vision.image_token_id
    sizes = [tower.image_tokens.tokens(image.width, image.height) for image in images]
    own = images_within(prompt, placeholder, sizes)
    if own == len(images):
        return completion, images
    return completion[: list(completion).index(placeholder)], images[:own]


def float32_effect(
    policy: Policy, prompts: list[list[int]], completions: list[list[int]], images: Sequence[Sequence[Image]]
) -> Tensor:
    """What the adapter adds to each token's logprob in float32: [tokens]."""
    graph, rows = float32_graph(policy), policy.image_rows(prompts, completions, images)
    with_adapter = float32_logprobs(policy, graph, prompts, completions, rows)
    for module in graph.modules():
        if isinstance(module, Float32Linear):
            module.trained = False
    return with_adapter - float32_logprobs(policy, graph, prompts, completions, rows)


class Float32Linear(nn.Module):
    """A linear layer of the policy in float32: its frozen rows are widened at each use, and its adapter added."""

    def __init__(self, layer: BaseLinear | LoraLinear):
        super().__init__()
        self.adapter = layer if isinstance(layer, LoraLinear) else None
        self.trained = True
        """Whether the adapter has its trained values, or acts as where adapters are disabled."""
        self.frozen = layer.base_layer if isinstance(layer, LoraLinear) else layer

    def forward(self, x: Tensor) -> Tensor:
        bias = self.frozen.bias
        y = F.linear(x, self.frozen.dense().float(), None if bias is None else bias.float())
        factors = None
        if self.adapter is not None:
            factors = self.adapter.scaled(ADAPTER) if self.trained else self.adapter.initial()
        return y if factors is None else y + F.linear(F.linear(x, factors[0]), factors[1])


class Float32Embedding(nn.Module):
    """The embedding's rows in float32, times Gemma 3's scale."""

    def __init__(self, weight: Tensor, scale: float):
        super().__init__()
        self.rows, self.scale = weight, scale

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.rows).float() * self.scale


def float32_graph(policy: Policy) -> nn.Module:
    """transformers' decoder in float32 over the policy's weights and adapter; only norms are copied."""
    base, config = policy.base, copy.deepcopy(policy.base.config)
    with torch.device("meta"):
        graph = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=ATTENTION)
    for linear in base.linears.values():
        for part in linear.parts:
            set_module(graph, part, Float32Linear(policy.decoder.get_submodule(part)))
    scale = config.hidden_size**0.5 if hasattr(graph.model.embed_tokens, "embed_scale") else 1.0
    graph.model.embed_tokens = Float32Embedding(base.tensors[EMBEDDING], scale)
    for name, tensor in base.tensors.items():
        if name not in (EMBEDDING, HEAD):
            set_tensor(graph, name, tensor.float())
    rebuild_buffers(graph, config, base.device, torch.float32)
    for name, module in policy.decoder.named_modules():
        if isinstance(module, Rotary):  # with the frequencies of the run's longest sequence
            set_module(graph, name, module)
    return graph.model.eval().requires_grad_(False)


def float32_logprobs(
    policy: Policy,
    graph: nn.Module,
    prompts: list[list[int]],
    completions: list[list[int]],
    images: ImageRows | None = None,
) -> Tensor:
    """Logprob of every completion token [tokens], in the order of `Policy.score`."""
    hidden, targets = predicting_states(graph, prompts, completions, policy.base.device, images=images)
    return head_logprobs(hidden, policy.head_weight(), targets, policy.base.head_form)


def head_logprobs(hidden: Tensor, head: Tensor, targets: Tensor, form: Head) -> Tensor:
    """log softmax of hidden [tokens, width] head^T at `targets` [tokens], from HEAD_ROWS rows of `head` at a time."""
    normaliser = torch.full(targets.shape, float("-inf"), device=hidden.device)
    chosen = torch.zeros(targets.shape, device=hidden.device)
    for start in range(0, head.shape[0], HEAD_ROWS):
        logits = form.logits(F.linear(hidden, head[start : start + HEAD_ROWS].to(hidden.device).float()), start)
        normaliser = torch.logaddexp(normaliser, logits.logsumexp(-1))
        inside = (targets >= start) & (targets < start + logits.shape[1])
        index = (targets - start).clamp(0, logits.shape[1] - 1)
        chosen = torch.where(inside, logits.gather(1, index[:, None])[:, 0], chosen)
    return chosen - normaliser
