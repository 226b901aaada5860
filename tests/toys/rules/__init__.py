"""Merge rules for tests; `installed` makes them words of recipes."""

from pathlib import Path

import pytest

from hf_contmerge import merge_rules
from hf_contmerge.merge_rules import get_rule, rule_names

PLAIN = [name for name in rule_names() if not get_rule(name).needs]
"""The package's rules that merge experts without statistics."""


def tolerance(name: str) -> float:
    """Return the error of a float32 merge that is rounding, as a share of the change.

    The state of `covariance` holds squares of the changes: small directions have half the digits.
    """
    return 1e-4 if name == "covariance" else 1e-5


def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the rules in this folder stand among the package's own until the test ends."""
    monkeypatch.setattr(merge_rules, "__path__", [*merge_rules.__path__, str(Path(__file__).parent)])
