"""Qwen 2 and 3, and the text decoders of Qwen's vision models.

For text alone the three rows of a vision model's positions are equal, and turning by them is the plain rotation: the
decoder is that of the text model.
"""

from grpo.model.families.family import Family

SILU = ("hidden_act", ("silu",))

FAMILIES = {
    "qwen2": Family(
        models="Qwen 2 and 2.5, the text of Qwen2-VL and Qwen2.5-VL",
        caveat="a sliding window in all layers or in none",
        activation=SILU,
        head_of_hidden_size=True,
        window_in_all_or_none=True,
        fused_layers=True,
    ),
    "qwen3": Family(
        models="Qwen 3, the text of Qwen3-VL",
        caveat="a sliding window in all layers or in none",
        activation=SILU,
        window_in_all_or_none=True,
        fused_layers=True,
    ),
    "qwen2_5_vl_text": Family(text_as="qwen2", sees="chunks"),
    "qwen2_vl_text": Family(text_as="qwen2", sees="chunks"),
    "qwen3_vl_text": Family(text_as="qwen3", sees="interleaved"),
}
