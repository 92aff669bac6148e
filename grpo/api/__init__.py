"""`grpo.load` and what it gives: the Python interface."""
