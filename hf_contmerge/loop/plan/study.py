"""The plan of a study: its runs, their time, shared experts once."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_contmerge.loop.plan.plan import Findings, make_plan
from hf_contmerge.loop.study import StudyFolder
from hf_contmerge.run.places import JOINT
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.study import StudyCell
from hf_contmerge.training.joint import joint_train


@dataclass(frozen=True)
class StudyPlan:
    """Runs and estimated seconds of a study."""

    cells: int
    trainings: int
    """Without sharing."""
    trained: int
    """With sharing."""
    seconds: Mapping[str, float]
    """By phase, of the whole study."""
    disk_bytes: int
    """At the end, without sharing; with `keep: scores`, the most on the way."""
    findings: Findings


def plan_study(folder: StudyFolder, *, trust_remote_code: bool = False) -> StudyPlan:
    """Check the first cell of each setting; estimate the study from these."""
    findings, seconds, disk = Findings(), {"train": 0.0, "merge": 0.0, "score": 0.0}, 0
    trained: dict[str, float] = {}
    experts: dict[str, int] = {}
    merged, count = 0, 0
    for cells, plan in _plans(folder, findings, trust_remote_code):
        if not plan:
            continue
        disk += plan["total"]["disk_kept_bytes"] * len(cells)
        for phase in ("merge", "score"):
            seconds[phase] += len(cells) * sum(p["seconds"] for p in plan["phases"] if p["phase"] == phase)
        merged = max(merged, sum(p["disk_kept_bytes"] for p in plan["phases"] if p["phase"] == "merge"))
        kept = max((p["disk_kept_bytes"] for p in plan["phases"] if p["phase"] == "train"), default=0)
        training = [(p["stage"], _kind(p), p["seconds"]) for p in plan["phases"] if p["phase"] == "train"]
        names = [stage.name for stage in cells[0].recipe.stages]
        takes = {None if kind == JOINT else names[t - 1]: took for t, kind, took in training}
        for cell in cells:
            for t, kind, _ in training:
                count += 1
                stage = None if kind == JOINT else cell.recipe.stages[t - 1].name
                key = _key(cell.recipe, t, kind)
                trained[key], experts[key] = takes[stage], kept
    seconds["train"] = sum(trained.values())
    if folder.study.keep == "scores":
        disk = merged + sum(experts.values())
    return StudyPlan(len(folder.cells), count, len(trained), seconds, disk, findings)


def _plans(
    folder: StudyFolder, findings: Findings, trust_remote_code: bool
) -> Iterator[tuple[list[StudyCell], Mapping[str, Any]]]:
    """Yield each setting's cells and the plan of the first.

    Settings share most of their data, so each log line is said once.
    """
    filters = [(handler, _Once()) for handler in logging.root.handlers]
    for handler, once in filters:
        handler.addFilter(once)
    try:
        for cells in _by_setting(folder):
            yield cells, make_plan(folder.run(cells[0]), findings, trust_remote_code=trust_remote_code)
    finally:
        for handler, once in filters:
            handler.removeFilter(once)


class _Once(logging.Filter):
    """Lets each line of a handler through once."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        line = record.name, record.getMessage()
        known = line in self._seen
        self._seen.add(line)
        return not known


def _by_setting(folder: StudyFolder) -> Iterator[list[StudyCell]]:
    for setting in dict.fromkeys(cell.setting for cell in folder.cells):
        yield [cell for cell in folder.cells if cell.setting == setting]


def _kind(phase: Mapping[str, Any]) -> str:
    return phase["place"].rpartition("/")[2]


def _key(recipe: Recipe, t: int, kind: str) -> str:
    """Return a key of an expert's inputs; equal keys, equal experts."""
    stages = [s.model_dump(mode="json", include={"dataset", "train", "expert", "minus"}) for s in recipe.stages[:t]]
    if kind == JOINT:  # in any order of the stages
        key = [recipe.seed, joint_train(recipe).model_dump(mode="json"), sorted(map(json.dumps, stages))]
        return json.dumps([JOINT, recipe.base_model, *key], sort_keys=True)
    entry = [m.model_dump(mode="json") for m in recipe.merge if f"merged-{m.name}" == kind]
    train = recipe.train.model_dump(mode="json")
    start = ["base", stages[-1:]] if kind == "base" else [kind, stages, entry]
    return json.dumps([recipe.base_model, recipe.seed, train, start], sort_keys=True)
