"""Images in packed rows: where their embeddings go, which positions their tokens have, and what of a prompt is shared.

In the tokens of a sequence the placeholders of its images are replaced by negative numbers, each for one embedding of
one image. So equal placeholders of different images are no common beginning, those of the same image are, and where
an embedding goes is known by its place and not by a token's id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grpo.model.image_tokens import places
from grpo.model.vision import Vision, positions

if TYPE_CHECKING:
    from grpo.images import Image
    from grpo.policy.vision_tower import ImageFeatures, VisionTower


class ImageRows:
    """The images of S sequences that share a packed row."""

    def __init__(self, tower: VisionTower, prompts: Sequence[Sequence[int]], images: Sequence[Sequence[Image]]):
        """prompts: token ids of each sequence's prompt, in which the placeholders of its `images` stand."""
        self.vision: Vision = tower.vision
        self.features: dict[str, ImageFeatures] = {}
        self._first: dict[str, int] = {}
        count = 0
        for each in tower.embed([image for several in images for image in several]):
            if each.digest not in self.features:
                self.features[each.digest], self._first[each.digest] = each, count
                count += len(each)
        self.placed = [self._places(*pair) for pair in zip(prompts, images, strict=True)]
        self.prompts = [self._marked(*pair) for pair in zip(prompts, self.placed, strict=True)]
        """As given, with negative numbers for placeholders."""

    def _places(self, prompt: Sequence[int], images: Sequence[Image]) -> list[tuple[int, ImageFeatures]]:
        found = [self.features[image.digest] for image in images]
        starts = places(prompt, self.vision.image_token_id, [len(each) for each in found])
        return list(zip(starts, found, strict=True))

    def _marked(self, prompt: Sequence[int], placed: list[tuple[int, ImageFeatures]]) -> list[int]:
        marked = list(prompt)
        for start, each in placed:
            first = self._first[each.digest]
            marked[start : start + len(each)] = range(-first - 1, -first - 1 - len(each), -1)
        return marked

    def positions(self, sources: Sequence[tuple[int, int, int]], device: torch.device) -> Tensor:
        """int64 [3, 1, tokens]: time, row and column of every token of a row made of `sources`, as `PackedRow` has
        them."""
        lengths: dict[int, int] = {}
        for sequence, first, count in sources:
            lengths[sequence] = max(lengths.get(sequence, 0), first + count)
        known = {sequence: self._positions(sequence, length) for sequence, length in lengths.items()}
        parts = [known[sequence][:, first : first + count] for sequence, first, count in sources]
        return torch.cat(parts, dim=1)[:, None].to(device)

    def _positions(self, sequence: int, length: int) -> Tensor:
        """int64 [3, length] of the first tokens of a sequence."""
        grids = [(start, each.grid) for start, each in self.placed[sequence]]
        return torch.tensor(positions(length, grids, self.vision.merge))

    def embedded(self, tokens: Tensor, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """(embeddings [tokens, width], those of images [images' tokens, (1 + levels) * width], their places).

        tokens: int64 [tokens], negative for images'; `embed`: the decoder's embedding.
        """
        places_of_images = (tokens < 0).nonzero()[:, 0]
        inputs = embed(tokens.clamp(min=0))
        if not len(places_of_images):
            return inputs, None, places_of_images
        table = torch.cat([each.embeddings for each in self.features.values()])
        seen = table.index_select(0, -1 - tokens.index_select(0, places_of_images)).to(inputs.dtype)
        return inputs.index_copy(0, places_of_images, seen[:, : self.vision.width]), seen, places_of_images


@contextmanager
def deepstack(layers: Sequence[nn.Module], seen: Tensor | None, at: Tensor, vision: Vision) -> Iterator[None]:
    """Inside, the first `vision.levels` of `layers` have what `seen` has for them added to their output [1, tokens,
    width] at the places `at` (Qwen3-VL, "DeepStack")."""
    handles = []
    for level in range(vision.levels if seen is not None else 0):
        assert seen is not None
        added = seen[:, (1 + level) * vision.width : (2 + level) * vision.width]
        handles.append(layers[level].register_forward_hook(adding(added, at)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def adding(added: Tensor, at: Tensor) -> Callable[..., Any]:
    """A hook that adds `added` [places, width] to a layer's output [1, tokens, width] at the places `at`."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_add(1, at, added[None].to(output.dtype))

    return hook
