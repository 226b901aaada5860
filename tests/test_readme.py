"""README, docs/ and CONTRIBUTING hold: commands parse, recipes load, links lead somewhere, tables are complete."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from toys import ROOT
from toys.models import perturbed, toy_llama
from toys.pages import PAGES, README, blocks_of

import hf_contmerge
from hf_contmerge.commands.main import _COMMANDS, _parse
from hf_contmerge.merge_rules import get_rule, parameter_types, rule_class, rule_names
from hf_contmerge.merging.in_mergekit.recipe import read_mergekit_recipe
from hf_contmerge.run.recipe.streams import stream_names
from hf_contmerge.run.recipe.study import Study, study_cells
from hf_contmerge.run.recipe.suites import suite_names, suite_tasks
from hf_contmerge.run.recipe.text import load_recipe, parse_recipe, read_yaml
from hf_contmerge.scoring.forgetting.lines import SIDES
from hf_contmerge.scoring.forgetting.matrix import ScoreMatrix
from hf_contmerge.train_strategies import strategy_class, strategy_names

CONTRIBUTING, CHANGELOG = (ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md"))
ALL = [README, CONTRIBUTING, CHANGELOG, *PAGES]
PROSE = [README, CONTRIBUTING, *PAGES]

Words = list[str]
each_page = pytest.mark.parametrize("page", ALL, ids=lambda path: path.name)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def doc(name: str) -> str:
    return read(ROOT / "docs" / name)


def blocks(page: Path, language: str) -> list[str]:
    return [block.text for block in blocks_of(page) if block.language == language]


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", read(page), flags=re.S | re.M)


def every(language: str) -> list[Any]:
    """Return the code blocks of all pages, as cases of a test."""
    found = [(page, text) for page in PROSE for text in blocks(page, language)]
    return [pytest.param(text, id=f"{page.name}-{number}") for number, (page, text) in enumerate(found)]


# The front page


def test_readme_is_a_front_page() -> None:
    lines = read(README).splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 150] == []


def test_readme_repeats_the_figures_page() -> None:
    table = read(README).split("| after three stages |")[1].split("\n\n")[0]
    assert f"| after three stages |{table}" in doc("figures.md")


def test_own_data_takes_twelve_lines() -> None:
    (recipe,) = blocks(README, "yaml")
    assert len(recipe.strip().splitlines()) == 12


def test_every_page_is_listed() -> None:
    for page in PAGES:
        listed = read(README) if page.parent.name == "docs" else doc("tutorials/index.md")
        assert f"({'docs/' if page.parent.name == 'docs' else ''}{page.name})" in listed or page.name == "index.md"
        assert page.parent.name != "docs" or f"({page.name})" in doc("index.md") or page.name == "index.md"


# Recipes


@pytest.mark.parametrize("text", every("yaml"))
def test_recipe_parses(text: str, tmp_path: Path) -> None:
    """A whole recipe, a part of one, or mergekit's."""
    fields = read_yaml(text)
    if "merge_method" in fields:
        file = tmp_path / "recipe.yml"
        file.write_text(text)
        assert read_mergekit_recipe(file).models
        return
    if "resources" in fields:
        read_sky(fields)
        return
    if "recipe" in fields:
        study = Study.model_validate(fields)
        assert isinstance(study.recipe, str) or len(study_cells(study)) > 1
        return
    smallest = {"name": "x", "base_model": "b", "stages": [{"name": "s", "dataset": "s.jsonl"}], "merge": ["magmax"]}
    recipe = parse_recipe(fields if "name" in fields else {**smallest, **fields})
    for entry in recipe.merge:
        get_rule(entry.rule, **{word: value for word, value in entry.parameters.items() if value != "auto"})


def read_sky(fields: dict[str, Any]) -> None:
    """Check a job for SkyPilot: its fields (of version 0.10's schema that we use), and the commands in it."""
    known = {"name": str, "resources": dict, "workdir": str, "file_mounts": dict, "setup": str, "run": str}
    assert all(isinstance(value, known[word]) for word, value in fields.items())
    assert set(fields["resources"]) <= {"accelerators", "use_spot", "cpus", "memory"}
    assert all(set(mount) == {"name", "mode"} for mount in fields["file_mounts"].values())
    for text in (fields["setup"], fields["run"]):
        for line in text.splitlines():
            parse_command(shlex.split(line.replace("$SKYPILOT_NUM_GPUS_PER_NODE", "8")))


def test_another_rule_by_a_word_on_the_command_line() -> None:
    recipe = load_recipe(ROOT / "recipes/quickstart.yml", ["merge.0.rule=ema"])
    entry = recipe.merge[0]
    assert (entry.name, get_rule(entry.rule, **entry.parameters).start_from) == ("ema", "merged")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.y*ml")), ids=lambda path: path.name)
def test_recipes_name_a_command_that_exists(path: Path) -> None:
    head = [line.lstrip("# ") for line in read(path).replace("\\\n#", "").splitlines() if line.startswith("#")]
    commands = [line for line in head if line.split(" ")[0] in PARSERS]
    if path.name != "quickstart.yml":  # `make quickstart`, in a sentence
        assert commands
    for line in commands:
        parse_command(shlex.split(line))


# Commands


def parse_make(words: Words) -> None:
    assert words[0] in re.findall(r"^([a-z]+):", read(ROOT / "Makefile"), flags=re.M)


def parse_contmerge(words: Words) -> None:
    if words[0] == "yaml":
        parse_mergekit(words[1:])
    else:
        _parse(words)


def parse_mergekit(words: Words) -> None:
    from mergekit.scripts.run_yaml import main

    context = main.make_context("mergekit-yaml", list(words))
    assert (ROOT / context.params["config_file"]).is_file()


def parse_script(script: str, words: Words) -> None:
    """Check what a launcher starts: our script, our module, or the command."""
    if script == "contmerge":
        parse_contmerge(words)
        return
    assert script == "hf_contmerge.train" or (ROOT / script).is_file()
    _parse(["run", *words])


def parse_accelerate(words: Words) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    args = launch_command_parser().parse_args(words[1:])
    assert args.config_file is None or (ROOT / args.config_file).is_file()
    parse_script(args.training_script, args.training_script_args)


def parse_torchrun(words: Words) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    parse_script(args.training_script, args.training_script_args)


def parse_lm_eval(words: Words) -> None:
    from lm_eval._cli import HarnessCLI

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lm_eval", *words])
        HarnessCLI().parse_args()


def parse_pip(words: Words) -> None:
    extras = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["optional-dependencies"]
    assert words[0] == "install"
    if words[1] == "--no-deps":
        assert words[2] in read(ROOT / "constraints.txt").replace("_", "-")
        return
    package, _, given = words[1].partition("[")
    assert package in (".", "hf_contmerge")
    assert set(re.findall(r"\w+", given)) <= set(extras)


def parse_srun(words: Words) -> None:
    if words[0] == "bash":
        assert words[1] == "-c"
        words = shlex.split(words[2].replace("$SLURM_NODEID", "0"))
    parse_command([word.replace("two-nodes.yaml", "recipes/accelerate/two-nodes.yaml") for word in words])


def parse_docker(words: Words) -> None:
    assert words[0] in ("build", "run")
    image = words.index("contmerge")
    if words[0] == "run":
        parse_contmerge(words[image + 1 :])
    else:
        assert (ROOT / "Dockerfile").is_file()


PARSERS: dict[str, Callable[[Words], None]] = {
    "make": parse_make,
    "contmerge": parse_contmerge,
    "mergekit-yaml": parse_mergekit,
    "accelerate": parse_accelerate,
    "torchrun": parse_torchrun,
    "lm_eval": parse_lm_eval,
    "pip": parse_pip,
    "srun": parse_srun,
    "docker": parse_docker,
}


def parse_command(words: Words) -> None:
    assert words[0] in PARSERS, f"no test knows the command {words}"
    PARSERS[words[0]](words[1:])


@pytest.mark.parametrize("page", PROSE, ids=lambda path: path.stem)
def test_commands_parse(page: Path) -> None:
    for block in blocks_of(page):
        for line in block.commands() if block.language == "bash" else ():
            words = shlex.split(re.sub(r" > \S+", "", line), comments=True)
            if words and words[0] not in ("export", "if"):  # read by the shell, below
                parse_command(words)


@pytest.mark.parametrize("text", every("bash"))
def test_the_shell_reads_the_blocks(text: str) -> None:
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def test_every_command_is_shown() -> None:
    shown = "".join(text for page in PROSE for text in blocks(page, "bash"))
    assert set(re.findall(r"^contmerge (\w[\w-]*)", shown, flags=re.M)) == set(_COMMANDS)


@each_page
def test_commands_in_sentences_exist(page: Path) -> None:
    text = without_blocks(page)
    assert set(re.findall(r"`contmerge ([a-z][a-z-]*)", text)) <= set(_COMMANDS)
    for target in re.findall(r"`make ([a-z]+)`", text):
        parse_make([target])
    for script, options in re.findall(r"`(tests/benchmarks/\w+\.py)([^`]*)`", text):
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in read(ROOT / script), f"{script} has no {option}"


# Python


@pytest.mark.parametrize("text", every("python"))
def test_python_compiles_and_its_imports_exist(text: str) -> None:
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
                if module is hf_contmerge:
                    assert alias.name in hf_contmerge.__all__


def test_the_growing_merge_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """With toys in folders that have the names of the page's models."""
    (code,) = blocks(ROOT / "docs" / "merging.md", "python")
    monkeypatch.chdir(tmp_path)
    base = toy_llama(tmp_path / "Qwen/Qwen3-0.6B", seed=0)
    for seed, name in enumerate(("owner/law-expert", "path/to/medicine"), 1):
        perturbed(base, tmp_path / name, seed=seed, size=0.01)
    exec(compile(code, "merging.md", "exec"), {})
    assert (tmp_path / "merged/model.safetensors").is_file()
    assert "['law-expert', 'medicine']" in capsys.readouterr().out


# Links


def slugs(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            yield (page.parent / path if path else page), anchor


@each_page
def test_links_and_anchors_resolve(page: Path) -> None:
    for path, anchor in links(page):
        assert path.exists(), f"{page.name} links to {path}"
        assert not anchor or anchor in slugs(path), f"{page.name} links to #{anchor} of {path.name}"


@each_page
def test_named_files_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|recipes|notebooks|docs|hf_contmerge)/[\w./-]*)", read(page)):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


def test_pictures_are_drawn() -> None:
    pictures = [page.parent / path for page in ALL for path in re.findall(r"!\[.*?\]\((.*?)\)", read(page))]
    assert pictures
    for path in pictures:
        assert path.stat().st_size > 20_000


# Tables


def first_column(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", text, flags=re.M)


def parameters(text: str) -> dict[str, dict[str, str]]:
    """Return name -> parameter -> default of a table of parameters, whose second column is `word` (default), ..."""
    rows = re.findall(r"^\| `(\w+)` \| ((?:\\\||[^|])*?) ?\|", text, flags=re.M)
    pairs = {name: re.findall(r"`(\w+)` \(`?([^)`]*)`?\)", cell) for name, cell in rows}
    return {name: {word: value.replace(r"\|", "|") for word, value in found} for name, found in pairs.items()}


def spelt(value: Any) -> str:
    """Return a default as YAML has it, None as `none`."""
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def test_rules_are_complete() -> None:
    overview, formulas = doc("rules.md").split("## Formulas and parameters")
    assert set(first_column(overview)) == set(rule_names())
    expected = {
        name: {word: spelt(default) for word, (_, default) in parameter_types(rule_class(name)).items()}
        for name in rule_names()
    }
    assert parameters(formulas) == expected
    for name in rule_names():
        assert f"`{name}`" in read(README)
        row = next(line for line in overview.splitlines() if line.startswith(f"| `{name}` |"))
        assert rule_class(name).reference in row
        start = {"base": "the base", "previous": "the previous expert", "merged": "the merged model"}
        assert start[rule_class(name).start_from] in row


def test_strategies_are_complete() -> None:
    overview, values = doc("strategies.md").split("## Parameters")
    assert set(first_column(overview)) == set(strategy_names())
    for name, found in parameters(values.split("\n\n- ")[0]).items():
        signature = inspect.signature(strategy_class(name)).parameters.values()
        named = {p.name: spelt(p.default) for p in signature if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert found == named, name
    assert set(first_column(values)) == set(strategy_names())


def test_metrics_are_complete() -> None:
    measured = ScoreMatrix(("law",), ((0.1,), (0.2,))).metrics()
    assert {*measured, *SIDES, "general_delta", "fuar"} == set(
        re.findall(r"^\| [^|`]+ \| `(\w+)` \|", doc("measuring.md"), re.M)
    )


def test_suites_are_complete() -> None:
    page = doc("measuring.md").split("### Suites")[1]
    assert set(first_column(page.split("\n\n")[1])) == set(suite_names())
    assert ", ".join(suite_tasks("general")) in page
    assert all(f"`{name}`" in page for name in stream_names())


def test_accelerate_configurations_are_complete() -> None:
    files = {path.name for path in (ROOT / "recipes/accelerate").glob("*.yaml")}
    assert set(re.findall(r"^\| `([\w-]+\.yaml)` \|", doc("clusters.md"), flags=re.M)) == files
    for path in (ROOT / "recipes/accelerate").glob("*.yaml"):
        assert yaml.safe_load(read(path))["num_processes"] >= 2


# CONTRIBUTING.md


def test_tree_names_every_folder_and_public_file() -> None:
    tree = read(CONTRIBUTING).split("## The house")[1].split("```")[1]
    package = ROOT / "hf_contmerge"
    public = [p.relative_to(package) for p in package.rglob("[!_]*.py")]
    rules = ("merge_rules", "train_strategies", "rewards")  # one a file, listed by the tables of docs/
    named = {p for p in public if not {*p.parts} & {*rules}}
    assert {f"{d.name}/" for d in package.rglob("*/") if (d / "__init__.py").is_file()} <= set(
        re.findall(r"\w+/", tree)
    )
    assert {p.stem for p in named} <= set(re.findall(r"\w+", tree))


def test_contributing_shows_the_rule_as_it_is() -> None:
    code = read(ROOT / "hf_contmerge/merge_rules/ema.py")
    assert code.strip() in read(CONTRIBUTING)
