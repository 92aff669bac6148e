"""`[lora]`: the adapter's keys."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from grpo.config.sections.section import PathText, PositiveFloat, Section

STARTS: tuple[bool | str, ...] = (True, "gaussian", "pissa", "olora", "loftq")
"""What an adapter can start from."""
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""The linear layers of a decoder layer, as most families name them."""


class Lora(Section):
    """`[lora]`: the adapter, in peft's words."""

    r: Annotated[int, Field(ge=1, le=512)] = 16
    """Rank."""
    lora_alpha: PositiveFloat = 32
    """Scale: the update is multiplied by `lora_alpha / r` (by `lora_alpha / sqrt(r)` with `use_rslora`)."""
    target_modules: Annotated[list[str], Field(min_length=1)] | str = SEVEN_PROJECTIONS
    """Linear layers that get an adapter: names or their ends; a regular expression for whole names; or "all-linear".
    The default stands for all of them, whatever a family has."""
    target_parameters: list[str] = []
    """Of a mixture of experts, parameters that get an adapter for every expert, in peft's words: names or their ends,
    "experts.gate_up_proj" and "experts.down_proj". `rank_pattern` and `alpha_pattern` give them a rank of their own."""
    exclude_modules: list[str] | str = []
    """Of these, layers that get none: names or their ends, or a regular expression for whole names."""
    layers_to_transform: list[Annotated[int, Field(ge=0)]] = []
    """Numbers of the decoder layers with an adapter, from 0, where `target_modules` is a list. Empty: all."""
    layers_pattern: list[str] = []
    """Where a model has several lists of layers: the name of the one that `layers_to_transform` counts."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=512)]] = {}
    """Ranks other than `r`: regular expressions for ends of layers' names, each with a rank."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    """Scales other than `lora_alpha`, as `rank_pattern` has ranks."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input while training; always off in rollouts."""
    use_rslora: bool = False
    """Rank-stabilised scaling."""
    bias: Literal["none"] = "none"
    """Biases belong to the shared base and are never trained."""
    init: PathText | None = None
    """An adapter folder to start from."""
    init_lora_weights: bool | str = True
    """What the adapter starts from, in peft's words: nothing (true, or "gaussian" for A), or a part of the base, which
    is then held without it: its largest singular values ("pissa", or faster "pissa_niter_4"), columns of its QR
    decomposition ("olora"), or most of the error of 4 bits ("loftq"). "The adapter off" and the KL reference then mean
    the adapter as it started."""
    loftq_iter: Annotated[int, Field(ge=1, le=20)] = 1
    """Iterations of "loftq"."""
    use_dora: bool = False
    """Not supported; present so that a copied configuration gets an explanation."""

    @model_validator(mode="after")
    def only_adapters_that_leave_the_base_alone(self) -> Lora:
        if not (self.init_lora_weights in STARTS or re.fullmatch(r"pissa_niter_[1-9]\d?", str(self.init_lora_weights))):
            raise ValueError(
                f"init_lora_weights = {self.init_lora_weights!r} is not supported; use true, "
                f"{', '.join(map(repr, STARTS[1:]))} or 'pissa_niter_4'"
            )
        if self.loftq_iter != 1 and self.init_lora_weights != "loftq":
            raise ValueError('loftq_iter has no use without init_lora_weights = "loftq"; leave it out')
        if self.use_dora:
            raise ValueError(
                "use_dora is not supported: its magnitude vector does not fit vLLM's LoRA layers; "
                "use plain LoRA or use_rslora"
            )
        return self

    @model_validator(mode="after")
    def patterns_are_regular_expressions(self) -> Lora:
        wholes = {"target_modules": self.target_modules, "exclude_modules": self.exclude_modules}
        patterns = [(key, value) for key, value in wholes.items() if isinstance(value, str)]
        for key in ("layers_pattern", "rank_pattern", "alpha_pattern"):
            patterns += [(key, pattern) for pattern in getattr(self, key)]
        for key, pattern in patterns:
            try:
                re.compile(f"({pattern})")
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{key}: {pattern!r} is no regular expression ({error}); correct it") from None
        return self

    @model_validator(mode="after")
    def layers_are_counted_for_names(self) -> Lora:
        if isinstance(self.target_modules, str) and self.layers_to_transform:
            raise ValueError(
                "layers_to_transform counts layers for a list of target_modules; write the numbers into the pattern, "
                "or the names as a list"
            )
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("layers_pattern has no use without layers_to_transform; leave it out, or set both")
        return self
