"""Rotary positions: cosines and sines for both graphs from one set of frequencies, fixed when a model is loaded.

transformers chooses the frequencies of some scalings ("longrope", "dynamic") anew for every row, by the longest
position in it: a sequence's logprobs would depend on its neighbours. vLLM has formulas of its own. Here transformers'
functions are asked once, for the longest sequence that a run can have; the training graph gets them as a module, and
vLLM's caches are computed from it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from grpo.model.decoder_config import IMAGE_POSITIONS, DecoderConfig
from grpo.model.families.table import family_of

EVERYWHERE = ""
"""Stands for the layer type where all layers have the same frequencies."""

OF_EVERY_TYPE = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
OF_TYPE = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "proportional": {"factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"short_factor", "long_factor", "factor", "attention_factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
}
"""The entries of `rope_parameters` that transformers reads for a `rope_type`."""

Frequencies = dict[str, tuple[Tensor, float]]
"""Layer type, or EVERYWHERE -> (float32 [rotated dimensions / 2], what cosines and sines are multiplied by)."""


class Rotary(nn.Module):
    """In a training graph, transformers' rotary embedding with frequencies that no position changes."""

    def __init__(self, config: DecoderConfig, longest: int | None = None, device: torch.device | None = None):
        """config: transformers', of the text model; sequences have at most `longest` tokens (None: what it allows)."""
        super().__init__()
        self.config = config
        self.scalings: dict[str, float] = {}
        self.in_pairs, self.once = turns_pairs(config), gives_angles_once(config)
        self.sections = image_sections(config)
        for kind, (inverse, scaling) in frequencies(config, longest).items():
            self.register_buffer(prefixed(kind, "inv_freq"), inverse.to(device), persistent=False)
            self.scalings[kind] = scaling

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines [..., rotated dimensions] of `position_ids` [...] in the dtype of `x`, which gives no more;
        of a family that takes each once, half as many.

        `layer_type` is transformers' name of it, where the model has frequencies for each. Of positions in time, row
        and column [3, batch, tokens] each frequency turns by one; without `sections` by the first, as text has all
        three alike.
        """
        kind = layer_type if layer_type in self.scalings else EVERYWHERE
        inverse = self.get_buffer(prefixed(kind, "inv_freq"))
        if position_ids.ndim == 3 and self.sections is not None:
            positions = position_ids[self.sections.to(position_ids.device)].movedim(0, -1).float()
        else:
            positions = (position_ids[0] if position_ids.ndim == 3 else position_ids)[..., None].float()
        angles = positions * inverse
        if not self.once:
            angles = angles.repeat_interleave(2, dim=-1) if self.in_pairs else torch.cat((angles, angles), dim=-1)
        return tuple((part * self.scalings[kind]).to(x.dtype) for part in (angles.cos(), angles.sin()))

    @torch.no_grad()
    def set_longest(self, longest: int) -> bool:
        """Let sequences have at most `longest` tokens. Returns whether that changes the frequencies."""
        changed = False
        for kind, (inverse, scaling) in frequencies(self.config, longest).items():
            held = self.get_buffer(prefixed(kind, "inv_freq"))
            if scaling != self.scalings[kind] or not torch.equal(held.cpu(), inverse):
                held.copy_(inverse)
                self.scalings[kind] = scaling
                changed = True
        return changed

    def table(self, length: int, layer_type: str | None = None) -> Tensor:
        """float32 [length, rotated dimensions]: the cosines of one half, then the sines, as vLLM keeps them."""
        halves = self(torch.empty(0, dtype=torch.float32), torch.arange(length), layer_type)
        width = len(halves[0][0])
        once = slice(None, None, 2) if self.in_pairs else slice(width if self.once else width // 2)
        return torch.cat([part[:, once] for part in halves], dim=1)


def image_sections(config: DecoderConfig) -> Tensor | None:
    """int64 [frequencies]: by which of time (0), row (1) and column (2) each turns; None of a model of text alone."""
    parameters = getattr(config, "rope_parameters", None) or {}
    sections = parameters.get("mrope_section")
    if not sections:
        return None
    if not parameters.get("mrope_interleaved"):
        return torch.tensor([axis for axis, count in enumerate(sections) for _ in range(count)])
    axes = torch.arange(sum(sections)) % 3
    beyond = torch.arange(sum(sections)) >= 3 * torch.tensor(sections)[axes]
    return axes.masked_fill(beyond, 0)


def turns_pairs(config: DecoderConfig) -> bool:
    """Whether transformers' module of the family gives each angle to two neighbours, not to both halves of a head."""
    sines = sines_of(config)
    if sines is None:
        return False
    return bool((sines[:, 0] == sines[:, 1]).all()) and not bool((sines[:, 0] == sines[:, sines.shape[1] // 2]).all())


def gives_angles_once(config: DecoderConfig) -> bool:
    """Whether transformers' module of the family gives each angle once, and attention turns both halves by it."""
    sines = sines_of(config)
    return sines is not None and sines.shape[1] == len(next(iter(frequencies(config, 1).values()))[0])


def sines_of(config: DecoderConfig) -> Tensor | None:
    """What transformers' module gives for positions 1 and 2, of the first layer type that has frequencies."""
    kind = next(iter(frequencies(config, 1)), None)
    if kind is None:
        return None
    with torch.device("cpu"):
        module = rotary_class(config)(copy.deepcopy(config))
    more = {"layer_type": kind} if kind else {}
    positions = torch.arange(1, 3)[None]
    if hasattr(module, "mrope_section"):  # in time, height and width
        positions = positions.expand(3, 1, 2)
    return module(torch.empty(0), positions, **more)[1][0]


def frequencies(config: DecoderConfig, longest: int | None = None) -> Frequencies:
    """transformers' rotary frequencies for sequences of at most `longest` tokens (None: what the model allows)."""
    if getattr(config, "rope_parameters", None) is None or rotary_class(config) is None:
        return {}
    settled = copy.deepcopy(config)
    longest = config.max_position_embeddings if longest is None else longest
    for _, parameters in rotary_parameters(settled):
        if parameters.get("rope_type") == "longrope":
            original = parameters["original_max_position_embeddings"]
            chosen = parameters["long_factor" if longest > original else "short_factor"]
            parameters |= {"short_factor": chosen, "long_factor": chosen}
    with torch.device("cpu"):
        module = rotary_class(config)(settled)
    result = {}
    for kind, _ in rotary_parameters(settled):
        inverse = getattr(module, prefixed(kind, "inv_freq"), None)
        if inverse is not None:  # there are none of a layer type that no layer has
            result[kind] = inverse.float(), float(getattr(module, prefixed(kind, "attention_scaling")))
    return result


def rotary_parameters(config: DecoderConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """(layer type or EVERYWHERE, transformers' `rope_parameters` for it)."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:  # positions are known otherwise, or not at all
        return
    if not by_layer_type(config):
        yield EVERYWHERE, parameters
        return
    yield from ((kind, values) for kind, values in parameters.items() if isinstance(values, dict))


def by_layer_type(config: DecoderConfig) -> bool:
    """Whether transformers has rotary frequencies for each type of layer in the family."""
    rotary = rotary_class(config)
    return rotary is not None and "layer_type" in inspect.signature(rotary.forward).parameters


def unread_parameters(config: DecoderConfig) -> dict[str, Any]:
    """Entries of `rope_parameters` in a form that is not the family's: for layer types where it has none, or not."""
    parameters = getattr(config, "rope_parameters", None)
    if parameters is None:
        return {}
    wanted = by_layer_type(config)
    return {
        key: value
        for key, value in parameters.items()
        if isinstance(value, dict) != wanted and (key, value) != ("rope_type", "default")
    }


def unknown_parameters(config: DecoderConfig) -> list[str]:
    """Entries of `rope_parameters` that neither transformers' function of their `rope_type` nor the family has a use
    for."""
    unknown: dict[str, None] = {}
    for _, values in rotary_parameters(config):
        known = OF_EVERY_TYPE | OF_TYPE.get(values.get("rope_type", ""), set()) | family_of(config.model_type).of_rotary
        if "mrope_interleaved" in values:  # `text_decoder.py` says so where images are read
            known = known | set(IMAGE_POSITIONS)
        unknown |= dict.fromkeys(key for key, value in values.items() if key not in known and value is not None)
    return list(unknown)


def prefixed(kind: str, name: str) -> str:
    """transformers' name of what a module has for each layer type."""
    return f"{kind}_{name}" if kind else name


def rotary_class(config: DecoderConfig) -> Any:
    """transformers' rotary embedding of the family; None for one that has none."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    decoder = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    module, name = sys.modules[decoder.__module__], decoder.__name__.removesuffix("ForCausalLM")
    of_text = getattr(module, f"{name}TextRotaryEmbedding", None)  # where a model of images has another
    return of_text or getattr(module, f"{name}RotaryEmbedding", None)


def rotated(config: DecoderConfig, kind: str, parameters: dict[str, Any]) -> int:
    """How many dimensions of a head turn, by `parameters` of the layer type `kind`."""
    return int(head_size(config, kind) * part_rotated(parameters))


def part_rotated(parameters: dict[str, Any]) -> float:
    """The share of a head's dimensions that have a frequency. "proportional" gives one to all, and some are 0."""
    proportional = parameters.get("rope_type") == "proportional"
    return 1.0 if proportional else parameters.get("partial_rotary_factor") or 1.0


def head_size(config: DecoderConfig, kind: str = EVERYWHERE) -> int:
    """Dimensions of an attention head; in layers of the type `kind` where they differ by it."""
    if kind and getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[kind]
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def plain_parameters(config: DecoderConfig) -> dict[str, Any]:
    """`rope_parameters` for vLLM: unscaled ones of the same sizes, whose caches `share_positions` replaces."""
    plain = {
        kind: {
            "rope_type": "default",
            "rope_theta": parameters["rope_theta"],
            "partial_rotary_factor": part_rotated(parameters),
        }
        for kind, parameters in rotary_parameters(config)
    }
    return plain.get(EVERYWHERE, plain)
