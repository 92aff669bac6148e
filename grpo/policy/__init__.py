"""The training graph: transformers' model over the shared weights, with LoRA, packed rows and fused layers."""
