"""Plugin files: which classes count, what is said of files that cannot be used, and of two for one word."""

from pathlib import Path

import pytest

from hf_contmerge.errors import RecipeError, RunError
from hf_contmerge.merge_rules import get_rule, rule_class, rule_names
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime import plugins
from hf_contmerge.runtime.plugins import given_plugins, require_same, use_plugin, used_plugins

CODE = """
from dataclasses import dataclass
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merge_rules.ema import Ema

class Half(Ema):
    beta = 0.5

Alias = Half

class Half_Way(Half):
    pass

class _Hidden(Half):
    pass

class Abstract(MergeRule):
    pass

class Other:
    pass
"""


@pytest.fixture(autouse=True)
def none_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FILES", "_USED"):
        monkeypatch.setattr(plugins, name, {})


def write(path: Path, code: str = CODE) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    return path


def test_words_are_the_rules_that_the_file_defines(tmp_path: Path) -> None:
    before = rule_names()
    use_plugin(write(tmp_path / "halves.py"))
    assert set(rule_names()) - set(before) == {"half", "half_way"}
    assert rule_class("half_way").__name__ == "Half_Way"
    assert used_plugins() == given_plugins()
    assert used_plugins(["ema"]) == {}
    assert used_plugins(["half_way", "ema"])["halves.py"].startswith("sha256:")


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    file = write(tmp_path / "halves.py")
    use_plugin(file)
    first = rule_class("half"), given_plugins()
    use_plugin(file)
    assert (rule_class("half"), given_plugins()) == first
    write(file, CODE.replace("Half_Way", "Third"))
    assert rule_class("half") is first[0]  # what was given counts, not what has become of it
    use_plugin(file)
    assert "third" in rule_names()
    assert given_plugins() != first[1]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("x = (", "line 1: SyntaxError: '(' was never closed"),
        ("import os\n\ndef f():\n    return 1 / 0\n\nf()", "line 4: ZeroDivisionError: division by zero"),
        ("import no_such_module", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_file_that_cannot_be_loaded(tmp_path: Path, code: str, said: str) -> None:
    use_plugin(write(tmp_path / "bad.py", code))
    for use in (rule_names, lambda: get_rule("ema")):
        with pytest.raises(RecipeError) as error:
            use()
        assert str(error.value).startswith(f"The plugin {tmp_path / 'bad.py'} cannot be loaded: {said}")


def test_two_files_for_one_word(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one.py"), write(tmp_path / "other.py")
    for file in (one, other):
        use_plugin(file)
    with pytest.raises(RecipeError, match=f"The rule 'half' is defined by the plugin {one} and the plugin {other}"):
        get_rule("half")
    use_plugin(write(tmp_path / "mine.py", "from hf_contmerge.merge_rules.ema import Ema\nclass Magmax(Ema): pass"))
    with pytest.raises(RecipeError, match=f"'magmax' is defined by hf_contmerge itself and the plugin {tmp_path}"):
        get_rule("magmax")


def test_two_files_of_one_name(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a" / "x.py"), write(tmp_path / "b" / "x.py", f"{CODE}\n")
    use_plugin(one)
    with pytest.raises(RecipeError, match=rf"Two plugins are named x\.py: {one} and {other}\. Rename one\."):
        use_plugin(other)
    recipe = {"name": "x", "base_model": "b", "stages": [{"name": "s", "dataset": "s.jsonl"}], "merge": ["half"]}
    with pytest.raises(RecipeError, match=r"two plugins are named x\.py"):
        parse_recipe({**recipe, "plugins": ["a/x.py", "b/x.py"]})


def test_what_was_made_with_another_file_is_not_continued(tmp_path: Path) -> None:
    recorded = {"torch": "2.6", "halves.py": "sha256:" + 64 * "0"}
    with pytest.raises(RunError, match=r"^state was made with the plugin halves\.py: add `--plugin halves\.py` with"):
        require_same(recorded, "state")
    use_plugin(write(tmp_path / "halves.py"))
    require_same(given_plugins(), "state")
    with pytest.raises(RunError, match=r"is not the plugin that made state: its SHA-256 was 000000000000 and is"):
        require_same(recorded, "state")
