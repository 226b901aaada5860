"""Tables for notebooks."""

from pathlib import Path

from hf_contmerge.merging.state import MergeState
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.html import html_table
from hf_contmerge.scoring.forgetting.matrix import ScoreMatrix


def test_cells_are_escaped_and_missing_values_are_empty() -> None:
    table = html_table("<b>", ["a&b"], [["<script>", None, 0.12345, 3]])
    assert "<script>" not in table
    assert "<caption>&lt;b&gt;</caption>" in table
    assert "<th>a&amp;b</th>" in table
    assert "<td></td><td>0.123</td><td>3</td>" in table


def test_a_matrix_names_its_stages() -> None:
    html = ScoreMatrix(("law", "code"), ((0.5, None), (0.75, 0.25), (0.5, 1.0)))._repr_html_()
    assert "<td>after code</td><td>0.500</td><td>1.000</td>" in html
    assert "<td>base</td><td>0.500</td><td></td>" in html


def test_a_state_lists_its_experts(base_folder: Path, expert_folders: tuple[Path, ...], tmp_path: Path) -> None:
    state = MergeState.create(tmp_path / "state", base=base_folder, rule="average")
    assert "<tbody></tbody>" in state._repr_html_()
    assert "<td>expert1</td>" in state.add(expert_folders[0])._repr_html_()


def test_a_run_marks_what_is_done(tmp_path: Path) -> None:
    data = {"name": "x", "base_model": "b", "stages": [{"name": "s", "dataset": "s.jsonl"}], "merge": ["magmax"]}
    run = Run.open(parse_recipe(data), tmp_path / "run")
    assert "<td>00-base</td><td></td><td></td><td></td>" in run._repr_html_()
    run.base.finish("score", {})
    assert "<td>00-base</td><td></td><td></td><td>done</td>" in run._repr_html_()
