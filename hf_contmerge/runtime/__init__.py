"""Ranks, threads, devices, atomic files."""
