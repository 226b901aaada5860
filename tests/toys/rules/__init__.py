"""Merge rules for tests; `installed` makes them words of recipes."""

from pathlib import Path

import pytest

from hf_contmerge import merge_rules


def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the rules in this folder stand among the package's own until the test ends."""
    monkeypatch.setattr(merge_rules, "__path__", [*merge_rules.__path__, str(Path(__file__).parent)])
