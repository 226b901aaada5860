"""What a run asks for, and what of it is on disk."""
