"""What a model that takes images says of them: its tower, the tokens that stand for an image, their positions.

The tower itself is transformers' (`grpo/policy/vision_tower.py`); how an image becomes tokens is `image_tokens.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from grpo.errors import UserError
from grpo.model.families.table import family_of

TOWER = "visual"
"""The module of transformers' models that has the tower."""
MEDIA = ("image_token_id", "video_token_id", "audio_token_id")
"""Keys of configurations: tokens that stand for what is no text, and that are therefore never sampled."""


@dataclass(frozen=True)
class Vision:
    """What of a model that takes images is not in the configuration of its decoder of text."""

    config: Any
    """transformers' configuration of the whole model."""
    image_token_id: int
    never: tuple[int, ...]
    """Tokens that stand for media. The policy does not sample them: their logits are out of reach in both graphs."""
    merge: int
    """Patches along each side of the square that becomes one token."""
    levels: int
    """Layers of the decoder, from the first, to whose output an image's tokens have something added (deepstack)."""
    width: int
    """Of the decoder."""

    @classmethod
    def of(cls, config: Any, where: str) -> Vision:
        """Of transformers' `config` of a whole model, in the folder `where`. Raises UserError where images of such a
        model are not read."""
        text = config.get_text_config(decoder=True)
        reason = unseeing(config, text)
        if reason:
            raise UserError(
                f"{where}: model.images = true, but {reason}; use one of {seeing_models()}, or leave images out and "
                "train its decoder of text"
            )
        ids = [getattr(config, key, None) for key in MEDIA]
        return cls(
            config,
            config.image_token_id,
            tuple(sorted({token for token in ids if token is not None and 0 <= token < text.vocab_size})),
            config.vision_config.spatial_merge_size,
            len(getattr(config.vision_config, "deepstack_visual_indexes", ())),
            text.hidden_size,
        )

    @property
    def widths(self) -> int:
        """Of what the tower gives for a token, in widths of the decoder."""
        return 1 + self.levels

    def stored_tower(self, stored: Iterable[str], needed: Iterable[str], where: str) -> dict[str, str]:
        """The tower's tensors, as its module names them -> their entries among `stored`. Raises UserError naming one
        that is missing."""
        entries = {name.removeprefix("model."): name for name in stored}
        found = {name: entries.get(f"{TOWER}.{name}", "") for name in needed}
        if missing := [name for name, entry in found.items() if not entry]:
            raise UserError(f"{where}: tensor {TOWER}.{missing[0]} is missing; pass a complete model")
        return found


def unseeing(config: Any, text: Any) -> str:
    """Why images of the model of `config` are not read, as a part of a sentence; empty where they are."""
    family = family_of(text.model_type)
    if text is config or getattr(config, "vision_config", None) is None:
        return "this is a model of text alone"
    if not family.sees:
        return f"images of the architecture {config.model_type!r} are not read: " + (
            family.blind or "none of its tower and positions is tested here"
        )
    if not (getattr(text, "rope_parameters", None) or {}).get("mrope_section"):
        return "its rope_parameters have no mrope_section, which says how positions in images turn"
    return ""


def seeing_models() -> str:
    """Whose images are read, for a sentence."""
    return "Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen 3.5"


def tower_shapes(vision: Vision) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the tower, asked of transformers' model without weights."""
    return {name: tuple(tensor.shape) for name, tensor in meta_model(vision).model.visual.state_dict().items()}


def meta_model(vision: Vision) -> Any:
    """transformers' whole model on the meta device."""
    import copy

    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(copy.deepcopy(vision.config))


def positions(length: int, images: Sequence[tuple[int, tuple[int, int, int]]], merge: int) -> list[list[int]]:
    """Positions in time, row and column [3][length] of a sequence in which images begin at the places of `images`,
    each with its grid of patches (time, rows, columns).

    An image's tokens are at the time at which it begins, and at its rows and columns from there; what follows goes on
    behind its longer side, all three alike (Qwen2-VL, section 2.1).
    """
    rows: list[list[int]] = [[], [], []]
    now = 0

    def text(until: int) -> None:
        nonlocal now
        count = until - len(rows[0])
        for row in rows:
            row.extend(range(now, now + count))
        now += count

    for first, (_, patch_rows, patch_columns) in images:
        text(first)
        high, wide = patch_rows // merge, patch_columns // merge
        rows[0].extend([now] * (high * wide))
        rows[1].extend(now + row for row in range(high) for _ in range(wide))
        rows[2].extend(now + column for _ in range(high) for column in range(wide))
        now += max(high, wide)
    text(length)
    return rows
