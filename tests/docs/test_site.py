"""The documentation site builds without a warning; pages from tables say what was measured."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from toys import ROOT

from hf_contmerge.merge_rules import rule_names
from hf_contmerge.train_strategies import strategy_names

REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Homepage"]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/_hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=quiet)
    assert (done.returncode, done.stderr) == (0, "")
    for folder, names in (("rules", rule_names()), ("strategies", strategy_names())):
        for name in names:
            page = (tmp_path / "site" / folder / name / "index.html").read_text()
            assert "Measured effect" in page
    assert json.loads((tmp_path / "site/contmerge.schema.json").read_text())["properties"]["base_model"]
    assert "fonts.googleapis.com" not in (tmp_path / "site/index.html").read_text()
    found = json.loads((tmp_path / "site/search/search_index.json").read_text())["docs"]
    text = " ".join(page["text"] for page in found).lower()
    for words_ in ("continued pretraining of an instruct model", "chat template is lost", "catastrophic forgetting"):
        assert words_ in text


@pytest.mark.parametrize(("page", "names"), [("rules", rule_names()), ("strategies", strategy_names())])
def test_measured_effects_are_those_of_the_figures(hooks: ModuleType, page: str, names: tuple[str, ...]) -> None:
    """A page shows each row of figures.md about its name, or says that nothing was measured."""
    figures = (ROOT / "docs/figures.md").read_text()
    for name in names:
        text = hooks.method_page(page, name)
        effect = text.split("## Measured effect")[1].split("\n## ")[0]
        assert ("Not measured yet" in effect) == ("From [" not in effect)
        for row in re.findall(r"^\| (?!-).*", effect, flags=re.M):
            if "published" not in effect:
                assert row.split(" | ", 1)[1].split(" | ")[-1].strip("| ") in figures
    measured = {name for name in names if "From [" in hooks.method_page(page, name).split("## Cost")[0]}
    assert (
        measured
        == {
            "rules": {*rule_names()},
            "strategies": {*strategy_names()} - {"qlora", "low_perplexity"},
        }[page]
    )


def test_sections_of_effects_exist(hooks: ModuleType) -> None:
    headings = re.findall(r"^#+ (.+)$", (ROOT / "docs/figures.md").read_text(), flags=re.M)
    assert set(hooks.EFFECT) <= set(headings)


def test_the_address_of_the_project_is_one() -> None:
    owner = REPOSITORY.removeprefix("https://github.com/")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == REPOSITORY
    assert f"repo_url: {REPOSITORY}\n" in (ROOT / "mkdocs.yml").read_text()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        address = f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{notebook.name}"
        assert f"({address})" in "".join(json.loads(notebook.read_text())["cells"][0]["source"])
