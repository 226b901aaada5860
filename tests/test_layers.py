"""Who may import whom, read from the source: imports inside functions count too."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "hf_contmerge"

# A module imports from the rows above its own only, so that the modules of a row never import each other.
LAYERS = (
    ("errors", "merge_rules"),  # the speech, the maths
    ("recipe_data", "model_names", "task_suites"),
    ("recipe_measure", "recipe_text"),
    ("recipe", "quickstart_texts"),  # the nouns
    ("recipe_changes", "places", "tensor_files", "work_sharing", "adapter_settings"),
    ("run_folder", "progress", "merge_files", "merge_words", "adapter_base", "factored", "merge_tensor"),
    ("corpus_files", "corpus_forms", "task_scores"),
    # parts of a phase
    ("corpus", "forgetting", "uncertainty", "score_cache", "model_folder", "train_strategies"),
    (
        "running_state",
        "task_digest",
        "adapter_layout",
        "mergekit_words",
        "model_in_memory",
        "launching",
        "trackers",
        "phase_record",
        "guard",
    ),
    (
        "model_card",
        "report_findings",
        "report_labels",
        "report_style",
        "adapter_files",
        "adapter_writer",
        "stage_trainer",
        "training_log",
        "tuning",
    ),
    ("report_tables", "report_panels", "experts", "loaded_model", "model_headers", "dry_step", "plan_machine"),
    ("report_examples", "report_merges", "report_choices", "geometry"),
    ("report_pages", "report_pictures"),
    ("merge_write", "score_key", "lm_results", "lm_model", "scoring_setup"),
    ("merge_fold", "run_phases", "preference", "vector_guards", "task_files", "lm_tasks"),
    ("finetune", "merge_stream", "scoring", "report", "publish"),  # the phases, which talk through the run folder
    ("mergekit_tensors", "mergekit_recipe", "state_log", "preflight", "compare"),
    ("merge_state", "mergekit_plugin", "plan_estimates", "merge_bench"),  # merging without a run
    ("merged_adapter", "ownership", "stage_training", "stage_scores", "trained_layout", "merge_choice"),
    ("stage_functions", "merge_phase"),  # the phases, for scripts that have no recipe
    ("merge_callback",),
    ("_autoload", "train", "merge_cli", "score_cli", "new_recipe", "plan"),  # the entry points
    ("cli", "__init__"),
)
LEVEL = {module: level for level, row in enumerate(LAYERS) for module in row}

# Heavy or fast-moving libraries, and the modules that know them.
TRAINING = {"corpus_forms", "finetune", "model_folder", "scoring", "stage_trainer", "task_files", "train_strategies"}
KNOWN_BY = {
    "transformers": TRAINING
    | {
        "scoring_setup",
        "training_log",
        "dry_step",
        "model_headers",
        "plan_estimates",
        "loaded_model",
        "model_in_memory",
        "merge_callback",
    },
    "trl": TRAINING | {"dry_step", "plan", "preference"},
    "peft": {"loaded_model", "preference", "train_strategies"},  # adapters are merged and written without it
    "lm_eval": {"lm_model", "lm_tasks", "scoring"},
    "mergekit": {"mergekit_plugin", "mergekit_tensors", "cli"},  # cli: `contmerge yaml` is mergekit's own command
    "huggingface_hub": {"lm_tasks", "model_card", "model_folder", "model_headers", "publish"},
    "matplotlib": {"ownership", "report", "report_labels", "report_pictures"},
}

# Modules whose imports from outside are few on purpose, beside the standard library.
NEEDS_ONLY: dict[str, set[str]] = {
    "errors": set(),
    "merge_rules": {"torch"},
    "recipe": {"pydantic", "yaml"},  # these and run_folder answer "is all of this done?" at once: no torch
    "recipe_data": {"pydantic"},
    "task_suites": {"yaml"},
    "recipe_measure": {"pydantic"},
    "recipe_text": {"yaml"},
    "recipe_changes": set(),
    "places": set(),
    "factored": {"torch"},
    "merge_tensor": {"torch"},
    "run_folder": set(),
    "score_cache": set(),  # these answer "has it been measured?" at once
    "score_key": set(),
    "task_digest": {"yaml"},
    "_autoload": set(),  # runs at every `import torch`
    "__init__": set(),
}


def files() -> dict[str, list[Path]]:
    """Return module -> its files; a folder of rules or strategies counts as one module."""
    found = {path.stem: [path] for path in PACKAGE.glob("*.py")}
    return found | {path.parent.name: sorted(path.parent.glob("*.py")) for path in PACKAGE.glob("*/__init__.py")}


def imports(path: Path) -> Iterator[str]:
    """Yield the dotted names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports fail under `accelerate launch hf_contmerge/train.py`"
            assert node.module
            # Our modules name each other, not the lazy public names of the package, behind which any module may be.
            names = [alias.name for alias in node.names if alias.name != "__version__"]
            yield from (f"hf_contmerge.{n}" for n in names) if node.module == "hf_contmerge" else (node.module,)


def imported_by(module: str) -> tuple[set[str], set[str]]:
    """Return the modules of ours and the libraries that a module imports."""
    dotted = [name.split(".") for path in files()[module] for name in imports(path)]
    ours = {parts[1] for parts in dotted if parts[0] == "hf_contmerge" and len(parts) > 1} - {module}
    return ours, {parts[0] for parts in dotted} - {"hf_contmerge"} - sys.stdlib_module_names


every_module = pytest.mark.parametrize("module", sorted(files()))


@every_module
def test_arrows_go_down(module: str) -> None:
    assert module in LEVEL, (
        f"hf_contmerge/{module} is new: add it to LAYERS in tests/test_layers.py, below all that it imports"
    )
    ours, _ = imported_by(module)
    wrong = sorted(other for other in ours if LEVEL.get(other, len(LAYERS)) >= LEVEL[module])
    assert not wrong, f"hf_contmerge/{module} must not import {', '.join(wrong)}: see LAYERS in tests/test_layers.py"


@every_module
def test_libraries_are_imported_where_they_belong(module: str) -> None:
    _, libraries = imported_by(module)
    wrong = sorted(lib for lib in libraries if lib in KNOWN_BY and module not in KNOWN_BY[lib])
    assert not wrong, f"hf_contmerge/{module} must not import {', '.join(wrong)}: see KNOWN_BY in tests/test_layers.py"
    if module in NEEDS_ONLY:
        assert libraries <= NEEDS_ONLY[module]


def test_merge_rules_stand_alone() -> None:
    assert imported_by("merge_rules")[0] == set()


def test_no_module_can_be_imported_in_place_of_another() -> None:
    # `accelerate launch hf_contmerge/train.py` puts hf_contmerge/ first on sys.path, and pytest tests/.
    ours = {*files(), *(path.stem for path in TESTS.glob("*.py"))} - {"__init__"}
    taken = ours & (sys.stdlib_module_names | importlib.metadata.packages_distributions().keys())
    assert not taken, f"give {', '.join(sorted(taken))} another name: Python or an installed package has a module of it"
