"""The base of a run whose adapter starts from a part of it: which A0 and B0, and that every process has the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from grpo.config.schema import Config
from grpo.errors import UserError
from grpo.model.adapter_config import ADAPTER_CONFIG, CONVERT, PISSA_NITER, takes_from_base
from grpo.model.initial_adapter import InitialLayer, ResidualSource, digest, recorded_initial
from grpo.model.weight_source import Source


def starting_source(source: Source, config: Config, like: Sequence[Path], device: torch.device) -> Source:
    """`source`, without what the adapter of `config` starts from where that is a part of it.

    like: folders of runs and adapters whose base this is to be; the first that records A0 and B0 decides. Raises
    UserError where they cannot be known.
    """
    model, kind = config.model, config.lora.init_lora_weights
    if not takes_from_base(kind):
        return source
    if model.load_in_4bit and model.keep_16bit == "auto":
        raise UserError(
            f'model.keep_16bit = "auto" is measured on a whole base, and lora.init_lora_weights = {kind!r} takes a '
            "part of it; name the layers, or leave one of the two out"
        )
    record = recorded_initial(like)
    adapters = [folder for folder in like if (folder / ADAPTER_CONFIG).is_file()]
    if record is None and adapters and PISSA_NITER.fullmatch(str(kind)):
        raise UserError(
            f"{adapters[0]}: it started from a randomised decomposition ({kind}) of its base, which is not recorded; "
            f"{CONVERT}"
        )
    in_16bit = list(model.keep_16bit) if model.load_in_4bit else None
    return ResidualSource(source, config.lora, record=record, device=device, in_16bit=in_16bit, seed=config.train.seed)


def check_same_start(initial: Mapping[str, InitialLayer], agree: Callable[[Any], Any]) -> None:
    """Raise UserError where `agree`, which gives every process what the first one passes, shows another A0 or B0."""
    if initial and agree(digest(initial)) != digest(initial):
        raise UserError(
            "the processes of this run decomposed the base into different numbers, so that their bases differ; start "
            "it on one GPU, and resume that run on several"
        )
