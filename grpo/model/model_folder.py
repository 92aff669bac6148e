"""Writing a model folder in Hugging Face's format: shards of weights, and the files that go with any weights.

What is in the weights is the caller's; reading such a folder is `safetensors_source.py`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

SHARD_BYTES = 2 << 30
COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What a model folder holds beside weights and configuration, as far as it stays true after merging."""
OF_IMAGES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""What it holds besides for a model that takes images."""


@dataclass
class Shards:
    """safetensors files that are begun anew when one is full, and the index of several."""

    folder: Path
    limit: int = SHARD_BYTES
    _held: dict[str, Tensor] = field(default_factory=dict)
    _written: list[list[str]] = field(default_factory=list)
    _bytes: int = 0
    _total: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take `tensor`; it is held until its shard is full."""
        if self._held and self._bytes + tensor.nbytes > self.limit:
            self._write()
        self._held[name] = tensor.contiguous()
        self._bytes += tensor.nbytes

    def _write(self) -> None:
        from safetensors.torch import save_file

        file = self.folder / f"shard-{len(self._written)}"
        file.touch()
        mode = file.stat().st_mode
        save_file(self._held, file, metadata={"format": "pt"})
        file.chmod(mode)  # safetensors lets nobody but the owner read
        self._written.append(list(self._held))
        self._total += self._bytes
        self._held, self._bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, name the files and, of several, the index."""
        if self._held:
            self._write()
        count = len(self._written)
        shard_of: dict[str, str] = {}
        for number, names in enumerate(self._written):
            many = f"model-{number + 1:05}-of-{count:05}.safetensors"
            file = many if count > 1 else "model.safetensors"
            (self.folder / f"shard-{number}").rename(self.folder / file)
            shard_of |= dict.fromkeys(names, file)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(shard_of.items()))}
            write_json(self.folder / "model.safetensors.index.json", index)


def companions(folder: Path, *, images: bool = False) -> Iterator[Path]:
    """The files of a model folder that go with any format of its weights."""
    patterns = (*COPIED, *(OF_IMAGES if images else ()))
    yield from sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def replace_template(folder: Path, template: str) -> None:
    """Make `template` the chat template of the tokenizer in `folder`, wherever one is read from."""
    file = folder / "tokenizer_config.json"
    if file.is_file():
        settings = json.loads(file.read_text())
        settings.pop("chat_template", None)
        write_json(file, settings)
    for old in folder.glob("chat_template*"):
        old.unlink()
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_json(file: Path, values: dict[str, Any]) -> None:
    """`values` as people read them."""
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
