"""Runs train, merge and score, stage after stage."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.loop.callback import ContinualMergeCallback as ContinualMergeCallback
    from hf_contmerge.loop.functions import finetune_stage as finetune_stage
    from hf_contmerge.loop.functions import merge_stage as merge_stage
    from hf_contmerge.loop.functions import score_stage as score_stage
    from hf_contmerge.loop.run import run_recipe as run_recipe

attach(
    __name__,
    {
        "ContinualMergeCallback": "callback",
        "finetune_stage": "functions",
        "merge_stage": "functions",
        "run_recipe": "run",
        "score_stage": "functions",
    },
)
