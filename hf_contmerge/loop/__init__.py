"""Runs train, merge and score, stage after stage."""
