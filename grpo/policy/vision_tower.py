"""The frozen vision tower: transformers' own, the only one there is. vLLM and the training graph get what it gives.

An image is encoded once, by itself, whatever it shares a step with, and kept by its digest while there is room. The
tower is 16-bit beside a base in 4 bit, is not trained, and may sit in host memory while it has nothing to do.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo.memory.tower import KEPT_BYTES
from grpo.model.image_tokens import ImageTokens
from grpo.model.vision import Vision, meta_model
from grpo.model.weight_source import Source, dense

if TYPE_CHECKING:
    from grpo.images import Image


@dataclass(frozen=True)
class ImageFeatures:
    """What the tower makes of one image."""

    embeddings: Tensor
    """[tokens, (1 + levels) * width]: what stands in the place of the tokens' embeddings, then what is added to the
    output of each of the first layers (deepstack)."""
    grid: tuple[int, int, int]
    """Patches in time, rows and columns."""
    digest: str

    def __len__(self) -> int:
        """Tokens of the prompt that it takes."""
        return len(self.embeddings)


class VisionTower:
    """transformers' tower of a model, with what it gave for images."""

    def __init__(
        self,
        source: Source,
        image_tokens: ImageTokens,
        *,
        device: torch.device,
        dtype: torch.dtype,
        offload: bool = False,
        kept_bytes: int = KEPT_BYTES,
    ):
        """`source` is one whose tower is read. offload: keep the tower in host memory between uses."""
        assert source.vision is not None
        self.vision: Vision = source.vision
        self.image_tokens, self.device, self.dtype = image_tokens, device, dtype
        self.offload = offload and device.type == "cuda"
        self.kept_bytes = kept_bytes
        self.encoded = 0
        """Images that went through the tower."""
        self.seconds = 0.0
        """Spent on them."""
        self._kept: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._model = build(source, dtype, torch.device("cpu") if self.offload else device)
        self._host = {name: tensor.data.pin_memory() for name, tensor in self._tensors()} if self.offload else {}
        self._move(self._host)

    def embed(self, images: Sequence[Image]) -> list[ImageFeatures]:
        """What the tower makes of each of `images`; those that were seen lately are not encoded again."""
        new = {image.digest: image for image in images if image.digest not in self._kept}
        if new:
            started = time.perf_counter()
            with self._on_device():
                for digest, image in new.items():
                    self._kept[digest] = self._encode(image)
            self.encoded += len(new)
            self.seconds += time.perf_counter() - started
        found = [self._kept[image.digest] for image in images]
        for each in found:
            self._kept.move_to_end(each.digest)
        self._drop()
        return found

    def take_counts(self) -> dict[str, float]:
        """Images encoded since the last call, and the seconds that took."""
        counts = {"images_encoded": float(self.encoded), "tower_seconds": self.seconds}
        self.encoded, self.seconds = 0, 0.0
        return counts

    def nbytes(self) -> int:
        """Bytes of the tower's weights."""
        return sum(tensor.numel() * tensor.itemsize for _, tensor in self._tensors())

    @torch.no_grad()
    def _encode(self, image: Image) -> ImageFeatures:
        pixels, grid = self.image_tokens.pixels(image)
        given = pixels.to(self.device, self.dtype), torch.tensor([grid], device=self.device)
        output = self._model.get_image_features(*given)
        levels = getattr(output, "deepstack_features", None) or []
        embeddings = torch.cat([whole(each) for each in (output.pooler_output, *levels)], dim=-1)
        return ImageFeatures(embeddings, grid, image.digest)

    def _drop(self) -> None:
        """Forget what was used longest ago, until no more is kept than may be."""
        total = sum(each.embeddings.numel() * each.embeddings.itemsize for each in self._kept.values())
        while total > self.kept_bytes and len(self._kept) > 1:
            _, oldest = self._kept.popitem(last=False)
            total -= oldest.embeddings.numel() * oldest.embeddings.itemsize

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        visual = self._model.visual
        yield from visual.named_parameters()
        yield from visual.named_buffers()

    def _move(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self._tensors():
            if name in tensors:
                tensor.data = tensors[name]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Inside, the tower is where it computes."""
        self._move({name: tensor.to(self.device, non_blocking=True) for name, tensor in self._host.items()})
        try:
            yield
        finally:
            self._move(self._host)


def whole(features: Tensor | Sequence[Tensor]) -> Tensor:
    """A tower's output [tokens, width], which some versions of transformers have in pieces, one an image."""
    return features if isinstance(features, Tensor) else torch.cat(list(features))


def build(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """transformers' whole model with the tower's weights of `source`; all else of it is on the meta device."""
    assert source.vision is not None
    weights = {name: dense(source.read(entry)).to(dtype) for name, entry in source.tower.items()}
    model = meta_model(source.vision).model
    kind = type(model.visual)
    model.visual = kind.from_pretrained(
        None, config=model.visual.config, state_dict=weights, dtype=dtype, attn_implementation="sdpa"
    )
    model.visual.to(device).requires_grad_(False).eval()
    return model
