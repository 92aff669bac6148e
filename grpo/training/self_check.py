"""The gate at the start of a run: generation and the training graph compute the same model, with the adapter that is
being trained.

Nothing else would tell. A stale adapter, a window that is one token longer, a multiplier that one of the two leaves out
raise no error anywhere: the run merely learns from the wrong policy. No list says which families of models are alike in
both; each model is compared, in two ways.

Logprobs: what vLLM samples after a long prompt is scored by the training graph, with the adapter as it is and moved.
vLLM must follow the move, and how far is known from the training graph. The move is made as small as stands out from
the rounding of the two graphs, whatever modules have an adapter.

Modules (`module_check.py`): one by one, each on vLLM's input, with an adapter that acts on all of them. It sees what is
too small for logprobs to tell from rounding, and it names what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.images import Image
from grpo.model.families.table import listed
from grpo.policy.full_policy import FullPolicy
from grpo.policy.lora_linear import ADAPTER, LoraLinear
from grpo.policy.policy import Policy
from grpo.rollout.types import Request, SamplingSettings
from grpo.session import Session
from grpo.training.module_check import Difference, as_in_training, first_difference
from grpo.training.weight_move import moved_weights

LONGEST_PROMPT = 1024
"""Tokens of the prompt, where the run's sequences are that long: windows and rotary factors show with distance."""
TEMPERATURES, UNCERTAIN = (1.0, 2.0), 0.5
"""Tried in this order, until tokens cost that much on average: some models are sure of what follows noise. vLLM allows
no more than 2."""
COMPLETIONS, TOKENS = 2, 16
"""How many completions of the prompt are compared, at the least, and their tokens."""
NUDGES = tuple(0.02 * 2**power for power in range(8))
"""Standard deviations of what is added to B, tried in this order."""
STANDS_OUT = 4.0
"""How many times the difference between the two graphs the effect of a nudge should be, in mean |logprob|."""
LEAST_FOLLOWED = 0.5
"""Share of the effect that vLLM must show. A stale adapter shows none, a served one all."""
TOLERANCE = {torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
"""Largest allowed mean |logprob difference| between vLLM and the training graph."""
FLOAT32_ON_CPU = 2e-4
"""The same where nothing is rounded to less than float32 on the way: ten times what was seen."""
HEAD_FACTOR, HEAD_STANDS_OUT = 1.25, 0.8
"""A factor of logits that is told from none, and how many times the difference of logprobs its effect has to be."""
EVEN_MOVE = 1.5
"""Standard deviation of the noise in B, times the adapter's scale and root of its rank, under which modules are
compared: what an adapter adds is then about the size of its input, and stands out from a module's rounding."""


class GatePrompt(NamedTuple):
    """What the graphs are compared on."""

    ids: list[int]
    images: tuple[Image, ...]
    """Whose placeholders are among `ids`."""
    text: list[int]
    """Without them: what modules are compared on, one by one."""


Noise = Callable[[LoraLinear | None], float]
"""What is added to the B of an adapter's module, as a standard deviation; without an adapter to weights, as a share of
their size."""


class Sampled(NamedTuple):
    """Completions of one prompt, and vLLM's logprobs of all their tokens [tokens], float32."""

    tokens: list[list[int]]
    logprobs: Tensor
    temperature: float
    routes: Sequence[Tensor | None] | None = None
    """The experts that vLLM chose: which ones rounding decides, and it is not what is compared."""

    def part(self, first: int, last: int) -> Sampled:
        """The completions from `first` to `last`."""
        begin, count = sum(map(len, self.tokens[:first])), sum(map(len, self.tokens[first:last]))
        routes = None if self.routes is None else self.routes[first:last]
        return self._replace(
            tokens=self.tokens[first:last], logprobs=self.logprobs[begin : begin + count], routes=routes
        )

    @property
    def few(self) -> Sampled:
        """The first ones: what is not about vLLM's batch is asked of these alone."""
        return self.part(0, COMPLETIONS)

    @property
    def certain(self) -> bool:
        """Whether the model leaves hardly a choice, so that logprobs of 0 say nothing about what computed them."""
        return float(self.logprobs.mean()) > -UNCERTAIN


def check_start(session: Session) -> str | None:
    """Raise UserError unless vLLM computes what the training graph does, with the adapter as it is now; the adapter is
    left as it was. Returns a notice about a family that no test of this project compares."""
    prompt = gate_prompt(session)
    check_logprobs(session, prompt)
    check_modules(session, prompt)
    family = session.base.config.model_type
    if family in listed():
        return None
    return (
        f"the family {family!r} is none of those that this project's tests compare; with the installed packages "
        "generation and training agree on it"
    )


def gate_prompt(session: Session) -> GatePrompt:
    """Random tokens, as many as the run's sequences may have, up to LONGEST_PROMPT; of a model that takes images with
    one among them, where there is room."""
    length = max(2, min(LONGEST_PROMPT, session.engine.settings.max_seq_length - TOKENS))
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(0, session.base.config.vocab_size, (length,), generator=generator).tolist()
    tokens = session.image_tokens
    if tokens is None:
        return GatePrompt(text, (), text)
    around = [token for token in text if token not in tokens.media_ids]
    image = tokens.example()
    seen = tokens.tokens(image.width, image.height)
    if seen > len(around) // 2:
        return GatePrompt(around, (), around)
    before, after = around[: len(around) // 4], around[len(around) // 4 + seen :]
    return GatePrompt([*before, *tokens.expand([tokens.vision.image_token_id], [image]), *after], (image,), around)


def check_logprobs(session: Session, prompt: GatePrompt) -> None:
    """Raise UserError unless sampled and trained logprobs agree and vLLM follows a move of the adapter."""
    policy, limit = session.policy, tolerance(session)
    every = sample_with_choice(session, prompt)
    before = every.few
    start = scored(policy, prompt, before)
    mean_logprob_diff = mean_abs_diff(every.logprobs, with_rest(policy, prompt, every, start))
    refuse_difference(session, prompt, mean_logprob_diff, limit, "")
    refuse_scaled_head(session, prompt, before, start)
    least = max(STANDS_OUT * mean_logprob_diff, limit / STANDS_OUT)
    what, others = moved_names(policy)
    nudge = nudge_that_stands_out(policy, prompt, before, start, least)
    if nudge is None:
        check_modules(session, prompt)  # the two may differ by more than an adapter can
        if before.certain:
            return
        raise UserError(
            f"self-test: moving the {what} on {policy.adapted()} changes no logprob by "
            f"{least:.3g}, so it cannot be trained; name other lora.target_modules"
        )
    with served_move(session, everywhere(nudge)):
        every = sample(session, prompt, before.temperature)
        after = every.few
        here = scored(policy, prompt, after)
        mean_logprob_diff = mean_abs_diff(every.logprobs, with_rest(policy, prompt, every, here))
    there = scored(policy, prompt, after)
    effect = here - there
    followed = float((after.logprobs - there) @ effect / (effect @ effect))
    if not followed > LEAST_FOLLOWED:
        raise UserError(
            f"self-test: of the effect that moving the {what} has on the training graph, generation shows "
            f"{followed:.0%}: vLLM samples from {others}{named_difference(session, prompt)}; {remedy(session)}"
        )
    # A larger move makes larger activations, and rounding errors with them.
    refuse_difference(
        session,
        prompt,
        mean_logprob_diff,
        max(limit, float(effect.abs().mean()) / STANDS_OUT),
        "moved ",
    )


def moved_names(policy: Policy) -> tuple[str, str]:
    """What is moved, and what generation would have that does not follow, in words."""
    return ("weights", "other weights") if isinstance(policy, FullPolicy) else ("adapter", "another adapter")


def check_modules(session: Session, prompt: GatePrompt) -> None:
    """Raise UserError for the first module that the two graphs do not compute alike, with an adapter that acts."""
    different = different_module(session, prompt)
    if different is not None:
        raise UserError(
            f"self-test: {different}, in vLLM beside the training graph, so completions would not come from the "
            f"trained policy; {remedy(session)}"
        )


def different_module(session: Session, prompt: GatePrompt) -> Difference | None:
    """The first module that is not alike on `prompt`, with an adapter that acts on all of them."""
    if isinstance(session.policy, FullPolicy):
        return first_difference(session, prompt.text)
    with served_move(session, even_move):
        return first_difference(session, prompt.text)


def everywhere(noise: float) -> Noise:
    """The same noise for every module."""
    return lambda layer: noise


def even_move(layer: LoraLinear | None) -> float:
    """The noise in B with which an adapter adds about as much as its input is large, whatever its rank and scale."""
    assert layer is not None
    scale, rank = abs(layer.scaling[ADAPTER]), layer.r[ADAPTER]
    return EVEN_MOVE / (scale * rank**0.5) if scale else 0.0


def tolerance(session: Session) -> float:
    """The largest allowed mean |logprob difference| for the session's device and dtype."""
    dtype = session.base.dtype
    on_cpu = session.base.device.type == "cpu"
    return FLOAT32_ON_CPU if on_cpu and dtype == torch.float32 else TOLERANCE[dtype]


def nudge_that_stands_out(
    policy: Policy, prompt: GatePrompt, sampled: Sampled, start: Tensor, least: float
) -> float | None:
    """The first of NUDGES that changes the training graph's logprobs, `start`, by `least` on average; None if none
    does."""
    for nudge in NUDGES:
        with moved(policy, everywhere(nudge)):
            if mean_abs_diff(scored(policy, prompt, sampled), start) >= least:
                return nudge
    return None


@contextmanager
def moved(policy: Policy, noise: Noise) -> Iterator[None]:
    """Inside, every B has noise of that standard deviation added, or without an adapter the weights have, as
    `moved_weights` does: the same at each call, in proportion."""
    if isinstance(policy, FullPolicy):
        with moved_weights(policy, noise(None)):
            yield
        return
    layers = policy.all_adapters()
    tensors = [layer.lora_B[ADAPTER].weight for layer in layers]
    original = [tensor.detach().clone() for tensor in tensors]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer, tensor in zip(layers, tensors, strict=True):
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * noise(layer))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, old in zip(tensors, original, strict=True):
                tensor.copy_(old)


@contextmanager
def served_move(session: Session, noise: Noise) -> Iterator[None]:
    """`moved`, in generation too."""
    try:
        with moved(session.policy, noise):
            session.engine.sync_adapter()
            yield
    finally:
        session.engine.sync_adapter()


def refuse_difference(session: Session, prompt: GatePrompt, mean_logprob_diff: float, limit: float, which: str) -> None:
    """Raise UserError for a difference between the two graphs that rounding does not explain."""
    if not mean_logprob_diff <= limit:
        raise UserError(
            f"self-test: with the {which}{moved_names(session.policy)[0]} vLLM's logprobs differ from the training "
            f"graph's by {mean_logprob_diff:.3g} on average, over {limit:.3g}, so completions would not come from the "
            f"trained policy{named_difference(session, prompt)}; {remedy(session)}"
        )


def refuse_scaled_head(session: Session, prompt: GatePrompt, sampled: Sampled, ours: Tensor) -> None:
    """Raise UserError where logits times HEAD_FACTOR, or over it, explain vLLM's logprobs better than the training
    graph's, `ours`: the comparison of modules ends before the output head, and logprobs alone would have to be apart by
    more than rounding of all layers makes."""
    scaled = scored(session.policy, prompt, sampled._replace(temperature=sampled.temperature / HEAD_FACTOR))
    effect, gap = scaled - ours, sampled.logprobs - ours
    if float(effect.abs().mean()) <= HEAD_STANDS_OUT * float(gap.abs().mean()):
        return
    share = float(gap @ effect / (effect @ effect))
    if abs(share) > LEAST_FOLLOWED:
        factor = HEAD_FACTOR if share > 0 else 1 / HEAD_FACTOR
        raise UserError(
            f"self-test: vLLM's logprobs are those of logits times about {factor:.3g}, beside the training graph's: "
            "the output head is scaled otherwise, so completions would not come from the trained policy; "
            f"{remedy(session)}"
        )


def remedy(session: Session) -> str:
    """What to do about a difference: of families that the tests compare it is a defect."""
    if session.base.config.model_type in listed():
        return "please report this with the model and the versions"
    return "use a model of another family, or another version of vLLM"


def named_difference(session: Session, prompt: GatePrompt) -> str:
    """The module to which a difference of logprobs is due, as a part of a sentence."""
    different = different_module(session, prompt)
    return f": {different or 'all layers agree, so it is the last norm or the output head'}"


def sample_with_choice(session: Session, prompt: GatePrompt) -> Sampled:
    """Short completions from vLLM at the first of TEMPERATURES at which tokens are not certain."""
    for temperature in TEMPERATURES:
        sampled = sample(session, prompt, temperature)
        if not sampled.certain:
            break
    return sampled


def sample(session: Session, prompt: GatePrompt, temperature: float) -> Sampled:
    """Short completions from vLLM, as many at once as the run's decoding steps have."""
    count = COMPLETIONS if prompt.images else max(COMPLETIONS, session.engine.compared_batch)
    requests = [Request(index, prompt.ids, seed=index, images=prompt.images) for index in range(count)]
    sampling = SamplingSettings(temperature=temperature, max_tokens=TOKENS)
    done = sorted(session.engine.generate(requests, sampling), key=lambda completion: completion.request_id)
    session.engine.release_kv_cache()  # where a training step needs its memory, scoring does
    logprobs = [logprob for completion in done for logprob in completion.logprobs]
    routes = [completion.routes for completion in done]
    return Sampled([completion.token_ids for completion in done], torch.tensor(logprobs), temperature, routes)


@torch.no_grad()
def scored(policy: Policy, prompt: GatePrompt, sampled: Sampled) -> Tensor:
    """The training graph's logprobs of the same tokens, on the CPU; of completions with about as many tokens as the
    prompt that they share at once."""
    found, together = [], max(len(prompt.ids), LONGEST_PROMPT // 2) // TOKENS
    with as_in_training(policy):
        for first in range(0, len(sampled.tokens), together):
            part = sampled.part(first, first + together)
            count = len(part.tokens)
            logprobs = policy.score(
                [prompt.ids] * count, part.tokens, temperature=part.temperature, routes=part.routes,
                images=[prompt.images] * count,
            ).logprobs  # fmt: skip
            found.append(logprobs.float().cpu())
    return torch.cat(found)


def with_rest(policy: Policy, prompt: GatePrompt, every: Sampled, few: Tensor) -> Tensor:
    """The training graph's logprobs of all completions, `few` being those of the first ones."""
    rest = every.part(COMPLETIONS, len(every.tokens))
    return torch.cat([few, scored(policy, prompt, rest)]) if rest.tokens else few


def mean_abs_diff(one: Tensor, other: Tensor) -> float:
    """Mean |difference|."""
    return float((one - other).abs().mean())
