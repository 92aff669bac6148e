"""A trained adapter in the formats that other programs read."""
