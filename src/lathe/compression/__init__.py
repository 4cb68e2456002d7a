"""A trained network in, a smaller one out."""
