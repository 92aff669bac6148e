"""vLLM's decoders of text, taking images: it has no tower, no pixels and no processor of its own. For engine.py alone.

The class of the decoder is the one that serves its text, with three things added. Embeddings of images come from the
tower that training uses too, by a number in the request, and go where the request says, not where a token's id says.
Positions are those of `grpo.model.vision.positions`. Tokens that stand for images are never sampled.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo

from grpo.kernels.logprob import put_out_of_reach
from grpo.model.image_tokens import places
from grpo.model.vision import Vision, positions
from grpo.policy.vision_tower import ImageFeatures

IMAGES = "image"
"""vLLM's name of the kind of input."""
ARGUMENTS = {
    "limit_mm_per_prompt": {IMAGES: 0},
    "enable_mm_embeds": True,
    "skip_mm_profiling": True,
    "mm_processor_cache_gb": 0,
}
"""vLLM's arguments for a model that gets embeddings alone."""


class ImageStore:
    """The images of the requests that an engine has at the moment, by number."""

    def __init__(self, vision: Vision):
        self.vision = vision
        self._features: dict[int, ImageFeatures] = {}
        self._numbers: dict[str, int] = {}

    def request(self, prompt_ids: Sequence[int], images: Sequence[ImageFeatures]) -> dict[str, Any]:
        """A prompt as vLLM's engine takes it, with `images` in the order of their placeholders."""
        starts = places(prompt_ids, self.vision.image_token_id, [len(each) for each in images])
        return {
            "type": "multimodal",
            "prompt_token_ids": list(prompt_ids),
            "mm_kwargs": MultiModalKwargsItems({IMAGES: [self._item(each) for each in images]}),
            "mm_hashes": {IMAGES: [each.digest for each in images]},
            "mm_placeholders": {
                IMAGES: [
                    PlaceholderRange(offset=start, length=len(each)) for start, each in zip(starts, images, strict=True)
                ]
            },
        }

    def _item(self, image: ImageFeatures) -> MultiModalKwargsItem:
        number = self._numbers.setdefault(image.digest, len(self._numbers))
        self._features[number] = image
        values = {"number": torch.tensor([number]), "grid": torch.tensor(image.grid)}
        return MultiModalKwargsItem(
            {
                name: MultiModalFieldElem(data=value, field=MultiModalBatchedField(keep_on_cpu=True))
                for name, value in values.items()
            }
        )

    def embeddings(self, numbers: Tensor) -> list[Tensor]:
        """Of the images `numbers` [images, 1], each [tokens, (1 + levels) * width]."""
        return [self._features[number].embeddings for number in numbers.flatten().tolist()]

    def clear(self) -> None:
        """Forget the images: no request that names one is left."""
        self._features.clear()
        self._numbers.clear()


@contextmanager
def known_positions() -> Iterator[None]:
    """Inside, transformers says nothing of a text model's configuration that has entries about positions in images."""
    of_rotary = logging.getLogger("transformers.modeling_rope_utils")
    before = of_rotary.level
    of_rotary.setLevel(logging.ERROR)
    try:
        yield
    finally:
        of_rotary.setLevel(before)


class NoProcessing(BaseProcessingInfo):
    """What vLLM wants to know of a processor that is never called."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {IMAGES: None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """An image is as long as a sequence at most."""
        return {IMAGES: seq_len}


class NoDummies(BaseDummyInputsBuilder[NoProcessing]):
    """Nothing is profiled."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return ""

    def get_dummy_mm_data(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return {}


class NoProcessor(BaseMultiModalProcessor[NoProcessing]):
    """Requests come with their placeholders."""

    requires_tokenizer = False

    def _get_mm_fields_config(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("images are processed before vLLM gets a request")

    def _get_prompt_updates(self, *arguments: Any, **options: Any) -> Any:
        raise NotImplementedError("placeholders are expanded before vLLM gets a request")


class TakesImages(SupportsMultiModal, SupportsMRoPE):
    """What is added to a decoder of text. `see` tells it of the images before the first request."""

    store: ImageStore | None = None
    text_class: ClassVar[Any]
    added: list[Tensor]
    """Of each level, [tokens of a step, width]: what is added to the output of a layer; 0 where there is no image."""
    used = 0
    """Rows of `added` that may be others than 0."""

    def see(self, store: ImageStore, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        """Take images from `store`, in steps of at most `tokens` tokens."""
        self.store, vision = store, store.vision
        size = (tokens, vision.width)
        self.added = [torch.zeros(size, dtype=dtype, device=device) for _ in range(vision.levels)]
        for level, added in enumerate(self.added):
            self.model.layers[level].register_forward_hook(adding(added))

    def get_language_model(self) -> Any:
        return self

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        assert self.store is not None
        return self.store.embeddings(kwargs["number"])

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Sequence[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """Embeddings [tokens, width], those of images where `is_multimodal` [tokens] says."""
        inputs = self.text_class.embed_input_ids(self, input_ids)
        for added in self.added:
            added[: self.used].zero_()
        self.used = 0
        if not multimodal_embeddings:
            return inputs
        assert self.store is not None and is_multimodal is not None
        at = is_multimodal.nonzero()[:, 0].to(inputs.device, non_blocking=True)
        parts = torch.cat(list(multimodal_embeddings)).to(inputs.dtype).split(self.store.vision.width, dim=1)
        self.used = len(inputs)
        for added, part in zip(self.added, parts[1:], strict=True):
            added.index_copy_(0, at, part)
        return inputs.index_copy(0, at, parts[0])

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """(positions [3, tokens] of a prompt, what is added to a later token's number to give all three)."""
        assert self.store is not None
        images = [(each.mm_position.offset, tuple(each.data["grid"].data.tolist())) for each in mm_features]
        found = torch.tensor(positions(len(input_tokens), images, self.store.vision.merge))
        return found, int(found.max()) + 1 - len(input_tokens)

    def compute_logits(self, hidden_states: Tensor, *arguments: Any) -> Tensor | None:
        logits = self.text_class.compute_logits(self, hidden_states, *arguments)
        assert self.store is not None
        return None if logits is None else put_out_of_reach(logits, self.store.vision.never)


def adding(added: Tensor) -> Any:
    """A hook that adds the first rows of `added` to what a layer gives: its output, or what is to be added to the
    residual beside it."""

    def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + added[: len(output[0])], *output[1:])
        return output + added[: len(output)]

    return hook


def class_with_images(architecture: str) -> str:
    """Register vLLM's class `architecture`, of a decoder of text, as one that takes images; returns its name there."""
    name = f"{architecture}WithImages"
    text: Any = ModelRegistry.models[architecture].load_model_cls()

    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        text.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.added = []

    made: Any = type(name, (TakesImages, text), {"text_class": text, "__init__": __init__})
    MULTIMODAL_REGISTRY.register_processor(NoProcessor, info=NoProcessing, dummy_inputs=NoDummies)(made)
    ModelRegistry.register_model(name, made)
    return name
