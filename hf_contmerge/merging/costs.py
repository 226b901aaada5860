"""What merging a tensor costs: seconds and memory, from its shape and the rule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from hf_contmerge.merge_rules import MergeRule, Weight
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Job

PIECE = 2**18
"""Elements worked on at once by rules that allow it: the float32 temporaries then stay in a core's cache. Measured on
28M elements and four experts, one thread: 0.5 s, against 2.6 s for the tensor in one go."""


PIECE_ON_GPU = 2**26


# Measured on one core; only their ratio matters, which decides who works on what.
_BYTES_PER_SECOND, _FLOPS = 2e9, 3e10

_NOT_A_LINEAR_MAP = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|shared|router|gate|\w*_router|\w*expert_gate)(\.|$)"
)


def needs_whole(rule: MergeRule, is_matrix: bool) -> bool:
    """Say whether a rule must see a weight in one piece."""
    return rule.unit == "tensor" or (rule.unit == "matrix" and is_matrix)


def is_matrix(name: str, shape: Sequence[int], vocabulary: int | None) -> bool:
    """Say whether a weight is a linear map, or a 3-D stack of them, which projection rules project.

    Vocabulary tables (embeddings, output heads; by name or by their size) and routers of expert mixtures are not.
    """
    if len(shape) not in (2, 3) or _NOT_A_LINEAR_MAP.search(name):
        return False
    return shape[0] != vocabulary


def job_of(
    rule: MergeRule,
    weight: Weight,
    shape: Sequence[int],
    nbytes: int,
    *,
    touched: int,
    group: int = 0,
    whole: bool = False,
) -> Job:
    """Estimate the work on one weight.

    `nbytes`: the size of the base's tensor. `touched`: how many more of that size are read or written. `whole`: it is
    worked on in one piece, though the rule would not ask for that.
    """
    numel, moved = math.prod(shape), nbytes * (1 + touched)
    whole = whole or needs_whole(rule, weight.is_matrix)
    seconds, memory = moved / _BYTES_PER_SECOND, 4 * (numel if whole else PIECE) * (2 * rule.slots + 4)
    if rule.unit == "matrix" and weight.is_matrix and numel:
        small, large = sorted(shape[-2:])
        seconds += touched * (numel // (small * large)) * (6 * small**2 * large + 30 * small**3) / _FLOPS
        memory += 8 * (3 * small * large + 6 * small**2)
    return Job(weight.name, seconds, memory, moved, group)


def weight_of(base: Weights, name: str, stage: int) -> Weight:
    """Return what a rule is told about a weight of the base."""
    return Weight(name, is_matrix(name, base.shape(name), base.vocabulary), stage)


def stream_job(rule: MergeRule, base: Weights, name: str, touched: int, group: int, *, whole: bool = False) -> Job:
    """Estimate the work on one weight. `touched`, `whole`: as `merge_tensor.job_of` has them."""
    weight, shape, nbytes = weight_of(base, name, 1), base.shape(name), base.nbytes(name)
    return job_of(rule, weight, shape, nbytes, touched=touched, group=group, whole=whole)
