"""Recipes: fields, parsing, and consequences of changes."""
