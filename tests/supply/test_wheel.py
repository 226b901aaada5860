"""The built wheel in a clean environment: what it holds, and that it runs without the checkout.

The dependencies are those of the environment of the tests: only the package itself is installed.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from toys import ROOT
from toys.models import TEXT, toy_llama, write_jsonl

import hf_contmerge

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out], cwd=ROOT, check=True)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an environment with the wheel, that finds the dependencies in ours."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(pip, check=True, env=_environment())
    (site,) = home.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"))  # a path alone: no .pth file in it is read
    return home


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def call(home: Path, folder: Path, *words: str | Path, python: bool = False) -> str:
    """Run a command of the environment far from the checkout, without a warning; return what it prints."""
    program = home / "bin" / ("python" if python else "contmerge")
    done = subprocess.run(
        [program, *words], cwd=folder, env=_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    return done.stdout


def test_wheel_has_its_files_and_facts(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = (name for name in names if name.endswith("METADATA"))
        facts = archive.read(info).decode()
    assert {"hf_contmerge/py.typed", "hf_contmerge/recipes/quickstart.yml", "hf_contmerge/docs/recipe.md"} <= names
    assert "hf_contmerge/recipes/accelerate/fsdp2.yaml" in names
    assert {name.split("/")[0] for name in names} == {"hf_contmerge", info.split("/")[0]}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    for line in ("Author: ", "License-Expression: Apache-2.0", "Requires-Python: >=3.11", "Project-URL: Homepage, ",
                 "Project-URL: Documentation, ", "Classifier: Programming Language :: Python :: 3.14",
                 "Classifier: Typing :: Typed"):  # fmt: skip
        assert line in facts
    links = re.findall(r"\]\(([^)]+)\)", facts)
    assert f"{PROJECT['urls']['Homepage']}/blob/main/docs/rules.md" in links
    assert f"{PROJECT['urls']['Homepage']}/raw/main/notebooks/forgetting.png" in links
    assert [link for link in links if not link.startswith("https://")] == []


def test_classifiers_exist() -> None:
    """An unknown one is refused by PyPI at the upload."""
    from trove_classifiers import classifiers

    assert [name for name in PROJECT["classifiers"] if name not in classifiers] == []


def test_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == hf_contmerge.__version__
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "message", "type", "repository-code", "abstract", "keywords"} <= set(citation)


@pytest.mark.slow
def test_the_installed_command_copies_examples_and_runs(home: Path, tmp_path: Path) -> None:
    where = call(home, tmp_path, "-c", "import hf_contmerge; print(hf_contmerge.__file__)", python=True)
    assert Path(where.strip()).is_relative_to(home)
    assert call(home, tmp_path, "--version") == f"contmerge {hf_contmerge.__version__}\n"
    call(home, tmp_path, "example", "copy", "finance")
    assert (tmp_path / "finance.yml").read_text() == (ROOT / "recipes/finance.yml").read_text()
    schema = json.loads(call(home, tmp_path, "schema"))
    assert schema["properties"]["base_model"]["description"]
    toy_llama(tmp_path / "base", seed=0)
    lines = TEXT.strip().splitlines()
    for stage in ("law", "code"):
        write_jsonl(tmp_path / f"{stage}.jsonl", [{"text": f"{stage} {i}: {lines[i % 5]}"} for i in range(48)])
    words = [word for stage in ("law", "code") for word in ("--stage", f"{stage}={stage}.jsonl")]
    call(home, tmp_path, "new", "toy.yml", "--base", "base", *words, "--gpus", "0")
    sets = [word for text in ("evaluate.general_tasks=[]", "train.max_steps=2") for word in ("--set", text)]
    assert "All checks passed" in call(home, tmp_path, "plan", "toy.yml", *sets)
    call(home, tmp_path, "run", "toy.yml", *sets)
    assert json.loads(call(home, tmp_path, "status", "--json"))["complete"]
    assert (tmp_path / "runs/toy/report/index.html").is_file()
