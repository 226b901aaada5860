"""Full fine-tuning: every weight is trained."""

from dataclasses import dataclass

from hf_contmerge.train_strategies import TrainStrategy


@dataclass
class Full(TrainStrategy):
    """Train all weights, change nothing else."""

    carrier = True
    bytes_per_parameter = 16
