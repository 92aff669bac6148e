"""What several benchmarks share: models, rows of results, clocks, processes."""
