"""hf_contmerge: continual merging of large language models. Public names are loaded on first use."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MergeRule": "merge_rules",
    "Norms": "merge_rules",
    "Weight": "merge_rules",
    "get_rule": "merge_rules",
    "rule_names": "merge_rules",
    "Recipe": "run.recipe.schema",
    "load_recipe": "run.recipe.text",
    "Run": "run.folder",
    "ContmergeError": "errors",
    "ScoreMatrix": "scoring.forgetting.matrix",
    "MergeState": "merging.state",
    "merge_experts": "merging.stream",
    "finetune_stage": "loop.functions",
    "merge_stage": "loop.functions",
    "score_stage": "loop.functions",
    "TrainedExpert": "training.job",
    "ContinualMergeCallback": "loop.callback",
    "score_model": "scoring.score",
    "write_report": "report.write",
    "push_merged": "report.push",
    "run_recipe": "loop.run",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
