"""The merge phase of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_contmerge.loop._choice import Choice, choose
from hf_contmerge.loop._job import MergeJob
from hf_contmerge.loop.relevance import effects_at
from hf_contmerge.loop.stages import keep_scores
from hf_contmerge.merging.analysis import merge_geometry, ownership
from hf_contmerge.merging.in_mergekit.replay import mergekit_yaml
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.run.folder import evenly_spread
from hf_contmerge.run.places import Place, Record
from hf_contmerge.runtime.files import remove, write_atomically
from hf_contmerge.runtime.records import seal_yaml

_COMPARED = 16
"""Experts whose task vectors are compared with each other."""


def merge_at(job: MergeJob) -> Record:
    """Merge at a place, on all ranks; return the record.

    Raises:
        BudgetError: no merge passes the recipe's guard.
    """
    place, guard, choice = job.place, job.run.recipe.guard, None
    with job.recorder.phase(place, "merge") as record:
        effects = job.crew.ranks.first(effects_at, job)
        if guard or place.entry.auto:
            choice = choose(job, guard)
            merge = choice.taken.merge
        else:
            merge = job.start().fold([job.newest()], job.scratch("running"), merged=job.output(), crew=job.crew)
        survival = choice.survival if choice else merge.survival
        if job.recorder.is_main:
            record.update(_published(job, merge, choice))
            if effects:
                record["relevance"] = effects
            if survival:
                record["stored"] = survival.to_json()
                survival.warn(f"merge {place.folder.relative_to(job.run.folder / 'stages')}")
    return record


def _published(job: MergeJob, merge: RunningMerge, choice: Choice | None) -> Record:
    """Publish state and model; return their record."""
    place = job.place
    running, merged = place.publish("running"), place.publish("merged")
    if choice:
        place.scratch("validation")
        scratch, record = Place(place.folder / ".validation"), Record()
        keep_scores(record, scratch, choice.taken.scores, job.measuring)
        scratch.finish("score", record)
        place.publish("validation")
    remove(place.guard_file)
    _write_mergekit_recipe(job, merge)
    stages, own = [expert.stage for expert in merge.experts], job.own(merge)
    owners = {"ownership": ownership(Weights(merge.base), running, stages)} if merge.rule.selects else {}
    return {
        "rule": merge.rule_name, "parameters": merge.rule.parameters(), "reference": merge.rule.reference,
        "start_from": job.kind, "scale": merge.scale,
        "norms": {"experts": [e.norm for e in own], "running": merge.running_norm},
        "expert_sha256": [e.sha256 for e in own], "model_sha256": weights_sha256(merged),
        "geometry": _geometry(merge, own, merged),
        **owners, **({"amplification": merge.trust.amplification} if merge.trust else {}),
        **_deviations(job, merge, choice),
    }  # fmt: skip


def _geometry(merge: RunningMerge, experts: Sequence[FoldedExpert], merged: Path) -> dict[str, Any]:
    """Compare the task vectors of experts and merge.

    Of many experts, some are compared, so that the cost of a stage does not grow: `compared` lists their numbers, from
    1.
    """
    chosen = evenly_spread(len(experts), _COMPARED)
    found = merge_geometry(merge.base, [experts[number - 1].folder for number in chosen], merged)
    return found if len(chosen) == len(experts) else {**found, "compared": list(chosen)}


def _deviations(job: MergeJob, merge: RunningMerge, choice: Choice | None) -> dict[str, Any]:
    """Return the deviations from the recipe, for later stages."""
    record: dict[str, Any] = choice.to_json(job.run.recipe.guard) if choice else {}
    if job.prepared.published:
        record["published"] = job.prepared.published.records()
    if not job.holds_one_a_stage(merge):
        record["folded"] = job.parts(merge)
    if merge.factor != 1.0:
        record["factor"] = merge.factor
    name, rule = job.rule()
    if choice and choice.taken.what == "rule":
        name, rule = merge.rule_name, merge.rule
    if name != job.place.entry.rule or rule.parameters() != job.prepared.rules[job.place.entry.name].parameters():
        record["goes_on"] = {"rule": name, "parameters": rule.parameters()}
    return record


def _write_mergekit_recipe(job: MergeJob, merge: RunningMerge) -> None:
    """Write merge.yml, unless the merge lacks experts here."""
    file = job.place.mergekit_recipe
    remove(file)
    if merge.experts and not job.prepared.published:
        text = mergekit_yaml(
            merge.rule_name, merge.rule, base=job.run.base_model, experts=merge.experts,
            dtype=job.dtype, rounding=job.place.entry.rounding, scale=None if merge.factor == 1.0 else merge.scale,
        )  # fmt: skip
        write_atomically(file, seal_yaml(text))
