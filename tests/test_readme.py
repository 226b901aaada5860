"""What README.md and CONTRIBUTING.md say is so: recipes parse, commands exist, files are there, copies are current."""

import re
import shlex

import pytest
import yaml
from toys import ROOT

from hf_contmerge.commands.main import _parse
from hf_contmerge.merge_rules import get_rule, rule_names
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_recipes_parse_and_are_short():
    assert blocks("yaml")
    rest = {"name": "x", "base_model": "b", "stages": [{"name": "s", "dataset": "s.jsonl"}], "merge": ["magmax"]}
    for block in blocks("yaml"):
        fields = yaml.safe_load(block)
        parse_recipe(fields if "name" in fields else {**rest, **fields})  # whole, or a part of one
        assert len(block.strip().splitlines()) <= 25


def test_commands_exist(capsys):
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    seen = set()
    for words in map(shlex.split, filter(None, lines)):
        seen.add(words[0])
        if words[0] == "make":
            assert words[1] in targets
        elif words[0] == "contmerge":
            _parse(words[1:])
        elif words[0] == "mergekit-yaml":
            assert (ROOT / words[1]).is_file()
        elif words[:2] == ["accelerate", "launch"]:
            assert (ROOT / next(w for w in words if w.endswith(".py"))).is_file()
        else:
            pytest.fail(f"the README shows a command that no test knows: {words}")
    assert {"make", "contmerge", "mergekit-yaml", "accelerate"} <= seen


def test_another_rule_by_a_word_on_the_command_line():
    recipe = load_recipe(ROOT / "recipes/quickstart.yml", ["merge.0.rule=ema"])
    entry = recipe.merge[0]
    assert (entry.name, get_rule(entry.rule, **entry.parameters).start_from) == ("ema", "merged")


def test_tree_names_every_folder_and_public_file():
    tree = CONTRIBUTING.split("## The house")[1].split("```")[1]
    package = ROOT / "hf_contmerge"
    public = [p.relative_to(package) for p in package.rglob("[!_]*.py")]
    rules = ("merge_rules", "train_strategies")  # one a file, listed by the README's tables
    named = {p for p in public if p.parts[0] not in rules}
    assert {f"{d.name}/" for d in package.rglob("*/") if (d / "__init__.py").is_file()} <= set(
        re.findall(r"\w+/", tree)
    )
    assert {p.stem for p in named} <= set(re.findall(r"\w+", tree))


def test_table_names_every_rule():
    assert set(re.findall(r"^\| `(\w+)` \|", README.split("## The merge rules")[1], flags=re.M)) == set(rule_names())


def test_picture_is_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).stat().st_size > 20_000


def test_contributing_shows_the_rule_as_it_is():
    code = (ROOT / "hf_contmerge/merge_rules/ema.py").read_text(encoding="utf-8")
    assert code.strip() in CONTRIBUTING
