"""`[model]`: the base model's keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from grpo.config.sections.section import PathText, PositiveInt, Section
from grpo.images import MAX_PIXELS


class Model(Section):
    """`[model]`: which base model, and how it is held in memory."""

    name: str
    """A folder in Hugging Face format, a hub id, a `.gguf` file, or `package:NAME/FILE` in an installed package."""
    load_in_4bit: bool = True
    """Hold the base as NF4. Off: 16-bit LoRA (or 32-bit with `dtype = "float32"`), or 8 bit with `load_in_8bit`."""
    load_in_8bit: bool = False
    """Hold the base in 8 bit, instead of in 4: as int8, or with the codes of a checkpoint in int8 or FP8."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Compute type. "auto": bfloat16 where the device computes in it, else float16 on a GPU, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run. "auto": the GPU, unless torch is built without CUDA. "cpu" asks nothing of CUDA."""
    max_seq_length: PositiveInt | None = None
    """Longest prompt plus completion. Default: `max_prompt_length + max_completion_length` of `[rollout]`."""
    keep_16bit: list[str] | Literal["auto"] = []
    """Modules left unquantised, by name or ending ("mlp.down_proj"); "auto": the 5 % that the output needs most."""
    offload_embedding: bool = False
    """Keep a token embedding that is not the output head too in host memory, where the GPU reads the rows it needs."""
    offload_head: bool = False
    """Keep the output head in host memory, for a model that does not fit otherwise: each decoding step reads it all."""
    images: bool = False
    """Read the model's vision tower too, so that prompts may have images. Off: its decoder of text alone."""
    max_pixels: PositiveInt = MAX_PIXELS
    """Pixels of an image at most: larger ones are scaled down. An image's tokens count in `max_prompt_length`."""
    image_urls: bool = False
    """Download images that rows name by a URL, from public addresses alone. Off: such rows are refused."""
    offload_tower: bool = False
    """Keep the vision tower in host memory between steps; the GPU has it while images are encoded."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    chat_template: PathText | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository ships. Off unless you trust it."""
    full_finetuning: bool = False
    """Train all weights, in 16 or 32 bit and in place, instead of an adapter: `docs/full-finetuning.md`."""

    @property
    def quantized(self) -> bool:
        """Whether the base is held in codes."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="before")
    @classmethod
    def four_bit_unless_something_else(cls, values: Any) -> Any:
        instead = ("load_in_8bit", "full_finetuning")
        if isinstance(values, dict) and any(values.get(key) is True for key in instead):
            return {"load_in_4bit": False} | values
        return values

    @model_validator(mode="after")
    def only_what_one_shared_copy_allows(self) -> Model:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_4bit and load_in_8bit are both true; set one of the two to false")
        if self.offload_tower and not self.images:
            raise ValueError("offload_tower moves the vision tower, which is read with images = true alone; set that")
        if self.load_in_8bit and self.keep_16bit == "auto":
            raise ValueError(
                'keep_16bit = "auto" chooses for NF4, and int8 costs the output a hundredth of that; name layers, or '
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def weights_that_can_be_trained(self) -> Model:
        if not self.full_finetuning:
            return self
        for key in ("load_in_4bit", "load_in_8bit", "offload_embedding", "offload_head", "images"):
            if getattr(self, key):
                raise ValueError(
                    f"full_finetuning trains the decoder's weights, in 16 or 32 bit on the device; set {key} = false, "
                    "or train a LoRA adapter"
                )
        if self.dtype == "float16":
            raise ValueError(
                'full_finetuning: weights in float16 lose small updates and overflow; set dtype = "bfloat16" or '
                '"float32"'
            )
        return self
