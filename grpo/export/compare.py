"""Logits of a checkpoint of any format, with one weight in memory at a time, and how far two sets of them are apart.

The model is transformers' own, built without weights; each module reads its weights as it runs and drops them again.
Slow and small: it is for comparing what was exported with what was trained, on any machine, not for generating.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grpo.errors import UserError
from grpo.model.decoder_config import DecoderConfig
from grpo.model.stored_form import read_whole
from grpo.model.weight_source import Source
from grpo.policy.graph import rebuild_buffers

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "What is 27 + 48? Think step by step, then give the answer: 27 + 48 = 27 + 40 + 8 = 67 + 8 =",
    "def mean(values):\n    return sum(values) / len(values)\n\n\ndef variance(values):\n    return",
    "<reasoning>\nThere are 12 eggs and 5 are used, so 7 remain.\n</reasoning>\n<answer>\n",
)
"""What exports are compared on: prose, arithmetic, code, tags."""


@torch.no_grad()
def streamed_logits(source: Source, tokens: Tensor, config: DecoderConfig | None = None) -> Tensor:
    """Logits float32 [sequences, length, vocabulary] of `tokens` long [sequences, length], on the CPU.

    config: transformers' configuration of the model, where the source's own does not say everything (a GGUF file's).
    Raises UserError where a tensor is missing or of another shape than the configuration says.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config or source.config.get_text_config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    rebuild_buffers(model, config, torch.device("cpu"), torch.float32, longest=tokens.shape[1])
    for name, buffer in list(model.named_buffers()):
        if name in source.names:  # a number of each layer, in Gemma 4
            owner, _, key = name.rpartition(".")
            model.get_submodule(owner)._buffers[key] = read_whole(source, name).float().reshape(buffer.shape)
    for name, module in model.named_modules():
        if module._parameters:
            # Layers with a state read the weight of their convolution, which is not called.
            runs = model.get_submodule(name.rpartition(".")[0]) if isinstance(module, nn.Conv1d) else module
            read_while_running(module, name, source, bool(config.tie_word_embeddings), runs)
    return model(input_ids=tokens, use_cache=False).logits.float()


def read_while_running(module: nn.Module, name: str, source: Source, tied: bool, runs: nn.Module) -> None:
    """Give `module` its weights just before the forward pass of `runs`, and take them away after it."""
    empty = dict(module._parameters)

    def load(*unused: Any) -> None:
        for kind, parameter in empty.items():
            if parameter is None:
                continue
            key = "model.embed_tokens.weight" if tied and name == "lm_head" else f"{name}.{kind}"
            weight = read_whole(source, key).float()
            if weight.shape != parameter.shape:
                raise UserError(f"{source.path}: {key} is {tuple(weight.shape)}, expected {tuple(parameter.shape)}")
            module._parameters[kind] = nn.Parameter(weight, requires_grad=False)

    def drop(*unused: Any) -> None:
        module._parameters.update(empty)

    runs.register_forward_pre_hook(load)
    runs.register_forward_hook(drop)


def sample_tokens(tokenizer: Any, vocabulary: int) -> Tensor:
    """`TEXTS` as one batch long [4, shortest]; random tokens where there is no tokenizer that fits the model."""
    rows = [tokenizer(text)["input_ids"] for text in TEXTS] if tokenizer is not None else [[]]
    shortest = min(map(len, rows))
    if shortest == 0 or max(map(max, rows)) >= vocabulary:
        return torch.randint(vocabulary, (len(TEXTS), 16), generator=torch.Generator().manual_seed(0))
    return torch.tensor([row[:shortest] for row in rows])


def adapter_share(base: Tensor, with_adapter: Tensor, written: Tensor) -> float:
    """How much of an adapter's effect a written model shows: 1 all, 0 none. Logits [..., vocabulary], float32.

    The effect is what the adapter adds to log-probabilities in float32; what the written model adds to those of the
    base is projected onto it, every token weighed by its probability. nan for an adapter without effect.
    """
    start, target, exported = (torch.log_softmax(logits, -1) for logits in (base, with_adapter, written))
    effect, weight = target - start, target.exp()
    size = float((weight * effect.square()).sum())
    return float((weight * (exported - start) * effect).sum()) / size if size else float("nan")


@dataclass(frozen=True)
class Distance:
    """How far one model's next-token distributions are from another's."""

    kl: float
    """Mean KL(reference, other) over positions, in nats."""
    largest: float
    """Largest difference of two logits."""
    agreement: float
    """Share of positions at which both prefer the same token."""

    @classmethod
    def between(cls, reference: Tensor, other: Tensor) -> Distance:
        """Of logits [..., vocabulary] of the same tokens."""
        ours, theirs = torch.log_softmax(reference, -1), torch.log_softmax(other, -1)
        return cls(
            kl=float((ours.exp() * (ours - theirs)).sum(-1).mean()),
            largest=float((reference - other).abs().max()),
            agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        )

    def __str__(self) -> str:
        return (
            f"KL {max(self.kl, 0.0):.2g} nats, logits within {self.largest:.2g}, "
            f"the same most likely token at {self.agreement:.0%} of positions"
        )
