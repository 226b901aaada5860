"""The package's face: public names, their types, and that importing them costs nothing until they are used."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from toys import ROOT

import hf_contmerge

WINGS = sorted(path.parent.name for path in (ROOT / "hf_contmerge").glob("*/__init__.py"))
FACES = ["hf_contmerge", *(f"hf_contmerge.{wing}" for wing in WINGS if wing != "commands")]
EVERY_NAME = [(face, name) for face in FACES for name in getattr(importlib.import_module(face), "__all__", ())]


@pytest.mark.parametrize(("face", "name"), EVERY_NAME)
def test_public_names_exist(face, name):
    value = getattr(importlib.import_module(face), name)
    assert not isinstance(value, type(sys))  # a submodule of that name would hide it
    assert name in dir(importlib.import_module(face))


def test_importing_the_package_is_cheap():
    faces = ", ".join(face for face in FACES if not face.endswith(("merge_rules", "train_strategies")))
    code = f"import sys, {faces}; print(sorted({{'torch', 'transformers', 'pydantic', 'yaml'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        hf_contmerge.nothing_of_ours  # pyright: ignore  # noqa: B018


# Types, as a user's checker sees them

SCRIPT = """
from hf_contmerge import MergeState, Recipe, finetune_stage, load_recipe, merge_stage, score_stage, use_plugin
from hf_contmerge.merge_rules import MergeRule, get_rule
from hf_contmerge.merging import merge_experts
from hf_contmerge.runtime import Crew

law = finetune_stage("owner/base", "law.jsonl", "experts/law", max_steps=500)
reveal_type(law)  # TrainedExpert
state = merge_stage("state", law, rule="magmax", export="merged/law")
reveal_type(state)  # MergeState
reveal_type(state.log().experts[0].norm)  # float
reveal_type(score_stage("merged/law", ["arc_easy"])["arc_easy"].value)  # float
reveal_type(load_recipe("r.yml").stages[0].name)  # str
reveal_type(get_rule("magmax"))  # MergeRule
reveal_type(Crew().workers)  # int
reveal_type(merge_experts(get_rule("ema"), state.base(), []).scale)  # float
MergeState.load(3)  # error: "Literal[3]" cannot be assigned to parameter "folder"
finetune_stage("owner/base", "law.jsonl", "o", seed="x")  # error: "Literal['x']" cannot be assigned to parameter "seed"
use_plugin()  # error: Argument missing for parameter "path"
Recipe.loud  # error: Cannot access attribute "loud"
from hf_contmerge import MergeStat  # error: "MergeStat" is unknown import symbol
from hf_contmerge.merging import merge_expert  # error: "merge_expert" is unknown import symbol
"""


def test_types_are_real_for_a_users_checker(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    words = [Path(sys.executable).with_name("pyright"), "--pythonpath", sys.executable, "--outputjson", "script.py"]
    quiet = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=quiet)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright cannot start here, and so neither can `make lint`: {done.stderr[-300:]}")
    said = {d["range"]["start"]["line"]: d["message"] for d in json.loads(done.stdout)["generalDiagnostics"]}
    wanted = {number: line.partition("# ")[2] for number, line in enumerate(SCRIPT.splitlines()) if "# " in line}
    assert said.keys() == wanted.keys()
    for number, words_ in wanted.items():
        text = words_.removeprefix("error: ") if words_.startswith("error") else f'is "{words_}"'
        assert text in said[number].replace("\u00a0", " ")
    assert (ROOT / "hf_contmerge" / "py.typed").is_file()


# Prose


FORMULA = re.compile(r" = | <- |loss \+| / ")


@pytest.mark.parametrize("path", sorted((ROOT / "hf_contmerge").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_first_lines_of_docstrings_have_at_most_twelve_words(path):
    """Formulas are as long as they are."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
    first = [text.split("\n")[0] for node in nodes if (text := ast.get_docstring(node))]
    assert [line for line in first if len(line.split()) > 12 and not FORMULA.search(line)] == []


UNQUOTED = re.compile(r"contmerge(?: [a-z-]+)+ \{(?!shell_word\(|words\}|file\}|unset\})")


@pytest.mark.parametrize("path", sorted((ROOT / "hf_contmerge").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_messages_quote_their_paths(path):
    """`words` and `file` are quoted where they are filled in."""
    assert UNQUOTED.findall(path.read_text()) == []
