"""Images for tests, and how a model with patches of 28 pixels has them in its tokens."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy
from PIL import Image as pil

from grpo.errors import UserError
from grpo.images import Image

PLACE = "<image_pad>"


def noise(width: int = 30, height: int = 20, seed: int = 0) -> pil.Image:
    """An RGB image that looks like no other of another seed or when turned."""
    return pil.fromarray(numpy.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=numpy.uint8))


def file_of(image: pil.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class PatchTokens:
    """One token for each begun square of 28 pixels, in the place of `PLACE`."""

    def encode(self, text: str, images: Sequence[Image], tokenizer: Any) -> list[int]:
        pieces = text.split(PLACE)
        if len(pieces) - 1 != len(images):
            raise UserError(f"it has {len(images)} images and {len(pieces) - 1} places for one")
        for index, image in enumerate(images):
            count = math.ceil(image.width / 28) * math.ceil(image.height / 28)
            pieces[index] += " ".join([PLACE] * count)
        return list(tokenizer("".join(pieces), add_special_tokens=False)["input_ids"])
