"""Forgetting with confidence intervals; budgets and searches based on it."""
