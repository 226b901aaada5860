"""The report as an HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_contmerge.report._findings import METRICS, UNITS, badge, caption, headline, verdict
from hf_contmerge.report._panels import drawn_lines
from hf_contmerge.report._results import Results
from hf_contmerge.report._tables import Picture, Section, answer_table
from hf_contmerge.report._templates import fill
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import recipe_yaml


def pages(run: Run, results: Results, panels: Sequence[Picture], sections: Sequence[Section]) -> dict[str, str]:
    """Return the report for browsers, whole in itself, and as Markdown."""
    values = _values(run, results, sections)
    lines = [(line.number, line.colour, line.label) for line in drawn_lines(results)]
    return {
        "index.html": fill("page.html", panels=panels, choice=lines, **values),
        "report.md": fill("report.md", **values),
    }


def _values(run: Run, results: Results, sections: Sequence[Section]) -> dict[str, Any]:
    lines = [{"name": x.name, "badge": badge(results, x), "verdict": verdict(results, x)} for x in results.merges]
    return {
        "run": run.recipe,
        "headline": headline(results),
        "caption": caption(results),
        "answer": answer_table(results),
        "lines": lines,
        "sections": sections,
        "metrics": METRICS.values(),
        "units": UNITS,
        "recipe": recipe_yaml(run.recipe),
    }
