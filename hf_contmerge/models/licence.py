"""Licences named by READMEs."""

from __future__ import annotations

from pathlib import Path

import yaml

from hf_contmerge.runtime.foreign import parse_yaml, read_text


def readme_license(readme: Path | None) -> str | None:
    """Return the licence in a README's front matter, if any."""
    try:
        front = read_text(readme).partition("---")[2].partition("\n---")[0] if readme else ""
        facts = parse_yaml(front)
    except (OSError, ValueError, yaml.YAMLError):  # no README, or another text
        return None
    named = facts.get("license") if isinstance(facts, dict) else None
    return ", ".join(map(str, named)) if isinstance(named, list) else named and str(named)
