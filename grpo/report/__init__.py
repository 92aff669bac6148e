"""The report of a run, or of several compared, as one HTML file."""
