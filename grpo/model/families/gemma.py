"""Gemma 1 to 3: RMSNorm multiplies by its weight plus one, and the MLP's activation is GELU.

Gemma 4: plain norms. Heads of another size in its full layers; in some sizes an embedding for each layer, layers that
attend to the keys and values of an earlier one, or values that are the keys before their norm and rotation.
"""

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
        blind="tokens of an image see each other in both directions there, and attention here is causal",
    ),
    "gemma4_text": Family(
        models="Gemma 4 E2B, E4B, 12B and 31B, the text of those that take images and sound",
        caveat="no kernels of ours for its layers yet; its mixture of experts (26B-A4B) is refused",
        vllm_class="Gemma4ForCausalLM",
        activation=("hidden_activation", ("gelu_pytorch_tanh",)),
        needs_window=True,
        layers_differ=True,
    ),
    "gemma3n_text": Family(
        unserved="Gemma 3n keeps several streams between its layers (AltUp), adds low-rank products to its residuals "
        "(Laurel), and has an embedding for each layer; use Gemma 4, whose E2B and E4B are its successors"
    ),
    "gemma4_unified_text": Family(text_as="gemma4_text", text_values={"hidden_size_per_layer_input": 0}),
}
