"""Pass 0: each expert's largest elements over the whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging._pieces import Piece
from hf_contmerge.merging.costs import Passage, piece_size, stream_job, weight_of
from hf_contmerge.models.experts import Expert
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew, Job

_SHIFT = 15  # of the 31 bits of a float32's size, the upper 16 number its bin: the exponent's, and 8 of the mantissa

Histogram = Mapping[int, int]
"""Bin -> number of elements; larger elements have larger bins."""


def find_thresholds(rule: MergeRule, base: Weights, experts: Sequence[Expert], crew: Crew) -> list[float]:
    """Return each expert's smallest size among the `share_kept` largest.

    Histograms of all weights are summed: integers, so no order of threads or ranks matters.
    """
    shares = {name: rule.share_kept(weight_of(base, name, 1)) for name in base.floating()}
    counted = {name: share for name, share in shares.items() if share is not None}
    if not counted:
        return []
    total = sum(math.prod(base.shape(name)) for name in counted)

    def work(job: Job) -> list[Histogram]:
        return [_of_weight(base, job.name, expert, crew) for expert in experts]

    passage = Passage(len(experts), piece=piece_size(crew.device))
    found = crew.run([stream_job(rule, base, n, passage) for n in counted], work, what="finding the largest changes")
    share = next(iter(counted.values()))
    return [threshold((parts[i] for parts in found.values()), share, total) for i in range(len(experts))]


def _of_weight(base: Weights, name: str, expert: Expert, crew: Crew) -> Histogram:
    if expert.rank(name) == 0:
        return {}
    tensor, counts = base.tensor(name), dict[int, int]()
    size = tensor.numel() if expert.is_whole(name) else piece_size(crew.device)
    read = expert.reader(name, tensor)
    for start in range(0, tensor.numel(), size):
        piece = Piece(start, min(start + size, tensor.numel()), (-1,))
        wide = piece.of(tensor.reshape(-1)).to(crew.device).float()
        for number, count in histogram(read(piece.start, piece.stop, wide)).items():
            counts[number] = counts.get(number, 0) + count
    return counts


def histogram(x: Tensor) -> Histogram:
    """Return the histogram of |x|, without empty bins."""
    counts = (x.float().abs().reshape(-1).view(torch.int32) >> _SHIFT).bincount()
    bins = counts.nonzero()[:, 0]
    return dict(zip(bins.tolist(), counts[bins].tolist(), strict=True))


def threshold(parts: Iterable[Histogram], share: float, total: int) -> float:
    """Return the lower edge of the `share` largest elements' last bin.

    `total`: the number of all elements; those that no histogram counts are zeros.
    """
    sums: dict[int, int] = {}
    for part in parts:
        for number, count in part.items():
            sums[number] = sums.get(number, 0) + count
    left = max(1, int(share * total))
    for number in sorted(sums, reverse=True):
        left -= sums[number]
        if left <= 0:
            return float(torch.tensor(number << _SHIFT, dtype=torch.int32).view(torch.float32))
    return 0.0
