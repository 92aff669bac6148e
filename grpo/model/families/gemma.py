"""Gemma 1 to 3: RMSNorm multiplies by its weight plus one, and the MLP's activation is GELU."""

from grpo.model.families.family import Family

FAMILIES = {
    "gemma": Family(
        models="Gemma",
        activation=("hidden_act", ("gelu_pytorch_tanh",)),
        always_tied=True,
        fused_layers=True,
        norm_adds_one=True,
    ),
    "gemma2": Family(
        models="Gemma 2",
        caveat="vLLM refuses float16",
        activation=("hidden_activation", ("gelu_pytorch_tanh",)),
        always_tied=True,
        needs_window=True,
        fused_layers=True,
        norm_adds_one=True,
    ),
    "gemma3_text": Family(
        models="Gemma 3, the text of those that take images too",
        caveat="vLLM refuses float16",
        vllm_class="Gemma3ForCausalLM",
        activation=("hidden_activation", ("gelu_pytorch_tanh", "gelu", "silu")),
        needs_window=True,
        fused_layers=True,
        norm_adds_one=True,
    ),
}
