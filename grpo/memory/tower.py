"""Bytes that images take beside their tokens: the vision tower, what it computes with, and what it gives.

By arithmetic from the tower's configuration, whichever of the families' forms it has; a test compares it with
transformers' module. Nothing here imports torch, or allocates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from grpo.config.schema import Config

KEPT_BYTES = 1 << 30
"""Of embeddings kept on the device, at most."""
STEP_TOKENS = 8192
"""Tokens of one step of vLLM, which keeps embeddings of so many, and for so many what is added at each level."""


@dataclass(frozen=True)
class TowerSizes:
    """What of a tower's configuration decides its memory."""

    depth: int
    hidden: int
    inner: int
    gated: bool
    """Its MLPs multiply a gate with it."""
    patch: int
    """Values of a patch."""
    positions: int
    """Learned ones."""
    merge: int
    """Patches along each side of what becomes one token."""
    levels: int
    out: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TowerSizes:
        """From the entries of `vision_config`. Raises KeyError for a tower of another kind."""
        older = "embed_dim" in values  # Qwen2-VL, which calls the decoder's width hidden_size
        hidden = values["embed_dim" if older else "hidden_size"]
        side = values.get("patch_size", 14)
        return cls(
            depth=values["depth"],
            hidden=hidden,
            inner=int(hidden * values.get("mlp_ratio", 4)) if older else values["intermediate_size"],
            gated="fullatt_block_indexes" in values or "window_size" in values,
            patch=values.get("in_channels", 3) * values.get("temporal_patch_size", 2) * side * side,
            positions=values.get("num_position_embeddings") or 0,
            merge=values.get("spatial_merge_size", 2),
            levels=len(values.get("deepstack_visual_indexes") or ()),
            out=values["hidden_size" if older else "out_hidden_size"],
        )

    @property
    def widths(self) -> int:
        """Of what it gives for a token, in widths of the decoder."""
        return 1 + self.levels

    def parameters(self) -> int:
        """Numbers in its weights."""
        hidden, merged = self.hidden, self.hidden * self.merge**2
        attention = 4 * hidden * hidden + 4 * hidden
        if self.gated:  # RMSNorm has no bias, and neither has the convolution that embeds patches
            block = attention + 3 * hidden * self.inner + 2 * self.inner + hidden + 2 * hidden
            return self.depth * block + hidden * self.patch + hidden + merger(merged, self.out)
        block = attention + 2 * hidden * self.inner + self.inner + hidden + 4 * hidden
        learned = self.positions * hidden + (hidden if self.positions else 0)  # with these the convolution has a bias
        levels = self.levels * (2 * merged + merger(merged, self.out))
        return self.depth * block + hidden * self.patch + learned + 2 * hidden + merger(merged, self.out) + levels

    def weight_bytes(self, itemsize: int) -> int:
        """Of its weights."""
        return self.parameters() * itemsize

    def encoding_bytes(self, tokens: int, itemsize: int) -> int:
        """What an image of so many tokens takes while it is encoded: a block's hidden states, q, k and v, turned in
        float32, and its MLP; then the embeddings."""
        patches = tokens * self.merge**2
        turned = 2 * 3 * self.hidden * 4  # q and k, their halves exchanged, and the products
        block = (6 * self.hidden + (3 if self.gated else 2) * self.inner) * itemsize + turned
        return patches * (block + self.patch * (4 + itemsize)) + tokens * self.widths * self.out * itemsize

    def kept_bytes(self, config: Config, itemsize: int) -> int:
        """Embeddings of a step's prompts, were they nothing but images."""
        tokens = config.rollout.prompts_per_step * config.rollout.max_prompt_length
        return min(KEPT_BYTES, tokens * self.widths * self.out * itemsize)

    def vllm_bytes(self, itemsize: int) -> int:
        """What vLLM keeps for images: embeddings of a step's tokens, those of images, what is added at each level."""
        return STEP_TOKENS * (1 + self.widths + self.levels) * self.out * itemsize

    def training_bytes(self, tokens: int, itemsize: int) -> int:
        """What a micro-batch of so many tokens takes more: embeddings with those of images among them, the table of
        these, and a layer's output with what is added to it."""
        return tokens * (2 + 2 * self.widths) * self.out * itemsize


@dataclass(frozen=True)
class ImagesPlan:
    """What images take of a run's memory, in bytes."""

    tower: int = 0
    """Its weights, on the device."""
    host: int = 0
    """The same in host memory."""
    kept: int = 0
    """Embeddings and vLLM's buffers."""
    encoding: int = 0
    """On top of all that, while an image is encoded."""
    training: int = 0
    """On top of a micro-batch."""


def images_plan(config: Config, sizes: TowerSizes | None, itemsize: int, *, on_gpu: bool) -> ImagesPlan:
    """For a run of `config` on a model with a tower of `sizes`; None: of text alone."""
    if sizes is None:
        return ImagesPlan()
    tokens = max(config.train.tokens_per_micro_batch, config.max_seq_length)
    weights, offloaded = sizes.weight_bytes(itemsize), on_gpu and config.model.offload_tower
    return ImagesPlan(
        tower=0 if offloaded else weights,
        host=weights if offloaded else 0,
        kept=sizes.kept_bytes(config, itemsize) + sizes.vllm_bytes(itemsize),
        encoding=sizes.encoding_bytes(config.rollout.max_prompt_length, itemsize) + (weights if offloaded else 0),
        training=sizes.training_bytes(tokens, itemsize),
    )


def merger(merged: int, out: int) -> int:
    """Numbers in the two layers that make a token of a square of patches."""
    return merged * merged + merged + merged * out + out
