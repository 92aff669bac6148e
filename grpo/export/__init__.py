"""A trained adapter in the forms that other programs read."""
