"""Trains one expert with TRL; resumable."""

from typing import TYPE_CHECKING

from hf_contmerge.runtime.lazy import attach

if TYPE_CHECKING:
    from hf_contmerge.training.data import load_stage_data as load_stage_data
    from hf_contmerge.training.finetune import train_expert as train_expert
    from hf_contmerge.training.job import TrainedExpert as TrainedExpert

attach(__name__, {"TrainedExpert": "job", "load_stage_data": "data", "train_expert": "finetune"})
