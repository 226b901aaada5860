"""Checks and estimates a run before it starts."""
