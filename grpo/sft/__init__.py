"""Supervised fine-tuning on the same graph: `python -m grpo.sft`."""
