"""What notebooks show of runs, matrices and states."""

from html.parser import HTMLParser
from pathlib import Path

from toys.models import perturbed, toy_llama
from toys.reports import NASTY, Page, make_run

from hf_contmerge.merging.state import MergeState
from hf_contmerge.runtime.notebook import html_table
from hf_contmerge.scoring.forgetting.matrix import ScoreMatrix


def cells(html: str) -> list[str]:
    """Return the cells of a page whose tags are closed in order."""
    page, found = Page(), []
    page.feed(html)
    assert page.open == []
    reader = HTMLParser()
    reader.handle_data = found.append  # type: ignore[method-assign]
    reader.feed(html)
    return found


def test_a_run_shows_its_phases(tmp_path: Path) -> None:
    html = make_run(tmp_path / "run", stages=2, done=1, merge=["magmax"])._repr_html_()
    text = cells(html)
    assert "not complete" in text[0]
    assert text[text.index("01-s1/merges/magmax") + 1 :][:2] == ["✓", "✓"]
    assert not any(word.startswith("02-") for word in text)


def test_a_matrix_shows_its_rows() -> None:
    matrix = ScoreMatrix(("law", NASTY), ((0.25, None), (0.5, 0.125)))
    text = cells(matrix._repr_html_())
    assert text[-6:] == ["base", "0.25", "–", "1. law", "0.5", "0.125"]
    assert NASTY in text


def test_a_state_shows_its_experts(tmp_path: Path) -> None:
    base = toy_llama(tmp_path / "base", seed=0)
    perturbed(base, tmp_path / "law", seed=1, size=0.01)
    state = MergeState.create(tmp_path / "state", base=base, rule="magmax")
    assert "magmax on" in cells(state._repr_html_())[0]
    state.add(tmp_path / "law")
    assert {"law", str(tmp_path / "law"), "model", "1"} <= set(cells(state._repr_html_()))


def test_values_are_escaped_and_hold_no_secrets() -> None:
    token = "hf_" + "a" * 34
    html = html_table(NASTY, [NASTY], [[f"{token} \x1b[2J"]])
    assert "<script" not in html
    assert token not in html
    assert "\x1b" not in html
