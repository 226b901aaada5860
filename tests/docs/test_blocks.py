"""Every block of README and docs/ is run, page by page, in a folder of toys; those that say `not run` are parsed.

`tests/test_readme.py` parses all commands, recipes and programs, also of the blocks that are run here.
"""

import io
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys.pages import PAGES, QUIZ, README, Block, blocks_of, make_world, not_run, smaller

from hf_contmerge.commands.main import main

INSTALLERS = {"make", "pip"}
"""They change the environment of the tests; `.ci/run` gives `make`, tests/supply/test_wheel.py installs."""
BEFORE = {
    "first-merge": ["rm -r runs"],
    "clusters": ["contmerge merge init state --base Qwen/Qwen3-0.6B --rule magmax"],
    "measuring": ["contmerge merge from-recipe recipes/magmax.yml out"],
    "runs": ["contmerge merge Qwen/Qwen3-0.6B owner/law owner/medicine --rule magmax -o merged"],
    "study": ["sed '/^stages:/a - {name: code, dataset: {path: data/code.jsonl, heldout: 3}}' mine.yml > recipe.yml"],
    "training-elsewhere": ["rm -r experts"],
    "using": ["contmerge merge Qwen/Qwen3-0.6B owner/law owner/medicine --rule magmax -o merged"],
}
"""What a page takes for granted, from the README or other pages."""
LANGUAGES = {"", "bash", "json", "python", "text", "toml", "yaml"}


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda p: p.stem)
def test_reasons_are_reasons(page: Path) -> None:
    """Languages are known, a recipe to save is a whole one, and `not run` has a reason of several words."""
    for block in blocks_of(page):
        assert block.language in LANGUAGES
        for line in block.text.splitlines():
            reason = not_run(line)
            assert "not run" not in line or (reason and len(reason.split()) >= 2), line


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of toys with two finished runs, made as the README says."""
    folder = tmp_path_factory.mktemp("world")
    make_world(folder)
    (recipe,) = (block.text for block in blocks_of(README) if block.file == "mine.yml")
    (folder / "mine.yml").write_text(smaller(recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["run", "mine.yml"]) == 0
        assert main(["run", "mine.yml", "--run", "runs/other", "--set", "merge.0=ema"]) == 0
        _quickstart(folder)
    return folder


def _quickstart(folder: Path) -> None:
    """Make a run with the quickstart's name: a copy, with toys as its experts and a copy of a task of ours."""
    run = folder / "runs/quickstart"
    shutil.copytree(folder / "runs/mine", run, symlinks=True)
    for stage, expert in (("01-bible", "law"), ("02-pydocs", "medicine"), ("03-recipes", "law-expert")):
        for kind in ("base", "previous"):
            shutil.copytree(folder / "owner" / expert, run / "stages" / stage / "experts" / kind / "expert")
    for file in sorted((run / "tasks").glob("law_heldout*")):
        copy = file.with_name(file.name.replace("law_", "bible_"))
        shutil.copy(file, copy)
        if copy.suffix == ".yaml":
            copy.write_text(
                copy.read_text().replace("law_heldout", "bible_heldout").replace("runs/mine", "runs/quickstart")
            )


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first merge trains a real model
@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda p: p.stem)
def test_blocks_run(page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = blocks_of(page)
    if not any(block.language in {"bash", "python"} or block.file for block in blocks):
        return
    monkeypatch.setenv("BROWSER", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a tort?\n"))  # for `contmerge chat`, as from a pipe
    for language in ("bash", "python"):  # the same in the shell and in Python: in a folder each
        home = tmp_path / f"docs-{page.stem}-{language}"
        shutil.copytree(world, home, symlinks=True)
        monkeypatch.chdir(home)
        names: dict[str, object] = {"__name__": "__main__"}
        for line in BEFORE.get(page.stem, ()):
            _run_command(line, "before")
        for block in blocks:
            if block.file:
                _save(block, home / block.file)
            elif block.language == language and block.reason is None:
                _run(block, names)


def _save(block: Block, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_recipe = block.language == "yaml" and "base_model:" in block.text and "\nrecipe:" not in block.text
    path.write_text(smaller(block.text) if is_recipe else block.text)


def _run(block: Block, names: dict[str, object]) -> None:
    where = f"{block.page.name}, block {block.number}"
    if block.language == "python":
        text = block.text.replace("max_steps=500", "max_steps=2").replace('["arc_easy"]', f"[{QUIZ}]")
        exec(compile(text, where, "exec"), names)
        return
    for line in block.commands():
        _run_command(line, where)


def _run_command(line: str, where: str) -> None:
    words = shlex.split(line, comments=True)
    if not words or words[0] in INSTALLERS or not_run(line):
        return
    if words[0] == "contmerge" and words[1] != "yaml" and ">" not in words:
        try:
            code = main(words[1:])
        except SystemExit as stop:  # --help, --version
            code = stop.code
        assert code in (0, None), f"{where}: {line} ended with exit code {code}"
        return
    tools = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=tools)
    assert done.returncode == 0, f"{where}: {line} ended with exit code {done.returncode}\n{done.stderr[-3000:]}"
