"""Recipes, and the state of runs on disk."""
