"""Cost of folding an expert and writing the merged model."""

from __future__ import annotations

import heapq
import math
import os
from dataclasses import replace

from hf_contmerge.loop._entries import merged_dtype
from hf_contmerge.loop.plan._machine import rule_seconds
from hf_contmerge.loop.plan._planned import Cost, Host, PlannedRun
from hf_contmerge.loop.plan.disk import model_bytes, running_bytes
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging.costs import Passage, state_bytes, stream_job, weight_of
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.places import MergePlace
from hf_contmerge.run.steps import Step

_MOVED = 64
"""Bytes that a merge moves for an element besides the rule: base, expert, state, result, temporaries of each. Measured:
47 to 80 (average, ema, magmax; 44M elements)."""


def merging_cost(planned: PlannedRun, host: Host, step: Step) -> Cost:
    """Return the cost of a merge."""
    assert isinstance(step.place, MergePlace)
    weights, entry = planned.weights, step.place.entry
    rule = planned.rules[entry.name]
    threads = max(1, host.machine.cores // host.processes)
    flight = _bytes_in_flight(planned, rule, step.t, threads)
    # The digest of the result maps one tensor per core.
    digest = sum(heapq.nlargest(os.cpu_count() or 1, (weights.nbytes(n) for n in weights.names)))
    merged, state = model_bytes(weights, merged_dtype(entry)), running_bytes(weights, rule)
    seconds = _folding(weights, host, rule, step.t) / threads + host.saving(merged) + host.writing(state)
    return Cost(host.memory(max(flight, digest)), 0, seconds)


def _bytes_in_flight(planned: PlannedRun, rule: MergeRule, t: int, threads: int) -> int:
    """Return the most bytes of the tensors in work.

    The engine takes tensors in order of cost, one per thread. Each holds its mapped parts of the base, the expert and
    the old state, and the rule's working memory.
    """
    weights, expert, need = planned.weights, planned.expert_dtype(t), []
    for name in weights.names:
        job = stream_job(rule, weights, name, Passage(3))
        numel = math.prod(weights.shape(name))
        mapped = weights.nbytes(name) + numel * expert.itemsize + (_state_bytes(weights, name, rule) if t > 1 else 0)
        need.append((job.cost, job.memory + mapped))
    ordered = [memory for _, memory in sorted(need, reverse=True)]
    return max(sum(ordered[i : i + threads]) for i in range(len(ordered)))


def _state_bytes(weights: Weights, name: str, rule: MergeRule) -> int:
    floating = weights.dtype(name).is_floating_point
    return state_bytes(rule, weight_of(weights, name, 1)) if floating else 0


def _folding(weights: Weights, host: Host, rule: MergeRule, stage: int) -> float:
    """Return one thread's seconds: moved bytes and the rule's work."""
    total = 0.0
    for name in weights.names:
        weight = weight_of(weights, name, min(stage, 2))  # the state is zero before stage 1 alone
        passes = 1 if rule.share_kept(weight) is None else 1.5  # one more only reads
        total += passes * _MOVED * math.prod(weight.shape) / host.speeds.moved * host.machine.cores
        if weights.dtype(name).is_floating_point and math.prod(weight.shape):
            total += rule_seconds(rule, replace(weight, name="", depth=0.0))
    return total
