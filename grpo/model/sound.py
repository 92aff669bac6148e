"""Which models of sound are none of tokens: those with a tower for it, or with several codebooks at once.

A speech model whose sound is tokens of its one vocabulary, as Orpheus, Llasa and Spark-TTS, is a decoder like any
other. What the others compute beside their decoder is in neither graph, so that they are refused by name, from what
config.json says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo.errors import UserError

CODEBOOKS = re.compile(r"(n|num|audio_num)_codebooks")
TOWER = re.compile(r"audio|speech|acoustic|codec|talker|vocoder|(code|token)2wav|whisper|voxtral")
"""In the name of a nested configuration, or in the family it names: a part for sound."""
INSTEAD = "use a model whose sound is tokens of its vocabulary, such as Orpheus, Llasa or Spark-TTS"


def refuse_sound(values: Mapping[str, Any], file: Path) -> None:
    """Raise UserError where the `values` of config.json, `file`, are of a model of sound that is none of tokens."""
    if problem := sound_problem(values):
        family = values.get("model_type", "unknown")
        raise UserError(f"{file}: architecture {family!r} is not supported: {problem}; {INSTEAD}")


def sound_problem(values: Mapping[str, Any]) -> str | None:
    """Why a model of sound with this config.json cannot be trained; None for any other.

    A model that takes images too keeps its decoder of text, which is read (`text_decoder.py`).
    """
    for place in (values, *(part for _, part in parts(values))):
        for key, count in place.items():
            if CODEBOOKS.fullmatch(key) and isinstance(count, int) and count > 1:
                return f"it predicts {count} codebooks at once ({key})"
    if "vision_config" in values:
        return None
    for name, part in parts(values):
        if TOWER.search(name) or TOWER.search(str(part.get("model_type", ""))):
            return f"it has a tower for sound ({name}), which is in neither graph"
    return None


def parts(values: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The nested configurations of a model's parts."""
    for name, part in values.items():
        if name.endswith("_config") and isinstance(part, Mapping):
            yield name, part
