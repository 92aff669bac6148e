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

from grpo.model.image_tokens import images_within, places
from grpo.model.vision import Vision, positions

if TYPE_CHECKING:
    from grpo.images import Image
    from grpo.policy.vision_tower import ImageFeatures, VisionTower


class ImageRows:
    """The images of S sequences that share a packed row."""

    def __init__(
        self,
        tower: VisionTower,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        images: Sequence[Sequence[Image]],
    ):
        """prompts, completions: token ids of each sequence, in which the placeholders of its `images` stand: those of
        its prompt's, and then those of what an environment showed."""
        self.vision: Vision = tower.vision
        self.features: dict[str, ImageFeatures] = {}
        self._first: dict[str, int] = {}
        count = 0
        for each in tower.embed([image for several in images for image in several]):
            if each.digest not in self.features:
                self.features[each.digest], self._first[each.digest] = each, count
                count += len(each)
        given = list(zip(prompts, completions, images, strict=True))
        self.placed = [self._places(*each) for each in given]
        marked = [self._marked([*each[0], *each[1]], placed) for each, placed in zip(given, self.placed, strict=True)]
        self.prompts = [ids[: len(prompt)] for ids, prompt in zip(marked, prompts, strict=True)]
        self.completions = [ids[len(prompt) :] for ids, prompt in zip(marked, prompts, strict=True)]
        """Both as given, with negative numbers for the placeholders of images."""

    def _places(
        self, prompt: Sequence[int], completion: Sequence[int], images: Sequence[Image]
    ) -> list[tuple[int, ImageFeatures]]:
        found = [self.features[image.digest] for image in images]
        token, sizes = self.vision.image_token_id, [len(each) for each in found]
        of_prompt = images_within(prompt, token, sizes)
        starts = places(prompt, token, sizes[:of_prompt])
        later = places(completion, token, sizes[of_prompt:]) if of_prompt < len(found) else []
        return list(zip([*starts, *(len(prompt) + start for start in later)], found, strict=True))

    def _marked(self, ids: list[int], placed: list[tuple[int, ImageFeatures]]) -> list[int]:
        for start, each in placed:
            first = self._first[each.digest]
            ids[start : start + len(each)] = range(-first - 1, -first - 1 - len(each), -1)
        return ids

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
