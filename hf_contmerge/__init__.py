"""hf_contmerge: continual merging of large language models.

Public names are loaded on first use.
"""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.errors import ContmergeError as ContmergeError
    from hf_contmerge.loop.callback import ContinualMergeCallback as ContinualMergeCallback
    from hf_contmerge.loop.functions import finetune_stage as finetune_stage
    from hf_contmerge.loop.functions import merge_stage as merge_stage
    from hf_contmerge.loop.functions import score_stage as score_stage
    from hf_contmerge.loop.run import run_recipe as run_recipe
    from hf_contmerge.merge_rules import MergeRule as MergeRule
    from hf_contmerge.merge_rules import Norms as Norms
    from hf_contmerge.merge_rules import Weight as Weight
    from hf_contmerge.merge_rules import get_rule as get_rule
    from hf_contmerge.merge_rules import rule_names as rule_names
    from hf_contmerge.merging.state import MergeState as MergeState
    from hf_contmerge.merging.stream import merge_experts as merge_experts
    from hf_contmerge.report.push import push_merged as push_merged
    from hf_contmerge.report.write import write_report as write_report
    from hf_contmerge.run.folder import Run as Run
    from hf_contmerge.run.recipe.schema import Recipe as Recipe
    from hf_contmerge.run.recipe.text import load_recipe as load_recipe
    from hf_contmerge.runtime.plugins import use_plugin as use_plugin
    from hf_contmerge.scoring.forgetting.matrix import ScoreMatrix as ScoreMatrix
    from hf_contmerge.scoring.score import score_model as score_model
    from hf_contmerge.training.job import TrainedExpert as TrainedExpert

__version__ = "0.1.0"

_HOMES = {
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
    "use_plugin": "runtime.plugins",
}
attach(__name__, _HOMES, "__version__")
