"""What a network will do, before it is trained."""
