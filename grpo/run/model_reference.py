"""What a person means by a model: a base, the folder of a peft adapter, or a run; and where the base of these is.

Adapter and run are recognised by the files in their folder. Everything is decided from small text files; weights are
read elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpo.config.toml import read_toml
from grpo.errors import UserError
from grpo.model.adapter_config import ADAPTER_CONFIG, read_adapter_config
from grpo.model.locate import local_path
from grpo.run.checkpoint import CONFIG, latest

MODEL = "model"
"""Where a run that trains all weights, and its checkpoints, have the trained model."""
ADAPTER, BASE = "with adapter", "model alone"
"""What answers are said to be by, where both can be asked."""


@dataclass(frozen=True)
class ModelReference:
    """Tables of a configuration that open the model, and the adapter to put on it."""

    tables: dict[str, Any]
    """[model], and of a run every other section, too."""
    source: str
    """What the tables came from, for errors."""
    adapter: Path | None = None
    lora: dict[str, Any] = field(default_factory=dict)
    """The adapter's shape as a [lora] table."""


def resolve_model(name: str | Path, base: str | Path | None = None) -> ModelReference:
    """`name`: a run folder, the folder of an adapter, or whatever `model.name` may be. `base`: where the base of an
    adapter or run is now, if it has moved.

    Raises UserError for a path that does not exist, for a run without an adapter, for an adapter whose base is not
    recorded or has moved, and for a `base` that has no use.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG).is_file() and is_trained_whole(folder):
        return of_whole_run(folder, folder_of_model(folder), base)
    if (folder / CONFIG).is_file():
        return of_run(folder, folder_of_adapter(folder), base)
    if (folder / ADAPTER_CONFIG).is_file():
        run = next((parent for parent in list(folder.resolve().parents)[:3] if (parent / CONFIG).is_file()), None)
        return of_run(run, folder, base) if run is not None else of_adapter(folder, base)
    if base is not None:
        raise UserError(f"{name}: this is neither an adapter nor a run, so it has no other base; leave {base} out")
    local_path(str(name))
    return ModelReference({"model": {"name": str(name)}}, "the model")


def of_run(run: Path, adapter: Path, base: str | Path | None) -> ModelReference:
    """A run's configuration with one of its adapters."""
    values, _ = read_toml(run / CONFIG)
    values.pop("sft", None)  # a supervised run's own section
    model = values.get("model", {})
    model["name"] = found_base(model.get("name"), adapter, base)
    if base is not None:
        model.pop("revision", None)  # of the name that was recorded
    return ModelReference(values, str(run / CONFIG), adapter, values.get("lora", {}))


def is_trained_whole(run: Path) -> bool:
    """Whether the run trained all weights, so that it has a model of its own and no adapter."""
    return read_toml(run / CONFIG)[0].get("model", {}).get("full_finetuning") is True


def of_whole_run(run: Path, model: Path, base: str | Path | None) -> ModelReference:
    """A run's configuration with the model in the folder `model` that it trained whole: an ordinary one from here on.

    Raises UserError for a `base`, of which such a model has none.
    """
    if base is not None:
        raise UserError(f"{run}: this run trained all weights, so its model has no other base; leave {base} out")
    values, _ = read_toml(run / CONFIG)
    values["model"] = ordinary(values["model"], model)
    values.pop("lora", None)
    values.get("train", {}).pop("weight_update", None)
    values.get("loss", {}).pop("reference_storage", None)
    return ModelReference(values, str(run / CONFIG))


def ordinary(table: dict[str, Any], model: Path) -> dict[str, Any]:
    """The [model] table of a run that trained all weights, for the `model` that it left."""
    left = {key: value for key, value in table.items() if key not in ("revision", "full_finetuning")}
    return {**left, "name": str(model), "load_in_4bit": False, "load_in_8bit": False}


def folder_of_model(run: Path) -> Path:
    """The final model of a run that trained all weights, or that of its newest whole checkpoint. Raises UserError where
    there is none."""
    if (run / MODEL / "config.json").is_file():
        return run / MODEL
    checkpoint = latest(run)
    if checkpoint is None:
        raise UserError(f"{run}: the run has no model and no checkpoint yet; name the one that it began with instead")
    return checkpoint / MODEL


def of_adapter(folder: Path, base: str | Path | None) -> ModelReference:
    """An adapter that stands alone; its base is held as the defaults say, but for what "auto" once kept in 16 bit."""
    from grpo.model import fingerprint

    saved = read_adapter_config(folder)
    model: dict[str, Any] = {"name": found_base(saved.values.get("base_model_name_or_path"), folder, base)}
    if base is None and saved.values.get("revision"):
        model["revision"] = saved.values["revision"]
    trained_on = fingerprint.read(folder)
    if trained_on is not None and trained_on.kept_16bit:
        model["keep_16bit"] = trained_on.kept_16bit
    return ModelReference({"model": model, "lora": saved.table}, str(saved.file), folder, saved.table)


def folder_of_adapter(run: Path) -> Path:
    """The final adapter of a run, or that of its newest whole checkpoint. Raises UserError where there is none."""
    if (run / "adapter" / ADAPTER_CONFIG).is_file():
        return run / "adapter"
    checkpoint = latest(run)
    if checkpoint is None:
        raise UserError(f"{run}: the run has no adapter and no checkpoint yet; name its model instead")
    return checkpoint / "adapter"


def found_base(recorded: str | None, adapter: Path, moved_to: str | Path | None) -> str:
    """The base of `adapter`: `moved_to`, or else the one that it records. Raises UserError where that is no more."""
    if moved_to is not None:
        local_path(str(moved_to))
        return str(moved_to)
    if not recorded:
        raise UserError(f"{adapter}: the adapter does not say what its base is; name it with --base (in Python, base=)")
    try:
        local_path(recorded)
    except UserError as error:
        raise UserError(
            f"{adapter}: its base has moved ({error}); say where it is now with --base (in Python, base=)"
        ) from None
    return recorded
