"""Reading a model's weights, from safetensors or GGUF, into the one copy that both graphs use."""
