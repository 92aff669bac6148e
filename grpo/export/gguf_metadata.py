"""The metadata of a GGUF file: sizes, rotary embedding and tokenizer, written from transformers' configuration.

Where the base is a GGUF file itself, its own metadata is taken over, because nothing describes it better. What
llama.cpp computes otherwise than the model was trained is refused, or said. Names: `docs/gguf.md` of the ggml project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grpo.errors import UserError
from grpo.export.gguf_gemma4 import add_gemma4
from grpo.export.gguf_vocab import read_vocabulary
from grpo.model.decoder_config import DecoderConfig
from grpo.model.gguf_config import attention_scale, frequency_divisors, value
from grpo.model.gguf_source import GGUFSource
from grpo.model.meta_graph import graph_tensors
from grpo.model.weight_source import Source

ARCHITECTURE = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "phi3": "phi3",
    "qwen3_5_text": "qwen35",
    "lfm2": "lfm2",
}
"""transformers' `model_type` to llama.cpp's name of the computation."""
WINDOWED = {"gemma2": 2, "gemma3_text": 6}
"""Families in which llama.cpp gives every layer a sliding window, but for one in so many, which sees everything."""
WITHOUT_HEAD = ("gemma", "gemma2", "gemma3_text")
"""Families for which llama.cpp takes the embedding as output head."""
BOS_BY_DEFAULT = ("llama3", "llama-v3", "llama-bpe", "tekken")
"""Splitting rules with which llama.cpp starts a text with that token unless the file says otherwise."""
NOT_COPIED = ("general.architecture", "general.type", "general.file_type", "general.quantization_version",
              "general.name", "general.alignment", "tokenizer.chat_template", "split.")  # fmt: skip


def add_from_config(writer: Any, config: DecoderConfig, notice: Callable[[str], None]) -> dict[str, Tensor]:
    """Add sizes and rotary embedding of transformers' `config`; the tensors that belong to them, by name.

    Raises UserError for what llama.cpp would compute otherwise.
    """
    if config.model_type == "gemma4_text":
        return add_gemma4(writer, config)
    check_computed_alike(config, notice)
    head = head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "lfm2":
        add_short_convolutions(writer, config)
    else:
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type == "qwen3_5_text":
        add_delta_net(writer, config)
    if config.model_type in WINDOWED:
        writer.add_sliding_window(config.sliding_window)
    elif config.model_type == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, cap, None) is not None:
            getattr(writer, f"add_{cap}")(getattr(config, cap))
    return add_rotary(writer, config, head)


def add_short_convolutions(writer: Any, config: DecoderConfig) -> None:
    """What LFM2 says of its layers: those without heads of keys are convolutions."""
    kinds = config.layer_types
    writer.add_feed_forward_length(graph_tensors(config).linears["model.layers.0.feed_forward.w1"].rows)
    writer.add_head_count_kv([0 if kind == "conv" else config.num_key_value_heads for kind in kinds])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_shortconv_l_cache(config.conv_L_cache)


def add_delta_net(writer: Any, config: DecoderConfig) -> None:
    """What Qwen 3.5 says of its layers: all but one in so many are gated DeltaNet.

    The sections are those of positions in an image; of text all parts have the same.
    """
    writer.add_ssm_conv_kernel(config.linear_conv_kernel_dim)
    writer.add_ssm_state_size(config.linear_key_head_dim)
    writer.add_ssm_group_count(config.linear_num_key_heads)
    writer.add_ssm_time_step_rank(config.linear_num_value_heads)
    writer.add_ssm_inner_size(config.linear_num_value_heads * config.linear_value_head_dim)
    writer.add_full_attention_interval(full_attention_interval(config))
    writer.add_rope_dimension_sections([*config.rope_parameters.get("mrope_section", (11, 11, 10)), 0])


def full_attention_interval(config: DecoderConfig) -> int | None:
    """In how many layers one is full attention, the last of them; None where it is not so."""
    kinds = list(config.layer_types)
    every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    usual = ["linear_attention" if number % every else "full_attention" for number in range(1, len(kinds) + 1)]
    return every if kinds == usual else None


def head_size(config: DecoderConfig) -> int:
    """Dimensions of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_computed_alike(config: DecoderConfig, notice: Callable[[str], None]) -> None:
    """Raise UserError for a variant that llama.cpp has not; say where long texts are attended otherwise."""
    family, layers = config.model_type, config.num_hidden_layers
    if family in WITHOUT_HEAD and not config.tie_word_embeddings:
        raise UserError(f"llama.cpp has no {family} with an output head of its own; export merged-16bit instead")
    if getattr(config, "query_pre_attn_scalar", None) not in (
        None,
        attention_scale(config) if family in WINDOWED else 0,
    ):
        raise UserError(f"llama.cpp has no {family} with this query_pre_attn_scalar; export merged-16bit instead")
    if family == "qwen3_5_text":
        if full_attention_interval(config) is None:
            raise UserError("llama.cpp has no Qwen 3.5 with these layer_types; export merged-16bit instead")
        if config.linear_key_head_dim != config.linear_value_head_dim:
            raise UserError(
                "llama.cpp has no Qwen 3.5 with values of another size than keys; export merged-16bit instead"
            )
    if getattr(config, "conv_bias", False):
        raise UserError(f"llama.cpp has no {family} with biases of convolutions; export merged-16bit instead")
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if family in WINDOWED:
        period = WINDOWED[family]
        usual = ["full_attention" if number % period == 0 else "sliding_attention" for number in range(1, layers + 1)]
        if kinds != usual:
            raise UserError(f"llama.cpp has no {family} with these layer_types; export merged-16bit instead")
    elif window and (kinds is None or "sliding_attention" in kinds):
        notice(f"llama.cpp attends to the whole text; this model was trained to see its last {window} tokens")


def add_rotary(writer: Any, config: DecoderConfig, head: int) -> dict[str, Tensor]:
    """Add the rotary embedding; the tensors in which llama.cpp keeps scaled frequencies, by name."""
    from gguf import RopeScalingType

    everywhere = config.rope_parameters
    rope = everywhere.get("full_attention", everywhere)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in everywhere:
        writer.add_rope_freq_base_swa(everywhere["sliding_attention"]["rope_theta"])
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {"rope_freqs.weight": frequency_divisors(config)}
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        add_yarn(writer, rope, config.max_position_embeddings)
    elif kind == "longrope":
        return add_longrope(writer, rope, config)
    elif kind != "default":
        raise UserError(f"llama.cpp has no rotary scaling {kind!r}; export merged-16bit instead")
    return {}


def add_yarn(writer: Any, rope: dict[str, Any], longest: int) -> None:
    from gguf import RopeScalingType

    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings") or longest)
    optional = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
    for ours, theirs in optional.items():
        if rope.get(ours) is not None:
            getattr(writer, f"add_rope_scaling_yarn_{theirs}")(rope[ours])


def add_longrope(writer: Any, rope: dict[str, Any], config: DecoderConfig) -> dict[str, Tensor]:
    """Phi-3's two lists of divisors, for texts within and beyond the original length."""
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    _, attention_factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(attention_factor)
    return {
        f"rope_factors_{length}.weight": torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
        for length in ("long", "short")
    }


def add_from_gguf(writer: Any, reader: Any) -> None:
    """Take over the metadata of the GGUF file in gguf's `reader`, but for name, type and chat template."""
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key.startswith(NOT_COPIED):
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)


def add_tokenizer(writer: Any, tokenizer: Any, config: DecoderConfig) -> None:
    """Add the vocabulary of transformers' `tokenizer`. Raises UserError where llama.cpp has no equal of it."""
    read_vocabulary(tokenizer, config.vocab_size).write(writer)


def starts_with_bos(base: Source, tokenizer: Any) -> bool:
    """Whether llama.cpp will put the beginning-of-sequence token before a text, by the metadata written here."""
    if isinstance(base, GGUFSource):
        said, model, pre = (value(base.reader, f"tokenizer.ggml.{key}") for key in ("add_bos_token", "model", "pre"))
        return bool(said) if said is not None else model == "llama" or pre in BOS_BY_DEFAULT
    return tokenizer is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
