"""Families of models that are exceptions, and those that are tested: one short file for each kind."""
