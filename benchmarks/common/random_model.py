"""Checkpoints of the shapes that benchmarks speak of, with random weights: what a load costs does not depend on values.

A `RandomSource` hands out tensors by name as `grpo.model.weight_source.Source` does, as views of one block of random
numbers, so that no disk is measured; `write_checkpoint` puts the same tensors into safetensors shards where a disk
should be. Nothing here loads a model.
"""

from __future__ import annotations

import fcntl
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from grpo.kernels import mxfp4
from grpo.model.architectures import causal_class
from grpo.model.base_weights import BLOCK
from grpo.model.expert_sizes import MATRICES, expert_sizes
from grpo.model.families.table import family_of
from grpo.model.inventory import as_stored
from grpo.model.meta_graph import graph_tensors
from grpo.model.quantization import stated
from grpo.model.sizes import VOCABULARY_PADDING, linear_shapes
from grpo.model.weight_source import MXFP4Tensor

LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}
TINY: dict[str, Any] = {
    **LLAMA3,
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN25: dict[str, Any] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "dtype": "bfloat16",
}
QWEN35: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "vocab_size": 248320,
    "hidden_size": 2560,
    "intermediate_size": 9216,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    "tie_word_embeddings": True,
    "eos_token_id": 248044,
    "dtype": "bfloat16",
}
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "sliding_window": 128,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "eos_token_id": 200002,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt_oss_20b": GPT_OSS,
    "tiny_gpt_oss": {
        **GPT_OSS,
        "vocab_size": 1000,
        "hidden_size": 192,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "max_position_embeddings": 8192,
        "eos_token_id": 2,
    },
    "qwen3.5-4b": QWEN35,
    "tiny_hybrid": {
        **QWEN35,
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "eos_token_id": 2,
    },
    "tiny": {**TINY, "tie_word_embeddings": True},
    "tiny_untied": {**TINY, "tie_word_embeddings": False},
    "0.5b": {
        **QWEN25,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    },
    "1.5b": {
        **QWEN25,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
    },
    "3b": {
        **LLAMA3,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "tie_word_embeddings": True,
    },
    "8b": {
        **LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "14b": {
        **LLAMA3,
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
    "32b": {
        **LLAMA3,
        "vocab_size": 151936,
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "70b": {
        **LLAMA3,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "30b_a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "max_position_embeddings": 8192,
        "rope_theta": 1000000.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    },
    "tiny_experts": {
        **TINY,
        "model_type": "qwen3_moe",
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
}
"""Llama-3.2-3B, Llama-3.1-8B and Llama-3.1-70B, but for the positions; 14b and 32b have the sizes of Qwen3 without its
norms of q and k; 0.5b and 1.5b are Qwen2.5; 30b_a3b is Qwen3-30B-A3B, qwen3.5-4b is Qwen3.5-4B, gpt_oss_20b is
gpt-oss-20b. Those whose names begin with `tiny` are to try a benchmark on a CPU."""

MXFP4_EXPONENT = 120
"""Of all blocks: the sixteen values have a spread of 2.9."""
OFFSETS = 1 << 20
"""Tensors start at one of so many places in the block, so that no two are alike."""


def shape_config(shape: str) -> Any:
    """transformers' configuration of one of SHAPES."""
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type", "llama"), **values)
    config.architectures = [causal_class(config.model_type)]
    return config


def tensor_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, in the order of a checkpoint."""
    shapes = graph_tensors(config).shapes()
    return shapes if expert_sizes(config) is None else as_stored(config, shapes)


def expected_bytes(config: Any) -> dict[str, int]:
    """What NF4 weights take by arithmetic: packed codes, 16-bit absmax, and everything that stays in 16 bit."""
    quantised = sum(rows * columns for rows, columns in linear_shapes(config).values())
    padded = -(-config.vocab_size // VOCABULARY_PADDING) * VOCABULARY_PADDING
    tables = 1 if config.tie_word_embeddings else 2
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    sizes = {
        "packed": quantised // 2,
        "absmax": quantised // BLOCK * 2,
        "sixteen_bit": 2 * (tables * padded * config.hidden_size + norms),
    }
    return {**sizes, "total": sum(sizes.values())}


class RandomSource:
    """A bfloat16 checkpoint that exists only as its names: weights ~ N(0, 0.02), norms 1. Tensors are on the CPU.

    Experts are in MXFP4 where the configuration says so, of the same spread. Of recurrent layers convolutions are
    wider, and some heads forget within a few tokens, others within thousands.
    """

    def __init__(self, shape: str, device: torch.device):
        """`device` draws the numbers; it holds none of them afterwards."""
        self.path = Path(f"random-{shape}")
        self.stored_as = "bfloat16"
        self.config = shape_config(shape)
        self._shapes = tensor_shapes(self.config)
        self.names, self.notices = set(self._shapes), list[str]()
        self.vision, self.tower = None, dict[str, str]()
        largest = max(torch.Size(size).numel() for size in self._shapes.values())
        torch.manual_seed(0)
        drawn = torch.randn(min(largest, 1 << 27), dtype=torch.bfloat16, device=device).mul_(0.02).cpu()
        self._block = drawn.repeat(-(-(largest + OFFSETS) // drawn.numel()))
        self._mxfp4 = stated(self.config.to_dict()).get("quant_method") == "mxfp4"

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> Tensor | MXFP4Tensor:
        size = self._shapes[name]
        if name.endswith("norm.weight"):
            adds_one = family_of(self.config.model_type).norm_adds_one and "linear_attn" not in name
            return torch.full(size, 0.0 if adds_one else 1.0, dtype=torch.bfloat16)
        if name.endswith("A_log"):
            return torch.linspace(-7.0, 1.0, size[0], dtype=torch.bfloat16)
        start = zlib.crc32(name.encode()) % OFFSETS
        if self._mxfp4 and name.endswith(MATRICES):
            experts, columns, rows = size
            blocks = columns // mxfp4.BLOCK
            # The lower bytes of the numbers, whose bits are even.
            low = self._block.view(torch.uint8)[2 * start : 2 * start + experts * rows * columns : 2]
            exponents = torch.full((experts, rows, blocks), MXFP4_EXPONENT, dtype=torch.uint8)
            return MXFP4Tensor(low.view(experts, rows, blocks, mxfp4.BLOCK // 2), exponents)
        values = self._block[start : start + torch.Size(size).numel()].view(size)
        return values * 15 if "conv1d" in name else values

    def stored_name(self, name: str) -> str:
        return name

    def tokenizer(self) -> Any:
        raise NotImplementedError("random weights have no tokenizer")


def write_checkpoint(source: RandomSource, folder: Path, shard_bytes: float = 2e9) -> int:
    """`source` as safetensors shards of about `shard_bytes` in `folder`; returns the bytes written."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    source.config.save_pretrained(folder)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name, shape in tensor_shapes(source.config).items():
        nbytes = 2 * torch.Size(shape).numel()
        if size + nbytes > shard_bytes and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
        total += nbytes
    places = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        # A copy each: views of one storage are refused by safetensors.
        save_file({name: source.read(name).clone() for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def checkpoint_folder(shape: str, scratch: Path) -> Path:
    """`scratch`/random-checkpoint-`shape`, written if it is not there; processes that ask at once get one copy."""
    folder = scratch / f"random-checkpoint-{shape}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            write_checkpoint(RandomSource(shape, torch.device("cpu")), folder)
            (folder / "complete").touch()
    return folder
