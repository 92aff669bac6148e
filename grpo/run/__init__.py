"""What a run keeps: its folder, records, checkpoints and state, what it ran on, and how it is ended."""
