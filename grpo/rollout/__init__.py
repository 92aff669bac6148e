"""Sampling with vLLM. Nothing outside this package knows vLLM's insides."""
