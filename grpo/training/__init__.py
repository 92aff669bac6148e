"""GRPO itself: advantages, losses, micro-batches, the optimiser, and the loop around them."""
