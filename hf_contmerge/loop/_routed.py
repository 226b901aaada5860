"""Scores of experts with a router, from scores by document."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hf_contmerge.errors import RunError, shell_word
from hf_contmerge.loop.stages import Measuring, keep_scores
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ORACLE, Place
from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.scores import Scores, load_scores, scored_tasks
from hf_contmerge.scoring.files import heldout_documents
from hf_contmerge.scoring.routing import (
    BASE,
    CHARS,
    PROMPTS,
    Router,
    confusion,
    features_sha256,
    prompt_features,
    routed_score,
)
from hf_contmerge.training.data import StageData, prompts
from hf_contmerge.training.tokenizer import stage_tokenizer

if TYPE_CHECKING:
    from hf_contmerge.loop.plan.checks import Prepared

Picks = dict[str, list[int]]
"""Task -> the stage that answers each document, from 0."""


def route_at(run: Run, prepared: Prepared, place: Place, tasks: Sequence[Task], how: Measuring) -> None:
    """Write the scores of a router's picks; `place` names the router."""
    ranks = how.recorder.crew.ranks
    if ranks.first(lambda: set(scored_tasks(place)) >= {task.name for task in tasks}):
        return
    with how.recorder.phase(place, "score") as record:
        if how.recorder.is_main:
            routed, base = RoutedRun(run, prepared), load_scores(run.base)
            picks, more = routed.oracle(base) if place.folder.name == ORACLE else routed.router(base)
            experts = dict(enumerate(load_scores(run.expert(t, "base")) for t in run.stage_numbers()))
            models: dict[int, Scores] = {BASE: base, **experts}
            scores = {
                name: routed_score({k: scores[name] for k, scores in models.items()}, chosen)
                for name, chosen in picks.items()
            }
            keep_scores(record, place, scores, how)
            record.update(more)


class RoutedRun:
    """The choices of routers for a run's documents."""

    def __init__(self, run: Run, prepared: Prepared) -> None:
        self.run, self.prepared = run, prepared
        self.stages = [stage.name for stage in run.recipe.stages]
        self.own = {task: k for k, stage in enumerate(run.recipe.stages) for task in stage.task_names()}

    def oracle(self, base: Scores) -> tuple[Picks, dict[str, Any]]:
        """Pick each document's own stage; of general tasks, the base."""
        return {name: [self.own.get(name, BASE)] * len(score.gains) for name, score in base.items()}, {}

    def router(self, base: Scores) -> tuple[Picks, dict[str, Any]]:
        """Pick by prompt; return the router's record, too."""
        data = self.prepared.data
        known = [prompts(data[name].train, data[name].form, count=PROMPTS) for name in self.stages]
        asked = {name: self._prompts(name, score.texts, len(score.gains)) for name, score in base.items()}
        texts = [text[:CHARS] for part in (*known, *asked.values()) for text in part]
        trust = self.run.recipe.trust_remote_code
        features = prompt_features(self.prepared.base, texts, trust_remote_code=trust)
        parts = features.split([len(part) for part in (*known, *asked.values())])
        router = Router.fit(parts[: len(known)])
        picks = {
            name: router.pick(part, or_base=name not in self.own)
            for name, part in zip(asked, parts[len(known) :], strict=True)
        }
        by_source: Picks = {}
        for name, chosen in picks.items():
            by_source.setdefault(self.stages[self.own[name]] if name in self.own else "general", []).extend(chosen)
        record = {"prompts": [len(part) for part in known], "features_sha256": features_sha256(features)}
        return picks, {"router": {**record, "confusion": confusion(self.stages, by_source)}}

    def _prompts(self, task: str, texts: Sequence[str], count: int) -> list[str]:
        """Return the prompts of a task's documents; held-out examples lose their answers."""
        if len(texts) != count:
            raise RunError(
                f"The scores of the base have no texts of the task {task}, so they cannot be routed. Score it again "
                f"with `contmerge redo {shell_word(self.run.folder)} score`, then run the recipe again."
            )
        stage = next((s for s in self.run.recipe.stages if s.heldout_task == task), None)
        if not stage or not stage.dataset:
            return list(texts)
        data = self.prepared.data[stage.name]
        asked = self._heldout_prompts(data, stage.dataset.heldout_chars) if data.form != "text" else {}
        return [asked.get(text, text) for text in texts]

    def _heldout_prompts(self, data: StageData, chars: int) -> dict[str, str]:
        """Return document as scores keep it -> its prompt."""
        recipe = self.run.recipe
        load = partial(stage_tokenizer, self.prepared.base, recipe.train, trust_remote_code=recipe.trust_remote_code)
        documents = heldout_documents(data, chars=chars, load_tokenizer=load)
        return {
            document.strip()[:CHARS]: prompt
            for document, prompt in zip(documents, prompts(data.heldout, data.form), strict=True)
        }
