"""Drop-in layers, a file a paper."""
