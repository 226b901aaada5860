"""Full fine-tuning: every weight is trained."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from hf_contmerge.train_strategies import TrainStrategy


@dataclass(frozen=True)
class Full(TrainStrategy):
    """Train all weights, change nothing else."""

    def open(self, model: PreTrainedModel) -> PreTrainedModel:
        return model

    def close(self, model: PreTrainedModel) -> PreTrainedModel:
        return model
