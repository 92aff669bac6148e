"""The memory of a run by arithmetic, before anything is loaded."""
