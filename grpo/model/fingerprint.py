"""By which an adapter knows its base again: some weights of it, kept beside the adapter, and how it was held.

Sizes alone do not tell a model from its instruction-tuned variant, and an adapter on the wrong one loads and only
answers worse. A hash would not do: the base of a 4-bit run is often exported, or served, in 16 bit. So values are kept,
and compared as closely as their storage allows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from grpo.errors import UserError
from grpo.model.decoder_config import DecoderConfig
from grpo.model.locate import BASE_SAMPLE
from grpo.model.stored_form import stored_form
from grpo.model.vision import TOWER
from grpo.model.weight_source import Source, dense

SAMPLED = 64
"""Values of each weight."""
UNQUANTISED = ("float32", "bfloat16", "float16")
SAME_STORAGE, OTHER_STORAGE = 0.003, 0.35
"""Largest distance, relative to the norm: rounding to bfloat16 makes 0.001, quantising to 4 bit some 0.1."""
SAME_WEIGHTS = 1e-6
"""As `SAME_STORAGE`, for equal values that were written and read."""


@dataclass(frozen=True)
class Fingerprint:
    """Values of a weight in the first, middle and last layer of the base, and in its vision tower where that is read;
    and what they were stored as."""

    stored_as: str
    values: dict[str, list[float]]
    kept_16bit: list[str] | None = None
    """The layers that `keep_16bit = "auto"` left unquantised; None where that was not asked for."""

    @classmethod
    def of(cls, source: Source) -> Fingerprint:
        """Read those weights of `source`."""
        config = source.config.get_text_config()
        layers = config.num_hidden_layers
        names = {weight_of_layer(source, config, number) for number in (0, layers // 2, layers - 1)} - {""}
        values = {name: sampled(source, name) for name in sorted(names)}
        if source.tower:  # another tower gives the language model another world to talk about
            last = max(name for name in source.tower if name.startswith("merger.") and name.endswith(".weight"))
            values[f"{TOWER}.{last}"] = sampled(source, source.tower[last])
        return cls(source.stored_as, values)

    def write(self, folder: Path) -> None:
        """Keep it beside the adapter in `folder`."""
        (folder / BASE_SAMPLE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    def distance(self, other: Fingerprint) -> float:
        """||ours - theirs|| / ||ours|| over the weights that both have; infinite if there are none."""
        shared = [name for name in self.values if len(other.values.get(name, ())) == len(self.values[name])]
        if not shared:
            return float("inf")
        ours, theirs = (torch.tensor([each.values[name] for name in shared]) for each in (self, other))
        return float((ours - theirs).norm() / ours.norm())

    def admits(self, other: Fingerprint) -> bool:
        """Whether `other` can be the same model, stored in the same or another way."""
        plain = self.stored_as in UNQUANTISED and other.stored_as in UNQUANTISED
        return self.distance(other) < (SAME_STORAGE if plain or self.stored_as == other.stored_as else OTHER_STORAGE)


def weight_of_layer(source: Source, config: DecoderConfig, layer: int) -> str:
    """What a checkpoint calls the down projection of a layer, or the first of those of its experts; the last by name of
    its matrices where it has none."""
    start = f"model.layers.{layer}."
    for parameter, pieces in stored_form(config).pieces.items():
        if parameter.startswith(start) and parameter.endswith(".down_proj"):
            return pieces[0].name
    if f"{start}mlp.down_proj.weight" in source.names:
        return f"{start}mlp.down_proj.weight"
    weights = (name for name in source.names if name.startswith(start) and len(source.shape(name)) == 2)
    return max(weights, default="")


def sampled(source: Source, name: str) -> list[float]:
    """`SAMPLED` values of the weight `name`, evenly spread."""
    flat = dense(source.read(name)).reshape(-1)
    indices = torch.linspace(0, len(flat) - 1, SAMPLED, dtype=torch.float64).long()
    return [round(value, 8) for value in flat[indices].tolist()]


def read(folder: Path) -> Fingerprint | None:
    """What `write` left in `folder`, or None. Raises UserError where it is damaged."""
    file = Path(folder) / BASE_SAMPLE
    if not file.is_file():
        return None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        values = {name: [float(number) for number in numbers] for name, numbers in saved["values"].items()}
        in_16bit = saved.get("kept_16bit")
        return Fingerprint(
            str(saved["stored_as"]), values, None if in_16bit is None else [str(name) for name in in_16bit]
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: damaged ({error}); copy the adapter again, or remove this file") from None


def check_base(adapter: Path, base: Fingerprint, named: str) -> None:
    """Raise UserError where the adapter in `adapter` was trained on another base than `base`, which is `named`.

    An adapter that does not say (it was made elsewhere) passes.
    """
    trained_on = read(adapter)
    if trained_on is None:
        return
    if not trained_on.admits(base):
        raise UserError(
            f"{adapter}: {named} has the right shapes, but is not the model that this adapter was trained on (weights "
            f"sampled from both are {trained_on.distance(base):.1%} apart); name that one instead"
        )
