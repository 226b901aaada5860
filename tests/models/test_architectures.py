"""What we read is what `from_pretrained` reads: architectures x storage layouts, against a merge by hand in float64."""

import re
from pathlib import Path

import pytest
from toys import ROOT
from toys.architectures import ARCHITECTURES, LAYOUTS, Tiny, try_cell

SAMPLE = ("LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM", "BertForMaskedLM", "Lfm2ForCausalLM")
"""In the default suite; the layouts in which each has something of its own."""
CELLS = {
    "LlamaForCausalLM": ("shards", "stale files"),
    "GPT2LMHeadModel": ("without prefix", "old buffers", "table twice", "own head", "own heads", "base's own head"),
    "MixtralForCausalLM": ("one file", "stacked expert", "stacked base"),
    "BertForMaskedLM": ("one file",),
    "Lfm2ForCausalLM": ("one file",),
}
BY_NAME = {tiny.name: tiny for tiny in ARCHITECTURES}
MAY_BE_REFUSED = {"own head": "one stored table cannot hold two"}


def check(tiny: Tiny, layout: str, folder: Path) -> None:
    cell = try_cell(tiny, layout, folder)
    assert cell.outcome in ("equal", "none", "refused"), cell.words
    if cell.outcome == "refused":
        assert layout in MAY_BE_REFUSED, cell.words
        assert MAY_BE_REFUSED[layout] in cell.words
        assert not (folder / "merged").exists()


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for name in SAMPLE for layout in CELLS[name]])
def test_sample(name: str, layout: str, tmp_path: Path) -> None:
    check(BY_NAME[name], layout, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tiny", ARCHITECTURES, ids=lambda tiny: tiny.name)
def test_matrix(tiny: Tiny, layout: str, tmp_path: Path) -> None:
    check(tiny, layout, tmp_path)


def test_the_page_lists_the_suite() -> None:
    """docs/architectures.md is written by tests/benchmarks/architectures.py."""
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == BY_NAME.keys()
    assert len(BY_NAME) >= 30
    for layout in LAYOUTS:
        assert f"- {layout}: " in page
