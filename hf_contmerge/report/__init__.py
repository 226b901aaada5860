"""Presents a run: page, pictures, model card, Hub."""
