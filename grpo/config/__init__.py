"""The configuration of a run: its schema, TOML, and what is said of a mistake in it."""
