"""Where base weights come from: a folder of safetensors, a bitsandbytes 4-bit checkpoint, a hub id, or a GGUF file.

What becomes of the tensors is decided in `base_weights.py`.
"""

from __future__ import annotations

from pathlib import Path

from grpo.config.schema import Model
from grpo.errors import UserError
from grpo.model.gguf_source import GGUFSource
from grpo.model.locate import local_path
from grpo.model.safetensors_source import SafetensorsSource
from grpo.model.weight_source import Source


def open_source(model: Model) -> Source:
    """The checkpoint that `[model]` names. Raises UserError when it cannot be found, read or trusted."""
    path = locate(model)
    if path.suffix == ".gguf":
        if model.images:
            raise UserError(
                f"{path}: model.images = true, and a GGUF file holds a decoder of text alone; use the model's folder "
                "in Hugging Face's format, or leave images out"
            )
        return GGUFSource(path)
    return SafetensorsSource(path, model)


def locate(model: Model) -> Path:
    """The local file or folder of `model.name`; a hub id is downloaded, unless transformers is told to be offline."""
    return local_path(model.name) or download(model.name, model.revision)


def download(name: str, revision: str | None) -> Path:
    """The hub repository `name` in the local cache, without its pickled or foreign weights."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"model.name = {name!r}: not a local path, and the hub gives no such model ({reason})"
        ) from None


def read_template(path: Path) -> str:
    """The chat template in `path`."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"model.chat_template = {str(path)!r}: cannot be read ({reason}); pass a Jinja file") from None
