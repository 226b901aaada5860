"""Rules and strategies of others: in a package that pip has installed, and in a file that the user names."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toys import ROOT
from toys.models import perturbed, toy_llama, write_jsonl

from hf_contmerge.commands.main import main
from hf_contmerge.errors import RecipeError
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.report.card import model_card
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import load_recipe
from hf_contmerge.runtime import plugins

BIN = Path(sys.executable).parent
Done = subprocess.CompletedProcess[str]

GAIN = '''
"""A rule and a strategy."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.train_strategies import TrainStrategy


@dataclass(frozen=True)
class Gain(MergeRule):
    """S <- S + D;  merged = base + alpha * S."""

    reference = "https://example.org/gain"
    start_from = "base"
    unit = "element"
    basis_free = True
    tunable = ("alpha",)

    alpha: float = 0.25

    def update(self, running, task_vector, weight):
        return running + task_vector

    def scale(self, norms):
        return self.alpha


@dataclass
class Calm(TrainStrategy):
    """g <- factor * g, at https://example.org/calm."""

    factor: Annotated[float, Field(ge=0)] = 0.0

    def adjust_gradients(self, model):
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.mul_(self.factor)
'''
PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"

[tool.setuptools]
py-modules = ["{module}"]

[project.entry-points."hf_contmerge.merge_rules"]
{rules}
[project.entry-points."hf_contmerge.train_strategies"]
{strategies}
"""


def install(home: Path, name: str, code: str, rules: dict[str, str], strategies: dict[str, str]) -> Path:
    """Install a package of one module with pip; return the folder that goes on PYTHONPATH."""
    source, target = home / name, home / f"{name}-site"
    source.mkdir()
    module = name.replace("-", "_")
    (source / f"{module}.py").write_text(code)
    points = ("".join(f'{w} = "{v}"\n' for w, v in words.items()) for words in (rules, strategies))
    text = PROJECT.format(name=name, version="1.2", module=module, rules=next(points), strategies=next(points))
    (source / "pyproject.toml").write_text(text)
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--target", target]
    done = subprocess.run([sys.executable, *words, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two experts of it, a dataset and a recipe."""
    home = tmp_path_factory.mktemp("home")
    base = toy_llama(home / "base", seed=0)
    for seed in (1, 2):
        perturbed(base, home / f"expert{seed}", seed=seed, size=0.01)
    write_jsonl(home / "law.jsonl", [{"text": f"the quick fox sings song {i} of law and code"} for i in range(20)])
    (home / "recipe.yml").write_text(yaml.safe_dump(recipe(home)))
    return home


def recipe(home: Path, **more: Any) -> dict[str, Any]:
    return {
        "name": "gains",
        "base_model": str(home / "base"),
        "stages": [
            {"name": "law", "dataset": {"path": str(home / "law.jsonl"), "heldout": 2}},
            {"name": "code", "expert": str(home / "expert1")},
        ],
        "train": {"strategy": ["full", "calm"], "max_steps": 1, "max_length": 32, "save_strategy": "no"},
        "merge": [{"rule": "gain", "parameters": {"alpha": 0.5}}, "average"],
        **more,
    }


@pytest.fixture(scope="module")
def site(home: Path) -> Path:
    return install(home, "gain-rules", GAIN, {"gain": "gain_rules:Gain"}, {"calm": "gain_rules:Calm"})


@pytest.fixture(scope="module")
def rivals(home: Path) -> Path:
    """A package with two words that are taken, and with three rules that cannot be loaded."""
    rules = {"gain": "rival_rules:Gain", "magmax": "rival_rules:Gain", "wrong": "rival_rules:Calm"}
    rules |= {"gone": "no_such_module:Gone", "broken": "rival_rules:Nothing", "slerp": "rival_rules:Gain"}
    return install(home, "rival-rules", GAIN, rules, {"calm": "rival_rules:Calm"})


def shell(*words: object, cwd: Path, sites: tuple[Path, ...] = (), **env: str) -> Done:
    path = os.pathsep.join(map(str, (*sites, ROOT)))
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": path, **env}
    return subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def python(code: str, *, cwd: Path, sites: tuple[Path, ...] = ()) -> Done:
    return shell(sys.executable, "-c", code, cwd=cwd, sites=sites)


def sum_of(home: Path, *experts: Path, alpha: float) -> dict[str, torch.Tensor]:
    """Return what the rule makes of experts, in float64."""
    base, *others = (
        {n: t.double() for n, t in load_file(f / "model.safetensors").items()} for f in (home / "base", *experts)
    )
    return {name: t + alpha * sum(other[name] - t for other in others) for name, t in base.items()}


def assert_merged(folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    for name, tensor in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=0, atol=1e-6)


# A package


@pytest.fixture(scope="module")
def run(home: Path, site: Path) -> Run:
    done = shell(BIN / "contmerge", "run", "recipe.yml", "--until", "merge", cwd=home, sites=(site,))
    assert done.returncode == 0, done.stderr[-2000:]
    return Run.load(home / "runs" / "gains")


@pytest.mark.slow
def test_a_run_with_a_packages_rule_and_strategy(home: Path, run: Run) -> None:
    law, merged = run.expert(1, "base"), run.merged(2, run.recipe.merge[0])
    assert weights_sha256(law.model) == weights_sha256(home / "base")  # Calm took the gradients away
    assert_merged(merged.model, sum_of(home, law.model, home / "expert1", alpha=0.5))
    assert merged.record("merge")["versions"]["gain-rules"] == "1.2"
    assert law.record("train")["versions"]["gain-rules"] == "1.2"
    assert "gain-rules" not in run.merged(2, run.recipe.merge[1]).record("merge")["versions"]
    with pytest.raises(RecipeError, match="Unknown rule 'gain'"):  # here the package is not installed
        model_card(run, run.recipe.merge[0])


@pytest.mark.slow
def test_a_plan_with_a_packages_rule_and_strategy(home: Path, site: Path) -> None:
    done = shell(BIN / "contmerge", "plan", "recipe.yml", "--run", "other", cwd=home, sites=(site,))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "merge  02-code/merges/gain" in done.stdout


def test_the_stock_mergekit_command_knows_a_packages_rule(home: Path, site: Path, run: Run) -> None:
    merged = run.merged(2, run.recipe.merge[0])
    done = shell(BIN / "mergekit-yaml", merged.mergekit_recipe, "by-mergekit", cwd=home, sites=(site,))
    assert done.returncode == 0, done.stderr[-2000:]
    assert weights_sha256(home / "by-mergekit") == weights_sha256(merged.model)


@pytest.mark.slow
def test_the_conformance_suites_take_a_packages_rule_and_strategy(home: Path, site: Path) -> None:
    code = (
        "from hf_contmerge.testing import check_rule\n"
        "check_rule('ema')\n"
        "import sys; assert not {'pytest', 'transformers', 'pydantic', 'gain_rules'} & set(sys.modules)\n"
        "check_rule('gain', lambda task_vectors, alpha: alpha * sum(task_vectors))\n"
        "from hf_contmerge.testing import check_strategy\n"
        "check_strategy('calm', factor=0.5)\n"
        "check_strategy(['lora', 'calm'], calm={'factor': 0.5})\n"
        "try: check_strategy('calm')\n"
        "except AssertionError as error: print(error)\n"
    )
    done = python(code, cwd=home, sites=(site,))
    assert done.returncode == 0, done.stderr
    fault = "the first stage's expert is the model that the stage starts from"  # its factor is 0, unless it is set
    assert done.stdout.strip().endswith(f"calm breaks keeps_names_shapes_and_finite_values: {fault}")


def test_listing_imports_no_package(home: Path, site: Path, rivals: Path) -> None:
    code = (
        "from hf_contmerge.merge_rules import get_rule, rule_names\n"
        "import sys\n"
        "rule_names(); get_rule('ema')\n"
        "print(*rule_names()); print('gain_rules' in sys.modules, 'rival_rules' in sys.modules)\n"
    )
    done = python(code, cwd=home, sites=(site, rivals))
    words, imported = done.stdout.splitlines()
    assert {"gain", "broken", "wrong", "ema"} <= set(words.split())
    assert "gone" not in words.split()
    assert imported == "False False"
    said = "'gone' of the package rival-rules 1.2 is left out: no module no_such_module (no_such_module:Gone)."
    assert done.stderr.splitlines() == [said]


@pytest.mark.slow
def test_a_taken_word_is_refused_when_it_is_used(home: Path, site: Path, rivals: Path, plugin: Path) -> None:
    code = (
        "import torch\n"
        "from hf_contmerge import use_plugin\n"
        "from hf_contmerge.merge_rules import get_rule\n"
        "from hf_contmerge.train_strategies import get_strategy\n"
        "def attempt(make, word):\n"
        "    try: print(make(word))\n"
        "    except ValueError as error: print(error)\n"
        "attempt(get_rule, 'gain'), attempt(get_rule, 'magmax'), attempt(get_strategy, 'calm')\n"
        "attempt(get_rule, 'ema'), attempt(get_rule, 'broken'), attempt(get_rule, 'wrong')\n"
        f"use_plugin({str(plugin)!r}), attempt(get_rule, 'gain')"
    )
    done = python(code, cwd=home, sites=(site, rivals))
    cure = "Rename one, uninstall its package, or leave its `--plugin` out."
    ours, theirs = "the package gain-rules 1.2", "the package rival-rules 1.2"
    assert done.stdout.splitlines() == [
        f"The rule 'gain' is defined by {ours} and {theirs}. {cure}",
        f"The rule 'magmax' is defined by hf_contmerge itself and {theirs}. {cure}",
        f"The strategy 'calm' is defined by {ours} and {theirs}. {cure}",
        "Ema(beta=0.5)",
        f"The rule 'broken' of {theirs} (rival_rules:Nothing) cannot be loaded: AttributeError: module "
        "'rival_rules' has no attribute 'Nothing'. Update or uninstall the package.",
        f"The rule 'wrong' of {theirs} (rival_rules:Calm) is no MergeRule. Update or uninstall the package.",
        f"The rule 'gain' is defined by {ours} and {theirs} and the plugin {plugin}. {cure}",
    ], done.stderr


@pytest.mark.slow  # tests/merging/in_mergekit/test_plugin.py breaks the plugin itself
def test_a_broken_package_breaks_no_method_of_mergekit(home: Path, rivals: Path) -> None:
    models = {"base_model": str(home / "base"), "models": [{"model": str(home / "expert1")}], "dtype": "float32"}
    for method in ("ema", "broken", "magmax", "slerp"):
        more = {"parameters": {"t": 0.5}} if method == "slerp" else {}
        (home / f"{method}.yml").write_text(yaml.safe_dump({"merge_method": method, **models, **more}))
    code = (
        "from mergekit.scripts.run_yaml import main\n"
        "for method in ('ema', 'broken', 'magmax', 'slerp'):\n"
        "    try: main(args=[f'{method}.yml', f'by-{method}'], prog_name='mergekit-yaml')\n"
        "    except SystemExit as end: print(end.code)\n"
    )
    done = python(code, cwd=home, sites=(rivals,))
    assert done.stdout.split() == ["0", "2", "2", "0"], done.stderr[-3000:]
    assert all((home / f"by-{method}" / "model.safetensors").is_file() for method in ("ema", "slerp"))
    words = " ".join(done.stderr.split())
    assert "'broken' of the package rival-rules 1.2 (rival_rules:Nothing) cannot be loaded" in words
    assert "The rule 'magmax' is defined by hf_contmerge itself and the package rival-rules 1.2." in words
    assert "merge_method slerp is mergekit's own. A rule has the same name and is not used; rename it." in words


# A file

PATH_TO_IT = ": add `--plugin my_gain.py` with the path to it"
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a process that has been given no plugin yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("_FILES", "_USED"):
        monkeypatch.setattr(plugins, name, {})
    return tmp_path


@pytest.fixture
def contmerge(here: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Return a function that does what the command does in a new process: code, output, errors."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(plugins, "_FILES", {})
        capsys.readouterr()
        return (main([str(word) for word in words]), *capsys.readouterr())

    return command


Contmerge = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A plugin file that leaves a mark when it is executed."""
    path = tmp_path / "rules" / "my_gain.py"
    path.parent.mkdir()
    path.write_text(f"{GAIN}\nfrom pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n")
    return path


def test_a_recipe_alone_runs_no_code(home: Path, plugin: Path, contmerge: Contmerge) -> None:
    Path("recipe.yml").write_text(yaml.safe_dump(recipe(home, plugins=["rules/my_gain.py"])))
    for command in ("run", "plan"):
        code, _, said = contmerge(command, "recipe.yml")
        assert code == 2
        assert said == (
            "Error: recipe.yml needs the plugin rules/my_gain.py. A plugin is code, which runs only if you say so: "
            "read it, then add `--plugin rules/my_gain.py` (in Python: use_plugin).\n"
        )
    with pytest.raises(RecipeError, match=r"needs the plugin rules/my_gain\.py"):
        run_recipe(load_recipe("recipe.yml"))
    assert not plugin.with_suffix(".ran").exists()
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_with_a_plugin_and_its_changes(home: Path, plugin: Path, contmerge: Contmerge) -> None:
    data = recipe(home, plugins=["rules/my_gain.py"], train={"max_steps": 1, "max_length": 32, "save_strategy": "no"})
    Path("recipe.yml").write_text(yaml.safe_dump(data))
    words = ("run", "recipe.yml", "--plugin", "rules/my_gain.py")
    code, _, said = contmerge(*words)
    assert code == 0, said
    run = Run.load("runs/gains")
    merged = run.merged(2, run.recipe.merge[0])
    assert_merged(merged.model, sum_of(home, run.expert(1, "base").model, home / "expert1", alpha=0.5))
    digest = merged.record("merge")["versions"]["my_gain.py"]
    assert digest.startswith("sha256:")
    assert "my_gain.py" not in run.expert(1, "base").record("train")["versions"]
    plugin.with_suffix(".ran").unlink()
    assert contmerge(*words)[1].startswith("runs/gains is complete.\n")
    assert not plugin.with_suffix(".ran").exists()  # there was nothing to run it for
    plugin.write_text(plugin.read_text() + "# changed\n")
    code, _, said = contmerge(*words)
    assert code == 2
    assert f"Error: {plugin} is not the plugin that made merge of 01-law/merges/gain: its SHA-256 was" in said
    assert "drop what it made with `contmerge redo runs/gains merge`, or name another folder with --run" in said
    assert contmerge("redo", "runs/gains", "merge")[0] == 0
    before = run.expert(1, "base").record("train")["finished"]
    assert contmerge(*words)[0] == 0
    assert merged.record("merge")["versions"]["my_gain.py"] not in ("", digest)
    assert run.expert(1, "base").record("train")["finished"] == before  # the rule's change does not concern it
    code, _, said = contmerge("push", "runs/gains", "--merge", "gain", "--repo-id", "me/gain")
    assert code == 2
    assert f"merges/gain was made with the plugin my_gain.py{PATH_TO_IT}" in said
    assert contmerge("status", "runs/gains")[1].endswith("complete\n")


def test_a_state_with_a_plugins_rule(home: Path, plugin: Path, contmerge: Contmerge) -> None:
    flag = ("--plugin", plugin)
    assert contmerge("merge", "init", "s", "--base", home / "base", "--rule", "gain", *flag)[0] == 0
    assert contmerge("merge", "add", "s", home / "expert1", home / "expert2", *flag)[0] == 0
    assert contmerge("merge", "export", "s", "out", *flag)[0] == 0
    assert_merged(Path("out"), sum_of(home, home / "expert1", home / "expert2", alpha=0.25))
    code, _, said = contmerge("merge", "log", "s")
    assert (code, said) == (2, f"Error: s was made with the plugin my_gain.py{PATH_TO_IT}.\n")
    plugin.write_text(plugin.read_text().replace("return running + task_vector", "return task_vector"))
    code, _, said = contmerge("merge", "drop", "s", "expert1", *flag)
    assert code == 2
    assert f"Error: {plugin} is not the plugin that made s: its SHA-256 was" in said
    assert "Restore it, or start the state anew." in said


@pytest.mark.slow
def test_yaml_and_from_recipe_with_a_plugin(home: Path, plugin: Path, contmerge: Contmerge) -> None:
    experts = [{"model": str(home / f"expert{i}")} for i in (1, 2)]
    words = {"merge_method": "gain", "base_model": str(home / "base"), "models": experts, "dtype": "float32"}
    Path("merge.yml").write_text(yaml.safe_dump(words))
    done = shell(BIN / "contmerge", "yaml", "--plugin", plugin, "merge.yml", "by-mergekit", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr[-2000:]
    assert contmerge("merge", "from-recipe", "merge.yml", "out", "--plugin", plugin)[0] == 0
    assert_merged(Path("out"), sum_of(home, home / "expert1", home / "expert2", alpha=0.25))
    assert weights_sha256(Path("out")) == weights_sha256(Path("by-mergekit"))
    code, _, said = contmerge("yaml", "merge.yml", "out2", "--plugin", "none.py")
    assert code == 2
    assert said == "Error: Cannot read the plugin none.py: No such file or directory. Give a Python file.\n"


def test_a_new_recipe_with_a_plugin(home: Path, plugin: Path, contmerge: Contmerge) -> None:
    words = ("--base", home / "base", "--stage", f"law={home / 'law.jsonl'}", "--gpus", 0, "--rule", "gain")
    code, said, _ = contmerge("new", "rules/r.yml", *words, "--plugin", "rules/my_gain.py")
    assert code == 0
    assert "  contmerge plan rules/r.yml --plugin rules/my_gain.py\n" in said
    assert "plugins: [my_gain.py]" in Path("rules/r.yml").read_text()
    words = ("--set", "stages.0.dataset.heldout=2", "--set", "train.max_steps=1", "--set", "evaluate.general_tasks=[]")
    assert contmerge("plan", "rules/r.yml", "--plugin", "rules/my_gain.py", *words)[0] == 0


@pytest.mark.slow
def test_every_rank_of_a_job_loads_a_plugin(home: Path, plugin: Path, here: Path) -> None:
    Path("recipe.yml").write_text(yaml.safe_dump(recipe(home, plugins=["rules/my_gain.py"])))
    launch = (BIN / "torchrun", "--standalone", "--nproc-per-node", 2, "--", ROOT / "hf_contmerge" / "train.py")
    done = shell(*launch, "recipe.yml", "--until", "merge", "--plugin", plugin, cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run.load("runs/gains")
    merged = run.merged(2, run.recipe.merge[0])
    assert merged.record("merge")["processes"] == 2
    assert_merged(merged.model, sum_of(home, run.expert(1, "base").model, home / "expert1", alpha=0.5))
