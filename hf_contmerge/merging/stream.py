"""Streamed merging: one read and write per tensor and pass.

    pass 1, per tensor:  base.w, expert.w ... -> task_vectors -> rule.update(old running.w) -> new running.w    + norms
    between:             norms -> rule.scale() -> one number
    pass 2, per tensor:  base.w + scale * rule.read_out(running.w) -> cast -> merged.w

A rule whose scale does not depend on the norms needs no second pass: both are one. Memory holds the tensors in flight
and a few floats, whatever the size of the model and the number of experts. Where a rule works element by element, a
tensor is worked on in pieces that fit the processor's cache. Where all experts are adapters and the rule allows it, a
weight's state stays in low-rank factors. Arithmetic is float32, projections float64; norms are summed in float64.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging._fold import Fold
from hf_contmerge.merging._thresholds import find_thresholds
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.trust import Trust
from hf_contmerge.merging.write import Merged, Output, write_merged
from hf_contmerge.models.experts import Expert
from hf_contmerge.models.folder import copy_companions
from hf_contmerge.models.layout import weights_like
from hf_contmerge.models.statistics import Statistics, check_statistics
from hf_contmerge.models.weights import Weights, WeightsWriter
from hf_contmerge.runtime.crew import Crew


@dataclass(frozen=True)
class Folded(Merged):
    """A merge, and how far an ill-posed rule's result is known."""

    trust: Trust | None = None


LOG = logging.getLogger(__name__)


def merge_experts(
    rule: MergeRule,
    base: Weights,
    experts: Sequence[Expert],
    *,
    running: Path | None = None,
    earlier: Sequence[float] = (),
    running_out: Path | None = None,
    merged_out: Output | None = None,
    rules: Sequence[MergeRule] = (),
    crew: Crew | None = None,
) -> Folded:
    """Fold experts into a rule's state; write state, model or both.

    Args:
        rule: the method.
        base: the pretrained model, against which all task vectors are taken.
        experts: in stage order.
        running: the state so far; None before the first stage. It is read, never changed.
        earlier: the norms of the experts in it, in stage order.
        running_out: an empty folder for the new state.
        merged_out: where the merged model goes.
        rules: of each expert, where they differ in fields `of_newest`.
        crew: the threads and ranks that do it; this process with all its cores, if not said.

    Raises:
        ModelError: a file is damaged, a weight is not finite, or an expert lacks statistics that the rule needs.
    """
    crew = crew or Crew()
    statistics = _statistics(rule, experts, crew) if rule.needs else []
    one_host = crew.ranks.size <= crew.ranks.per_host  # several must share whole files, and two outputs cut differently
    at_once = merged_out if one_host and not rule.whole_model_scale else None
    scratch = merged_out.folder / ".running" if merged_out and not at_once and not running_out else None
    state_out = running_out or scratch
    if state_out:
        crew.ranks.first(state_out.mkdir, exist_ok=True)
    before, thresholds = Running(running) if running else None, find_thresholds(rule, base, experts, crew)
    fold = Fold(rule, base, experts, before, len(earlier), crew, statistics, rules, thresholds)
    norms, survival, trust = fold.run(earlier, state_out, at_once, None if at_once else merged_out)
    found = Folded(norms, rule.scale(norms), survival, trust)
    if norms.running == 0:
        LOG.warning("No expert differs from the base %s in any weight: the merged model is the base", base.folder)
    if merged_out and not at_once:
        assert state_out is not None
        only = experts[0] if len(norms.experts) == 1 else None
        survival = write_merged(rule, base, state_out, found, merged_out, only=only, crew=crew)
        found = replace(found, survival=survival)
    if scratch:
        crew.ranks.first(shutil.rmtree, scratch)
    return found


def _statistics(rule: MergeRule, experts: Sequence[Expert], crew: Crew) -> list[Statistics]:
    folders = [expert.folder for expert in experts]
    crew.ranks.first(check_statistics, rule, folders)
    return crew.ranks.all(lambda: [Statistics(folder) for folder in folders])


def write_sum(base: Path, expert: Path, minus: Path, out: Path) -> None:
    """Write base + (expert - minus) in float32, as a model folder.

    So an instruction vector (instruct - its base) becomes a stage like any other (arXiv 2310.04799, 2409.19854). The
    tokenizer, chat template and generation config are the instruct model's.
    """
    weights = Weights(base)
    plus, less = weights_like(weights, expert), weights_like(weights, minus)
    floating = set(weights.floating())
    plan = [(n, weights.shape(n), torch.float32 if n in floating else weights.dtype(n)) for n in weights.names]
    with WeightsWriter(out, plan) as writer:
        for name in writer.names:
            tensor = weights.tensor(name)
            if name in floating:
                tensor = tensor.float() + (plus.tensor(name).float() - less.tensor(name).float())
                if not bool(torch.isfinite(tensor).all()):
                    raise ModelError(
                        f"{name} of {base} + ({expert} - {minus}) is not finite everywhere. One of the three is "
                        "damaged, or its training diverged: fetch or train it again."
                    )
            writer.write(name, tensor)
    copy_companions(base, out, dtype=torch.float32, tokenizer_from=expert)
