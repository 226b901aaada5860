"""Folds experts into one model at constant memory."""
