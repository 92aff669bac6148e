"""How images become tokens: one tokenisation, made once, which sampling and training both take as it is.

An image is as many placeholder tokens as its tower gives embeddings. The size, the grid and the pixels are those of
transformers' image processor, as the model's folder configures it, run on PIL: torchvision is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.errors import UserError
from grpo.model.checks import one_line
from grpo.model.vision import Vision

if TYPE_CHECKING:
    import torch

    from grpo.images import Image


class ImageTokens:
    """What the model in a folder makes of images before its tower sees them."""

    def __init__(self, folder: Path, vision: Vision):
        """Raises UserError for a folder without a usable preprocessor configuration."""
        from transformers import AutoImageProcessor

        self.folder, self.vision = folder, vision
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
            self.tokens(64, 64)
        except Exception as error:  # whatever transformers makes of a stranger's file
            raise UserError(
                f"{folder / 'preprocessor_config.json'}: no usable image processor ({one_line(error)}); copy the "
                "model's file there, or set model.images = false"
            ) from None

    @property
    def media_ids(self) -> tuple[int, ...]:
        """Tokens that stand for media, and that the policy never samples."""
        return self.vision.never

    def placeholders(self, token_ids: Sequence[int]) -> int:
        """How many of `token_ids` stand for an image."""
        return sum(token == self.vision.image_token_id for token in token_ids)

    def tokens(self, width: int, height: int) -> int:
        """How many tokens an image of this size is. Raises UserError for one that the processor refuses."""
        try:
            patches = self.processor.get_number_of_image_patches(height, width)
        except ValueError as error:
            raise UserError(f"an image of {width} x {height} pixels: {one_line(error)}; cut or resize it") from None
        return int(patches) // self.vision.merge**2

    def pixels(self, image: Image) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """(float32 [patches, values] as the tower takes them, the grid of patches: time, rows, columns)."""
        made = self.processor(images=[image.pil()], return_tensors="pt")
        time, rows, columns = made["image_grid_thw"][0].tolist()
        return made["pixel_values"], (time, rows, columns)

    def example(self) -> Image:
        """A picture of random pixels, five tokens wide and three high where the processor leaves it so."""
        import io
        import random

        import PIL.Image

        from grpo.images import read_image

        side = int(self.processor.patch_size) * self.vision.merge
        width, height = 5 * side, 3 * side
        pixels = random.Random(0).randbytes(3 * width * height)
        file = io.BytesIO()
        PIL.Image.frombytes("RGB", (width, height), pixels).save(file, "PNG")
        return read_image(file.getvalue(), "an example")

    def encode(self, text: str, images: Sequence[Image], tokenizer: Any) -> list[int]:
        """Token ids of `text`, a rendered chat with one placeholder an image, in the order of `images`.

        Nothing is put in front of the text. Raises UserError where placeholders and images differ in number.
        """
        return self.expand(tokenizer(text, add_special_tokens=False)["input_ids"], images)

    def expand(self, token_ids: Sequence[int], images: Sequence[Image]) -> list[int]:
        """`token_ids` with each placeholder, one an image, as often as the image has tokens."""
        if others := sorted(set(token_ids) & (set(self.media_ids) - {self.vision.image_token_id})):
            raise UserError(
                f"the rendered prompt has token {others[0]}, which stands for video or sound, and images alone are "
                "read; leave it out, or give its frames as images"
            )
        found = self.placeholders(token_ids)
        if found != len(images):
            raise UserError(
                f"the rendered prompt has {found} placeholders for images (token {self.vision.image_token_id}), and "
                f"{len(images)} images; give each image one, and do not write the placeholder in text"
            )
        left = iter(images)
        return [each for token in token_ids for each in self._expanded(token, left)]

    def _expanded(self, token: int, images: Iterator[Image]) -> list[int]:
        if token != self.vision.image_token_id:
            return [token]
        image = next(images)
        return [token] * self.tokens(image.width, image.height)


def images_within(token_ids: Sequence[int], placeholder: int, sizes: Sequence[int]) -> int:
    """How many of the images, of which `sizes` says how many tokens each is, `token_ids` have before others follow."""
    left, count = sum(token == placeholder for token in token_ids), 0
    while count < len(sizes) and left > 0:
        left, count = left - sizes[count], count + 1
    return count


def places(token_ids: Sequence[int], placeholder: int, sizes: Sequence[int]) -> list[int]:
    """Where in a prompt's `token_ids` each image begins, of which `sizes` says how many tokens it is.

    Raises ValueError where the prompt's placeholders are not just those of the images.
    """
    found, place = [], 0
    for size in sizes:
        while place < len(token_ids) and token_ids[place] != placeholder:
            place += 1
        if list(token_ids[place : place + size]) != [placeholder] * size:
            raise ValueError(f"an image of {size} tokens has not as many placeholders at {place} of its prompt")
        found.append(place)
        place += size
    if placeholder in token_ids[place:]:
        raise ValueError("a prompt has placeholders of images that it comes without")
    return found
