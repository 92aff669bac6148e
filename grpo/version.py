"""The version of the project, which `pyproject.toml` and the records of runs take from here."""

__version__ = "0.1.0"
