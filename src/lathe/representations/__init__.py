"""What networks learnt: alignment, relative spaces, codes."""
