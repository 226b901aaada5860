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
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Run": "run_folder",
    "ContmergeError": "errors",
    "ScoreMatrix": "forgetting",
    "MergeState": "merge_state",
    "merge_experts": "merge_stream",
    "finetune_stage": "stage_functions",
    "merge_stage": "stage_functions",
    "score_stage": "stage_functions",
    "TrainedExpert": "stage_training",
    "ContinualMergeCallback": "merge_callback",
    "score_model": "scoring",
    "write_report": "report",
    "push_merged": "publish",
    "run_recipe": "train",
}
__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
