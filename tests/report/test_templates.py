"""Names and texts stay texts, whatever markup they hold, in pages, Markdown and model cards."""

import re
from html.parser import HTMLParser

import pytest
from toys.reports import NASTY

from hf_contmerge.report._tables import Cell, Picture, Quote, Section, Table
from hf_contmerge.report._templates import code_span, escape_markdown, fenced, fill

SECTION = Section(
    NASTY,
    NASTY,
    tables=[Table(NASTY, (NASTY, "b"), [[Cell(NASTY), Cell("`1`|\n2", NASTY, -2.0, marked=True)]])],
    quotes=[Quote(NASTY, f"# {NASTY}\n\n- {NASTY}", NASTY)],
    pictures=[Picture("<svg></svg>", NASTY)],
)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b|c", r"a\_b\|c"),
        ("# no heading", r"\# no heading"),
        ("#1 of all", r"\#1 of all"),
        ("- no item", r"\- no item"),
        ("1. no item", r"1\. no item"),
        ("12) no item", r"12\) no item"),
        ("-0.5 nats", "-0.5 nats"),
        ("1.5 nats", "1.5 nats"),
        ("a\n# b", "a # b"),
        ("<b> &lt;b> [x](y) ![x](y)", r"\<b\> \&lt;b\> \[x\](y) !\[x\](y)"),
    ],
)
def test_markdown_is_escaped(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped
    assert escape_markdown(escape_markdown(text)) == escaped, "what is markup already stays"


def test_code_is_closed_by_us_alone() -> None:
    assert code_span("a`b``c") == "``` a`b``c ```"
    assert code_span("a_b") == "`a_b`"
    assert fenced("a: |\n  ```\n", "yaml") == "````yaml\na: |\n  ```\n````"


def test_a_page_of_nasty_names() -> None:
    class Names(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.texts = set(), []

        def handle_starttag(self, tag, attrs):
            self.seen.add(tag)
            self.texts += [value for name, value in attrs if name in ("aria-label", "title")]

        def handle_data(self, data):
            self.texts.append(data)

    names = Names()
    names.feed(fill("compare.html", title=NASTY, findings=[NASTY], sections=[SECTION]))
    assert "script" not in names.seen
    assert names.texts.count(NASTY) == 12
    assert f"# {NASTY} - {NASTY}" in names.texts


def test_markdown_of_nasty_names() -> None:
    text = fill("compare.md", title=NASTY, findings=[NASTY], sections=[SECTION])
    assert not re.search(r"(?<!\\)<script", text)
    assert not re.search(r"(?<!\\)\*bold", text)
    assert [line[:4] for line in text.splitlines() if line.startswith("#")] == ["# \\<", "## \\", "### "]
    *_, head, rule, row = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, row)} == {3}
    assert row.endswith(r"| **\`1\`\| 2** |")
