"""Every notebook runs from its first cell to its last, and its stored outputs are of the same kinds."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from toys import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)


def outputs(notebook: Any) -> list[Any]:
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def kinds(notebook: Any) -> list[str]:
    """Return the richest form of each shown value; printed lines depend on the machine."""
    shown = [set(output.get("data", ())) - {"text/plain"} for output in outputs(notebook)]
    return ["".join(sorted(forms)) for forms in shown if forms]


@each
def test_notebook_has_real_outputs(path: Path) -> None:
    """Stored outputs show results: no error, no warning, no path of the machine that made them."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert outputs(notebook)
    for output in outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
    assert "/tmp/" not in path.read_text()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@each
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"notebook-{path.stem}"
    folder.mkdir()
    monkeypatch.setenv("CONTMERGE_NOTEBOOK_FOLDER", str(folder))
    notebook = nbformat.read(path, as_version=4)
    stored = kinds(notebook)
    NotebookClient(notebook, timeout=1500, resources={"metadata": {"path": str(folder)}}).execute()
    assert kinds(notebook) == stored
    if path.stem == "quickstart_in_miniature":
        assert any(o.get("text", "").startswith("touched: []") for o in outputs(notebook)), "a record was touched"
