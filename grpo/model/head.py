"""What a model does to its logits after the product with the output head: a factor, and a cap.

Families say the factor under several names, some as a multiplier and some as a divisor. Whether this is all that the
family does is checked at start, against vLLM's logprobs (`grpo/training/self_check.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo.kernels.logprob import put_out_of_reach
from grpo.model.config_keys import own_keys
from grpo.model.decoder_config import DecoderConfig
from grpo.model.families.table import family_of

MULTIPLIERS = ("logit_scale", "lm_head_multiplier")
"""Keys of configurations whose value logits are multiplied by."""
DIVISORS = ("logits_scaling",)
"""Keys of configurations whose value logits are divided by."""


@dataclass(frozen=True)
class Head:
    """logits = cap * tanh(scale * hidden W^T / cap), or without a cap scale * hidden W^T."""

    scale: float = 1.0
    cap: float | None = None
    never: tuple[int, ...] = ()
    """Tokens that are out of reach, in sampling as in training."""

    @classmethod
    def of(cls, config: DecoderConfig) -> Head:
        """As transformers' `config` of a text model says. Keys that its class does not have say nothing."""
        known, scale = own_keys(config), 1.0
        for key in known & {*MULTIPLIERS, *DIVISORS}:
            value = getattr(config, key) or 1.0
            multiplies = key in MULTIPLIERS or key in family_of(config.model_type).multiplies_logits
            scale *= value if multiplies else 1.0 / value
        return cls(scale, getattr(config, "final_logit_softcapping", None))

    def arguments(self, temperature: float = 1.0) -> dict[str, Any]:
        """How `kernels/logprob.py` is asked for softmax(logits / temperature), from products without the factor.

        With s the scale, h a product and t the temperature: cap tanh(s h / cap) / t = c tanh(h / c) / (t / s) for
        c = cap / s.
        """
        softcap = None if self.cap is None else self.cap / self.scale
        return {"temperature": temperature / self.scale, "softcap": softcap, "never": self.never}

    def logits(self, products: Tensor, first: int = 0) -> Tensor:
        """The logits of `products`, hidden W^T in float32, with the rows of W from `first` on."""
        scaled = products * self.scale if self.scale != 1.0 else products
        logits = scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)
        inside = [token - first for token in self.never if first <= token < first + logits.shape[-1]]
        return put_out_of_reach(logits.clone(), inside) if inside else logits
