"""Full fine-tuning: every weight is trained.

By AdamW, unless the recipe's `optim` is another: Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101.
"""

from dataclasses import dataclass

from hf_contmerge.train_strategies import TrainStrategy


@dataclass
class Full(TrainStrategy):
    """W <- W - rate * (step + weight_decay * W), with the optimizer's step; nothing else is changed."""

    carrier = True
    bytes_per_parameter = 16
