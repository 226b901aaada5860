"""Tables in the terminal."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hf_contmerge.report._tables import Table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_WORD = 12  # characters; longer words may be broken


def rich_table(table: Table) -> RichTable:
    """Return a terminal table. Narrow ones break lines, never numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table as RichTable
    from rich.text import Text

    rich = RichTable(title=escape(table.title), title_justify="left", box=SIMPLE_HEAD, padding=0, show_edge=False)
    for i, name in enumerate(table.header):
        longest = max((len(word) for cells in table.rows for word in cells[i].text.split()), default=0)
        rich.add_column(
            escape(re.sub("[ _]", "\n", name)),
            justify="right" if i else "left",
            overflow="fold",
            min_width=min(longest, _WORD),
        )
    for cells in table.rows:
        rich.add_row(*(Text(cell.text, {"up": "green", "down": "red"}.get(cell.way, "")) for cell in cells))
    return rich
