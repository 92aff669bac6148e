"""The sizes of a model that is to be planned for, of which nothing more is read, and which need not be here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.memory.plan import Shape
from grpo.memory.tower import TowerSizes
from grpo.model.checks import check_family, check_sizes, one_line
from grpo.model.families.table import family_of, listed
from grpo.model.gguf_header import read_header
from grpo.model.layout import usual_linears
from grpo.model.locate import local_path
from grpo.model.quantization import quantization, with_modelopt
from grpo.model.text_decoder import as_family

TABLE = Path(__file__).parent.parent / "model" / "known_models.json"
ENDINGS = r"-(instruct|it|base|chat|ft|pretrained|bnb-4bit|unsloth|hf|v\d+(\.\d+)*|\d{4})$"
"""What names of models end with that says nothing of their sizes."""
HUB_SECONDS = 5.0


def model_shape(model: Model, *, network: bool = False) -> Any:
    """The sizes of `model` as a Shape, or transformers' configuration where layers differ in kind; None where they
    cannot be had, or are of an unknown kind.

    From its files on this machine; else from the table of well-known models; else, with `network`, from the hub.
    """
    path = local_path(model.name) or cached_config(model.name, model.revision)
    if path is None and (values := known_sizes(model.name)) is not None:
        return shape_of(values)
    if path is None and network:
        path = hub_config(model.name, model.revision)
    if path is None:
        return None
    if path.suffix == ".gguf":
        return gguf_shape(path)
    file = path if path.suffix == ".json" else path / "config.json"
    try:
        values = with_modelopt(json.loads(file.read_text(encoding="utf-8")), file.parent)
        quantization(values)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, UserError):
        return None
    check_family(values, file)
    check_sizes(values, file)
    try:
        shape = shape_of(values)
        if hasattr(shape, "to_dict"):
            check_whole(shape, file)
    except KeyError:
        return None
    except UserError:
        raise
    except Exception as error:  # whatever transformers' checks of an untrusted file raise
        raise UserError(f"{file}: {one_line(error)}; correct it, or download the model again") from None
    return shape if shape.model_type in listed() else None


def check_whole(config: Any, file: Path) -> None:
    """Raise UserError, naming `file`, for what is refused in transformers' configuration at a start, too."""
    from grpo.model.config_keys import check_keys
    from grpo.model.meta_graph import graph_tensors

    check_keys(config, str(file))
    try:
        graph_tensors(config)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def model_tower(model: Model) -> TowerSizes | None:
    """The sizes of the vision tower of `model`, from its files on this machine or the table, where its images are
    read; None where they are not, or the sizes cannot be had."""
    path = local_path(model.name) or cached_config(model.name, model.revision)
    if not model.images or (path is not None and path.suffix == ".gguf"):
        return None
    try:
        if path is None:
            return TowerSizes.of((known_sizes(model.name) or {})["vision_config"])
        file = path if path.suffix == ".json" else path / "config.json"
        return TowerSizes.of(json.loads(file.read_text(encoding="utf-8"))["vision_config"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def shape_of(values: dict[str, Any]) -> Any:
    """What `model_shape` gives, from the entries of a config.json."""
    text = values.get("text_config") or values
    computed_as = family_of(text["model_type"]).text_as or text["model_type"]
    by_kind = family_of(computed_as).mixers or family_of(computed_as).layers_differ
    if not by_kind and usual_linears(computed_as):
        return Shape.of(values)
    from transformers import AutoConfig  # its class knows the kinds of layers, however the file says them

    tied = values.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    given = {key: value for key, value in text.items() if key != "model_type"}
    config = AutoConfig.for_model(text["model_type"], **given)
    if tied is not None:
        config.tie_word_embeddings = tied
    return config if computed_as == text["model_type"] else as_family(config, computed_as)


def cached_config(name: str, revision: str | None) -> Path | None:
    """config.json of a hub model that was downloaded before; the network is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def hub_config(name: str, revision: str | None) -> Path | None:
    """config.json of a hub model, fetched unless huggingface_hub is told to be offline; None where there is none."""
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision, etag_timeout=HUB_SECONDS))
    except Exception:  # no network, no such model, no access: a dry run goes on without
        return None


def known_sizes(name: str) -> dict[str, Any] | None:
    """What config.json says of a well-known model, by its name on the hub or that of a copy: "unsloth/Qwen3-4B"."""
    last = name.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    while (shorter := re.sub(ENDINGS, "", last)) != last:
        last = shorter
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table.get(last)


def gguf_shape(path: Path) -> Shape | None:
    """The sizes that a GGUF file states."""
    metadata, tensors = read_header(path)
    family = metadata.get("general.architecture", "")
    family_keys = {key.removeprefix(f"{family}."): value for key, value in metadata.items()}
    values = {
        "model_type": {"gemma3": "gemma3_text"}.get(family, family),
        "hidden_size": family_keys.get("embedding_length"),
        "intermediate_size": family_keys.get("feed_forward_length"),
        "num_hidden_layers": family_keys.get("block_count"),
        "num_attention_heads": family_keys.get("attention.head_count"),
        "num_key_value_heads": family_keys.get("attention.head_count_kv"),
        "head_dim": family_keys.get("attention.key_length"),
        "vocab_size": family_keys.get("tokenizer.ggml.tokens") or family_keys.get("vocab_size"),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    sizes = [value for key, value in values.items() if key not in ("model_type", "tie_word_embeddings")]
    if any(value is not None and (type(value) is not int or value < 1) for value in sizes):
        return None  # numbers by layer, or none that a model has
    try:
        shape = Shape.of(values)
    except LookupError:
        return None
    return shape if shape.model_type in listed() else None
