"""The report as an HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_contmerge.report._findings import METRICS, UNITS, badge, caption, headline, verdict
from hf_contmerge.report._results import Results
from hf_contmerge.report._tables import Picture, Section
from hf_contmerge.report._templates import fill
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import recipe_yaml


def page(run: Run, results: Results, panels: Sequence[Picture], sections: Sequence[Section]) -> str:
    """Return index.html, whole in itself."""
    return fill("page.html", panels=panels, **_values(run, results, sections))


def markdown(run: Run, results: Results, sections: Sequence[Section]) -> str:
    """Return report.md."""
    return fill("report.md", **_values(run, results, sections))


def _values(run: Run, results: Results, sections: Sequence[Section]) -> dict[str, Any]:
    lines = [{"name": x.name, "badge": badge(results, x), "verdict": verdict(results, x)} for x in results.merges]
    return {
        "run": run.recipe,
        "headline": headline(results),
        "caption": caption(results),
        "lines": lines,
        "sections": sections,
        "metrics": METRICS.values(),
        "units": UNITS,
        "recipe": recipe_yaml(run.recipe),
    }
