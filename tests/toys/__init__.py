"""What tests share: tiny real models, adapters, recipes and runs, and a Hub on this machine."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
