"""Images of a whole data set under token numbers of their own, for trainers that move token ids and nothing else.

Every token of every image has a negative number. So a trainer may shuffle, pack and pad sequences as it likes, and
where they arrive the graph knows which embeddings go where and what positions follow. Sampling and GRPO know their
prompts' images and use `image_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grpo.model.image_tokens import places
from grpo.model.vision import positions

if TYPE_CHECKING:
    from grpo.images import Image
    from grpo.policy.vision_tower import ImageFeatures, VisionTower


class MarkedImages:
    """The images of a data set, each with a range of negative numbers."""

    def __init__(self, tower: VisionTower, images: Iterable[Image]):
        self.tower, self.vision = tower, tower.vision
        self.images: list[Image] = list({image.digest: image for image in images}.values())
        sizes = [tower.image_tokens.tokens(image.width, image.height) for image in self.images]
        self.sizes = dict(zip((image.digest for image in self.images), sizes, strict=True))
        self.firsts = torch.tensor([0, *sizes]).cumsum(0)
        """int64 [images + 1]: how many numbers those before an image have."""
        self._grids: dict[int, tuple[int, int, int]] = {}
        """Of the images that were encoded before: an image's embeddings may be forgotten, and its place is needed."""
        self._number = {image.digest: number for number, image in enumerate(self.images)}

    def marked(self, token_ids: Sequence[int], images: Sequence[Image]) -> list[int]:
        """`token_ids` with the numbers of `images` in the place of their placeholders."""
        ids = list(token_ids)
        sizes = [self.sizes[image.digest] for image in images]
        for place, size, image in zip(places(ids, self.vision.image_token_id, sizes), sizes, images, strict=True):
            first = int(self.firsts[self._number[image.digest]])
            ids[place : place + size] = range(-first - 1, -first - 1 - size, -1)
        return ids

    def positions(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """int64 [3, batch, length]: time, row and column of every token, on the device of `tokens`.

        tokens: int64 [batch, length] with numbers of images; starts: bool of the same shape, where a sequence begins.
        """
        begins = -self.firsts[:-1] - 1
        rows = []
        for ids, first in zip(tokens.cpu(), starts.cpu(), strict=True):
            cuts = [*first.nonzero()[:, 0].tolist(), len(ids)]
            parts = [self._positions(ids[start:end], begins) for start, end in zip(cuts, cuts[1:], strict=False)]
            rows.append(torch.cat(parts, dim=1))
        return torch.stack(rows, dim=1).to(tokens.device)

    def _positions(self, ids: Tensor, begins: Tensor) -> Tensor:
        """int64 [3, length] of one sequence."""
        found = torch.isin(ids, begins).nonzero()[:, 0].tolist()
        numbers = self._numbers(ids[found])
        grids = [(place, self._grid(number)) for place, number in zip(found, numbers.tolist(), strict=True)]
        return torch.tensor(positions(len(ids), grids, self.vision.merge))

    def embedded(self, tokens: Tensor, embed: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
        """(embeddings [tokens, width], those of images [images' tokens, (1 + levels) * width], their places).

        tokens: int64 [tokens], negative for images'; `embed`: the decoder's embedding.
        """
        at = (tokens < 0).nonzero()[:, 0]
        inputs = embed(tokens.clamp(min=0))
        if not len(at):
            return inputs, None, at
        marks = tokens.index_select(0, at).cpu()
        numbers = self._numbers(marks)
        used = numbers.unique().tolist()
        table = torch.cat([each.embeddings for each in self._encoded(used)])
        offsets = torch.tensor([0, *(self.sizes[self.images[number].digest] for number in used)]).cumsum(0)
        rows = -1 - marks - self.firsts[numbers] + offsets[torch.searchsorted(torch.tensor(used), numbers)]
        seen = table.index_select(0, rows.to(table.device)).to(inputs.dtype)
        return inputs.index_copy(0, at, seen[:, : self.vision.width]), seen, at

    def _numbers(self, marks: Tensor) -> Tensor:
        """Which image each of `marks` belongs to."""
        return torch.searchsorted(self.firsts, -1 - marks, right=True) - 1

    def _encoded(self, numbers: Sequence[int]) -> list[ImageFeatures]:
        """What the tower makes of the images of these numbers."""
        found = self.tower.embed([self.images[number] for number in numbers])
        self._grids |= {number: each.grid for number, each in zip(numbers, found, strict=True)}
        return found

    def _grid(self, number: int) -> tuple[int, int, int]:
        if number not in self._grids:
            self._encoded([number])
        return self._grids[number]
