"""Several processes, one GPU each, as one run."""
