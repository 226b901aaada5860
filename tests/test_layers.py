"""Who may import whom, read from the source: imports inside functions and for type checkers count too."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from toys import ROOT, TESTS

PACKAGE = ROOT / "hf_contmerge"

# A wing imports from the rows below its own only, so that the wings of a row never import each other.
LAYERS = (
    ("__init__", "train"),
    ("commands", "testing"),
    ("loop",),
    ("report",),
    ("scoring",),
    ("training",),
    ("merging", "train_strategies"),
    ("models",),
    ("run", "merge_rules"),
    ("runtime",),
    ("errors",),
)
LEVEL = {wing: level for level, row in enumerate(reversed(LAYERS)) for wing in row}

# Heavy or fast-moving libraries, and the wings, folders and files that know them.
HOMES = {
    "trl": {"training", "loop/plan"},
    "transformers": {
        "training", "train_strategies", "scoring", "loop/callback", "loop/plan",
        "models/loading", "models/layout", "models/folder", "models/headers", "models/architecture", "models/memory",
        "testing/toys",
    },
    "peft": {"training", "train_strategies", "models/loading"},  # adapters are merged and written without it
    "lm_eval": {"scoring"},
    "mergekit": {"merging/in_mergekit", "commands"},  # `contmerge yaml` is mergekit's own command
    "huggingface_hub": {"models", "report", "scoring/tasks"},
    "matplotlib": {"report", "merging/analysis", "loop/trackers"},  # a tracker takes the picture's pixels
    "jinja2": {"report/_templates", "training/tokenizer", "training/limits", "scoring/_strangers"},
    "markupsafe": {"report/_templates"},
    "shtab": {"commands/completion"},
    "rich": {"commands", "report", "runtime/progress"},
}  # fmt: skip

# What answers "is all of this done?" and "has it been measured?" at once: no torch, and little else from outside.
NEEDS_ONLY: dict[str, set[str]] = {
    "errors": set(),
    "merging/in_mergekit/autoload": set(),  # runs at every `import torch`
    "__init__": set(),
    "merge_rules": {"torch"},
    "testing/rules": {"torch"},
    "testing/folding": {"torch"},
    "testing/extremes": {"torch"},
    "testing/_docs": set(),
    "run": {"pydantic", "yaml", "pyarrow", "numpy"},
    "runtime/files": {"filelock"},
    "runtime/records": {"yaml", "filelock"},
    "runtime/digests": {"xxhash"},
    "runtime/foreign": {"yaml"},
    "runtime/patterns": set(),
    "runtime/hiding": set(),
    "runtime/refusals": set(),
    "runtime/stopping": set(),
    "runtime/versions": set(),
    "runtime/plugins": set(),
    "runtime/lazy": set(),
    "runtime/quickstart": set(),
    "runtime/examples": set(),
    "runtime/ranks": {"torch"},  # torch.distributed, where there are ranks
    "scoring/cache": set(),
    "scoring/keys": set(),
    "scoring/known": set(),
    "scoring/locate": set(),
    "scoring/_formats": {"yaml"},
    "scoring/_task_digest": {"yaml"},
    "models/survival": set(),  # the report reads it from records
    "merging/costs": {"torch"},
    "merging/_factored": {"torch"},
}


def name_of(path: Path) -> str:
    """Return a file's place in the package: merging/state; of a folder's face, the folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "/".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def dotted_names(name: str) -> tuple[tuple[str, ...], ...]:
    """Return the words of each module, or name of a module, that a file imports."""
    return tuple(tuple(dotted.split(".")) for dotted in _imports(FILES[name]))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports fail under `accelerate launch hf_contmerge/train.py`"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__")


def ours(name: str) -> set[str]:
    """Return the files of the package that a file imports."""
    found = set()
    for _, *parts in (words for words in dotted_names(name) if words[0] == "hf_contmerge"):
        inside = ("/".join(parts[:end]) for end in range(len(parts), 0, -1))
        found.add(next((place for place in inside if place in FILES), "__init__"))
    return found - {name}


def libraries(name: str) -> set[str]:
    """Return the libraries that a file imports."""
    return {words[0] for words in dotted_names(name)} - {"hf_contmerge"} - sys.stdlib_module_names


def wing(name: str) -> str:
    return name.split("/")[0]


def lies_in(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}/") for place in places)


every_file = pytest.mark.parametrize("name", FILES)


@every_file
def test_wings_import_from_below(name: str) -> None:
    assert wing(name) in LEVEL, f"hf_contmerge/{wing(name)} is new: add it to LAYERS, above all that it imports"
    wings = {wing(other) for other in ours(name)} - {wing(name)}
    if name == "__init__":
        return  # the package's face names what is inside
    wrong = sorted(other for other in wings if LEVEL[other] >= LEVEL[wing(name)])
    assert not wrong, f"hf_contmerge/{name} must not import from {', '.join(wrong)}: see LAYERS"


@every_file
def test_private_files_stay_in_their_folder(name: str) -> None:
    """A file `a/_b` is for the files of `a` and of the folders in it."""
    for other in ours(name):
        folder, _, file = other.rpartition("/")
        if file.startswith("_") and folder:
            assert name.startswith(f"{folder}/") or name == folder, (
                f"hf_contmerge/{name} imports {other}, which is private"
            )


@every_file
def test_libraries_are_imported_in_their_homes(name: str) -> None:
    wrong = sorted(lib for lib in libraries(name) if lib in HOMES and not lies_in(name, HOMES[lib]))
    assert not wrong, f"hf_contmerge/{name} must not import {', '.join(wrong)}: see HOMES"
    for place, allowed in NEEDS_ONLY.items():
        if lies_in(name, {place}):
            assert libraries(name) <= allowed


def test_nothing_goes_in_circles() -> None:
    list(TopologicalSorter({name: ours(name) for name in FILES if name != "__init__"}).static_order())


def test_the_tree_in_contributing_has_every_folder_and_public_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed: dict[str, set[str]] = {}
    folders: list[str] = []
    for line in text.partition("```\nhf_contmerge/\n")[2].partition("\n\n")[0].splitlines():
        first, *words = line.split()
        indent = len(line) - len(line.lstrip())
        if indent < 20:
            folders[indent // 2 - 1 :] = [first.rstrip("/")]
            listed["/".join(folders)] = set()
        else:
            words = [first, *words]
            strange = {word for word in words if "/".join([*folders, word]) not in FILES}
            assert not strange, f"CONTRIBUTING.md names {strange} in {'/'.join(folders)}"
        listed["/".join(folders)] |= set(words)
    missing = []
    for path in (p for p in PACKAGE.rglob("*") if "__pycache__" not in p.parts and not p.stem.startswith("__")):
        folder, name = str(path.relative_to(PACKAGE).parent), path.name.removesuffix(".py")
        is_part = path.is_dir() or folder == "." or (path.suffix == ".py" and not name.startswith("_"))
        place = path.name if folder == "." else f"{folder}/{name}"
        if is_part and place not in listed and name not in listed.get(folder, ()):
            missing.append(place)
    one_a_file = {"merge_rules", "train_strategies", "training/rewards"}
    assert {p.rpartition("/")[0] for p in missing} <= one_a_file, missing


def test_the_top_level_is_small() -> None:
    assert len(LEVEL) == len({wing(name) for name in FILES}) <= 16


def test_no_module_can_be_imported_in_place_of_another() -> None:
    # `accelerate launch hf_contmerge/train.py` puts hf_contmerge/ first on sys.path, and pytest tests/.
    here = {wing(name) for name in FILES} | {path.stem for path in TESTS.iterdir() if path.suffix in ("", ".py")}
    taken = (here - {"__init__"}) & (sys.stdlib_module_names | importlib.metadata.packages_distributions().keys())
    assert not taken, f"give {', '.join(sorted(taken))} another name: Python or an installed package has a module of it"
