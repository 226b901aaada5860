"""Estimates of memory, disk and time per phase.

    train   weights, gradients, Adam, activations, head: a dry step (_dry_step.py); written files
    merge   tensors in flight, as counted by the engine (merging/costs.py), mapped pages, the process itself
    score   weights, activations and logits of a batch: a dry batch

Seconds are operations over measured speeds (_machine.py), precise enough to separate minutes from hours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from hf_contmerge.loop.plan._merging import merging_cost
from hf_contmerge.loop.plan._planned import Cost, Host, PlannedRun
from hf_contmerge.loop.plan._scoring import scoring_cost
from hf_contmerge.loop.plan._training import (
    given_expert_cost,
    joint_cost,
    remembered_bytes,
    synthesised_bytes,
    trained_part,
    training_cost,
)
from hf_contmerge.loop.plan.disk import DiskUse, disk_use
from hf_contmerge.run.places import JOINT, ExpertPlace
from hf_contmerge.run.steps import Step


@dataclass(frozen=True)
class PhaseEstimate:
    """A phase with its cost and disk use."""

    step: Step
    cost: Cost
    disk: DiskUse


def estimates(planned: PlannedRun, host: Host, steps: Iterable[Step]) -> Iterator[PhaseEstimate]:
    """Yield the phases' estimates, as if none were finished.

    Raises:
        ModelError: transformers does not know the architecture.
    """
    return (PhaseEstimate(s, _cost(planned, host, s), _disk(planned, s)) for s in steps)


def _cost(planned: PlannedRun, host: Host, step: Step) -> Cost:
    if step.phase == "merge":
        return merging_cost(planned, host, step)
    if step.phase == "score":
        return scoring_cost(planned, host, step)
    if isinstance(step.place, ExpertPlace) and step.place.kind == JOINT:
        return joint_cost(planned, host)
    stage = planned.run.stage(step.t)
    if stage.dataset:
        earlier = any(planned.run.stage(i).dataset for i in range(1, step.t))
        past = earlier and isinstance(step.place, ExpertPlace) and not step.place.alone(step.t)
        return training_cost(planned, host, stage.name, planned.recipe.train_of(stage), past=past)
    return given_expert_cost(planned, host, step)


def _disk(planned: PlannedRun, step: Step) -> DiskUse:
    use = disk_use(step, planned.run, planned.weights, planned.rules, trained_part(planned))
    return replace(use, kept=use.kept + remembered_bytes(planned, step) + synthesised_bytes(planned, step))
