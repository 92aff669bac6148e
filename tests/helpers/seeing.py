"""Tiny models that take images, whole folders with an image processor, and images to show them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from grpo.images import Image, read_image
from tests.helpers.families import spread
from tests.helpers.tiny import COMMON
from tests.helpers.tiny_run import SMOLLM2

PLACEHOLDER, VIDEO, START, END = 150, 151, 152, 153
TOKENS = {
    "image_token_id": PLACEHOLDER,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
MARKS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
"""The same tokens as text, in the order of TOKENS."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH = 4
TOWER: dict[str, Any] = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3}
GRID = {"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}
POSITIONS = {"rope_type": "default", "rope_theta": 1e4}
SEEING: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**COMMON, "rope_parameters": {**POSITIONS, "mrope_section": [4, 6, 6]}},
        "vision_config": {**GRID, "depth": 2, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 128},
    },
    "qwen2_5_vl": {
        "text_config": {**COMMON, "rope_parameters": {**POSITIONS, "mrope_section": [4, 6, 6]}},
        "vision_config": {
            **TOWER,
            **GRID,
            "out_hidden_size": 128,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
    },
    "qwen3_vl": {
        "text_config": {
            **COMMON,
            "num_hidden_layers": 3,
            "head_dim": 64,
            "rope_parameters": {**POSITIONS, "mrope_section": [12, 10, 10], "mrope_interleaved": True},
        },
        "vision_config": {
            **TOWER,
            **GRID,
            "out_hidden_size": 128,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    },
    "qwen3_5": {
        "text_config": {
            **COMMON,
            "head_dim": 64,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 64,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": {
                **POSITIONS,
                "partial_rotary_factor": 0.25,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        "vision_config": {**TOWER, **GRID, "out_hidden_size": 128, "num_position_embeddings": 16},
    },
}
"""model_type -> configuration."""


def save_seeing(folder: Path, family: str, tokens: dict[str, int] | None = None, **changes: Any) -> Any:
    """Write a random float32 model that takes images to `folder`, with its processor's file, and return it.

    tokens: in place of TOKENS; changes: to its text's entries.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    values = SEEING[family]
    text = {**values["text_config"], "tie_word_embeddings": False, **changes}
    whole = {**values, **(tokens or TOKENS), "text_config": text, "tie_word_embeddings": False}
    config = AutoConfig.for_model(family, **whole)
    model = spread(AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager"))
    model.save_pretrained(folder)
    write_processor(folder)
    return model


def save_seeing_chat(folder: Path, family: str = "qwen2_5_vl") -> Path:
    """The same with SmolLM2's tokenizer, tokens for images and a template of contents in parts."""
    from transformers import AutoTokenizer

    from grpo.config.schema import Model
    from grpo.model.gguf_source import metadata_folder
    from grpo.model.source import locate

    tokenizer = AutoTokenizer.from_pretrained(metadata_folder(locate(Model(name=SMOLLM2))))
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKS)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    ids = dict(zip(TOKENS, tokenizer.convert_tokens_to_ids(list(MARKS)), strict=True))
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 1024}
    save_seeing(folder, family, ids, **shape, eos_token_id=2, bos_token_id=1, pad_token_id=2)
    tokenizer.save_pretrained(folder)
    return folder


def write_processor(folder: Path) -> None:
    """The file of the image processor: images of at most 4096 pixels are not shrunk."""
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 4096},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def noise(width: int, height: int, seed: int) -> Image:
    """An image of random pixels."""
    import io

    import PIL.Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return read_image(file.getvalue(), "noise")


def prompt_ids(*parts: int | Image, tokens: Any) -> list[int]:
    """`parts`, tokens and images, with each image between its marks; `tokens` is an ImageTokens."""
    ids: list[int] = []
    for part in parts:
        ids += [part] if isinstance(part, int) else [START, *tokens.expand([PLACEHOLDER], [part]), END]
    return ids
