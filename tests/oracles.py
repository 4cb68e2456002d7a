"""Brute-force references that several tests judge by: slow, obvious, in float64."""
