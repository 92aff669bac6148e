"""adapter_config.json, in which peft describes an adapter, read in one place for whoever loads or exports one.

Every entry is honoured, has no effect on what is computed here, or is refused by name with the way out: an adapter is
loaded as what it is or not at all. What is honoured becomes a `[lora]` table. Which layers that means is in
`adapter_layers.py`, and the tensors are read by `grpo.policy.adapter_files`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo.config.messages import explain
from grpo.config.schema import Lora
from grpo.config.toml import write_value
from grpo.errors import UserError
from grpo.model.checks import read_object
from grpo.model.weight_files import ADAPTER_CONFIG

ADAPTER_WEIGHTS = "adapter_model.safetensors"

SHAPE = (
    "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "target_parameters", "init_lora_weights", "loftq_iter",
)  # fmt: skip
"""peft's entries, and keys of `[lora]`, that say which layers have an adapter, of which rank and scale, and on what."""
NEEDED = ("r", "lora_alpha", "target_modules")
HONOURED = (*SHAPE, "lora_dropout")

WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config",
    "base_model_name_or_path", "revision",  # where the base is, for whoever looks for it
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # how training began
    "megatron_core", "qalora_group_size", "ensure_weight_tying",  # of entries that are refused where they are set
    "fan_in_fan_out",  # peft takes it back on linear layers
}  # fmt: skip
"""Entries that change nothing in an adapter which the other checks let through."""
REFUSED = {
    "bias": "biases of the base were trained too",
    "modules_to_save": "whole modules were trained too",
    "trainable_token_indices": "rows of the embedding were trained too",
    "layer_replication": "layers of the base are used several times",
    "lora_bias": "its B has a bias",
    "use_dora": "DoRA scales the base's weights",
    "use_qalora": "QA-LoRA pools the adapter's input",
    "use_bdlora": "its factors are block-diagonal",
    "alora_invocation_tokens": "it acts only behind certain tokens",
    "arrow_config": "several adapters are mixed by the input",
    "kasa_config": "KaSA changes the base's weights",
    "monteclora_config": "its factors are drawn anew in training",
    "velora_config": "VeLoRA trains on compressed inputs",
    "megatron_config": "its layers are Megatron's",
}
"""Entries with which an adapter is more than s B A on linear layers -> why."""
NOT_TO_BE_MERGED = {"alora_invocation_tokens", "arrow_config"}
"""What depends on the input, so that no weights without an adapter compute it."""
UNSET: tuple[Any, ...] = (None, False, "", [], {})

NOT_THE_TOWER = r"(.*\.)?visual\..*"
"""`exclude_modules` of an exported adapter of a model that takes images: towers have modules of the same names."""

LEAVE_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` with which the trained base is the one on the disk."""
PISSA_NITER = re.compile(r"pissa_niter_([1-9]\d?)")
MERGE = "have peft merge it into its base (merge_and_unload, save_pretrained), and name that folder as the model"
RETRAIN = "train a plain LoRA adapter in its place"
CONVERT = (
    "have peft convert it to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion), or merge it"
)


@dataclass(frozen=True)
class AdapterConfig:
    """What the adapter in a folder is."""

    file: Path
    values: Mapping[str, Any]
    """adapter_config.json as it stands."""
    lora: Lora
    """The same in the terms of `[lora]`."""

    @property
    def table(self) -> dict[str, Any]:
        """A `[lora]` table of the adapter's shape."""
        given = {key: getattr(self.lora, key) for key in HONOURED if getattr(self.lora, key) not in UNSET}
        starts = {"init_lora_weights": self.lora.init_lora_weights, "loftq_iter": self.lora.loftq_iter}
        defaults = {"init_lora_weights": True, "loftq_iter": 1}
        return {key: value for key, value in given.items() if key not in starts} | {
            key: value for key, value in starts.items() if value != defaults[key]
        }


def read_adapter_config(folder: Path) -> AdapterConfig:
    """What the adapter in `folder` is. Raises UserError where it has no description, a damaged one, or one that says
    more than is honoured."""
    file = folder / ADAPTER_CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: no {ADAPTER_CONFIG}; pass the folder of a peft adapter")
    values = read_object(file)
    if values.get("peft_type") != "LORA":
        raise UserError(
            f"{file}: peft_type = {shown(values.get('peft_type'))}: only LoRA adapters are taken; {RETRAIN}"
        )
    for key, value in values.items():
        check_entry(key, value, file)
    if missing := next((key for key in NEEDED if values.get(key) is None), None):
        raise UserError(f"{file}: {missing} is missing; copy the adapter again")
    return AdapterConfig(file, values, as_lora(values, file))


def check_entry(key: str, value: Any, file: Path) -> None:
    """Raise UserError unless the entry `key` is honoured or has no effect."""
    if key in REFUSED and not is_unset(value) and (key, value) != ("bias", "none"):
        way_out = RETRAIN if key in NOT_TO_BE_MERGED else MERGE
        raise UserError(f"{file}: {key} = {shown(value)}: {REFUSED[key]}, and only plain LoRA is taken; {way_out}")
    if key == "init_lora_weights" and value not in LEAVE_THE_BASE and not takes_from_base(value):
        raise UserError(f"{file}: {key} = {shown(value)}: it was trained on a base other than that on disk; {CONVERT}")
    if key == "task_type" and value not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{file}: {key} = {shown(value)}: its model has another head than CAUSAL_LM; train an adapter for that"
        )
    if key in ("base_model_name_or_path", "revision") and not isinstance(value, str | None):
        raise UserError(f"{file}: {key} = {shown(value)}: must be text; correct it")
    known = key in HONOURED or key in WITHOUT_EFFECT or key in REFUSED
    if not known and not is_unset(value) and value != default_of_peft(key):
        raise UserError(f"{file}: {key} = {shown(value)}: this entry of a newer peft is not known here; {MERGE}")


def is_unset(value: Any) -> bool:
    """Whether `value` says that an entry of peft's is not used. 0 is a value."""
    return any(value == unset and type(value) is type(unset) for unset in UNSET)


def default_of_peft(key: str) -> Any:
    """What the installed peft has for an entry that is not given; None for an entry that it has not."""
    from peft import LoraConfig

    return LoraConfig().to_dict().get(key)


def as_lora(values: Mapping[str, Any], file: Path) -> Lora:
    """The honoured entries as `[lora]`, one number or name being a list of it. Raises UserError for what is none."""
    table = {key: values[key] for key in HONOURED if key in NEEDED or not is_unset(values.get(key))}
    table |= started(table.pop("init_lora_weights", True), values.get("loftq_config"), file)
    for key, kind in (("layers_to_transform", int), ("layers_pattern", str)):
        if isinstance(table.get(key), kind):
            table[key] = [table[key]]
    if table.get("exclude_modules") == NOT_THE_TOWER:  # the decoder alone has none
        del table["exclude_modules"]
    try:
        return Lora.model_validate(table)
    except ValidationError as error:
        raise explain(error, Lora, table, str(file)) from None


def started(kind: Any, loftq_config: Any, file: Path) -> dict[str, Any]:
    """The keys of `[lora]` for an adapter that takes a part of the base. Raises UserError for other bits than 4."""
    if not takes_from_base(kind):
        return {}
    if kind != "loftq":
        return {"init_lora_weights": kind}
    settings = loftq_config if isinstance(loftq_config, dict) else {}
    if settings.get("loftq_bits", 4) != 4:
        raise UserError(
            f"{file}: loftq_config = {shown(settings)}: its base is quantised to other than 4 bits; {CONVERT}"
        )
    return {"init_lora_weights": kind, "loftq_iter": settings.get("loftq_iter", 1)}


def takes_from_base(kind: Any) -> bool:
    """Whether an adapter with `init_lora_weights = kind` starts from a part of the base (`initial_adapter.py`)."""
    return isinstance(kind, str) and (kind in ("pissa", "olora", "loftq") or PISSA_NITER.fullmatch(kind) is not None)


def check_same_shape(saved: AdapterConfig, lora: Lora, targets: Callable[[Lora], list[str] | str]) -> None:
    """Raise UserError unless `lora` describes the adapter `saved`; it names all keys to set.

    targets: what either means by target_modules on the base.
    """
    mine, theirs = (each.model_copy(update={"target_modules": targets(each)}) for each in (saved.lora, lora))
    meant = [key for key in SHAPE if differs(key, mine, theirs)]
    if not meant:
        return
    values = {key: (getattr(saved.lora, key), getattr(lora, key)) for key in meant}
    first, (here, there) = next(iter(values.items()))
    keys = ", ".join(f"lora.{key} = {write_value(mine)}" for key, (mine, _) in values.items())
    raise UserError(
        f"{saved.file}: {first} = {write_value(here)}, the configuration says {write_value(there)}; set {keys}"
    )


def differs(key: str, one: Lora, other: Lora) -> bool:
    """Whether the two mean different things by `key`; the order of names is no matter."""
    values = [getattr(lora, key) or None for lora in (one, other)]
    if key == "init_lora_weights":  # what leaves the base alone is no matter once an adapter is trained
        values = [value if takes_from_base(value) else True for value in values]
    mine, theirs = (frozenset(value) if isinstance(value, list) else value for value in values)
    return bool(mine != theirs)


def shown(value: Any) -> str:
    """`value` as it stands in the file, cut to a readable length."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
