"""Scores models with lm-eval on all ranks; compares them document by document."""
