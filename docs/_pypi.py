"""The README as PyPI shows it: links into the checkout become addresses.

Hatchling calls this when it builds a package.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]+)\)")


class ReadmeHook(MetadataHookInterface):
    """Sets `readme` of the package's metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the readme to pyproject.toml's fields."""
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_addresses(text, metadata["urls"]["Homepage"]),
        }


def with_addresses(text: str, home: str) -> str:
    """Return Markdown whose relative links lead to the repository at `home`."""

    def address(link: re.Match[str]) -> str:
        mark, words, path = link.groups()
        return f"{mark}[{words}]({home}/{'raw' if mark else 'blob'}/main/{path})"

    return _LINK.sub(address, text)
