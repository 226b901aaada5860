"""Trains one expert with TRL; resumable."""
