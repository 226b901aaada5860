"""Scores and forgetting of a growing merge.

Files next to the state:

STATE/measured/settings.json          tasks and settings, equal for all stages to keep scores comparable
STATE/measured/base/                  score.json and score.parquet of the base
STATE/stages/law/measured/expert/     the same for the stage's expert
STATE/stages/law/measured/merged/     the same for the merge of all stages so far
STATE/stages/law/scores.json          summary of these scores, and forgetting per task
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RecipeError
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.parts import Evaluate, SameWithin, Task
from hf_contmerge.run.scores import Scores, load_scores
from hf_contmerge.runtime.records import read_record, write_record
from hf_contmerge.scoring.forgetting.paired import mean_change, same_documents


@dataclass(frozen=True)
class StageScores:
    """The scores of a merge state."""

    folder: Path
    """The state's folder."""

    @property
    def base(self) -> Place:
        return Place(self.folder / "measured" / "base")

    @property
    def settings_file(self) -> Path:
        return self.folder / "measured" / "settings.json"

    def expert(self, stage: str) -> Place:
        return Place(self.folder / "stages" / stage / "measured" / "expert")

    def merged(self, stage: str) -> Place:
        return Place(self.folder / "stages" / stage / "measured" / "merged")

    def settings(self, tasks: Iterable[Task], evaluate: Evaluate) -> tuple[list[Task], Evaluate]:
        """Add the tasks of earlier stages; check the settings.

        Raises:
            RecipeError: the settings or a task differ from earlier stages, whose scores would not be comparable.
        """
        file = self.settings_file
        if not file.is_file():
            return list(tasks), evaluate
        saved = read_record(file, f"Restore it from a copy, or remove {file.parent} to measure anew.")
        before, by_name = Evaluate.model_validate(saved["evaluate"]), {t["name"]: Task(**t) for t in saved["tasks"]}
        if evaluate.include_path is None:
            evaluate = evaluate.model_copy(update={"include_path": before.include_path})
        then, now = before.measured_by(), evaluate.measured_by()
        for word in now:
            if now[word] != then[word]:
                raise RecipeError(
                    f"The earlier stages of {self.folder} were measured with {word} {then[word]}, and now "
                    f"it is {now[word]}: the scores would not be comparable. Use the same value, or remove "
                    f"{file.parent} to start over."
                )
        for task in tasks:
            if by_name.setdefault(task.name, task) != task:
                raise RecipeError(
                    f"The task {task.name} differs from the task of this name in earlier stages of {self.folder}. "
                    "Rename it."
                )
        return list(by_name.values()), evaluate

    def keep_settings(self, tasks: Sequence[Task], evaluate: Evaluate) -> None:
        """Write tasks and settings for later stages."""
        kept = {"evaluate": evaluate.model_dump(mode="json"), "tasks": [t.model_dump(mode="json") for t in tasks]}
        write_record(self.settings_file, kept)

    def summary(self, stages: Sequence[str], same_within: SameWithin) -> dict[str, Any]:
        """Return the last stage's scores and forgetting."""
        last = stages[-1]
        rows = {"base": self.base, "expert": self.expert(last), "merged": self.merged(last)}
        return {
            "stage": last,
            "stages": list(stages),
            "scores": {name: _short(load_scores(place)) for name, place in rows.items()},
            "forgetting": self.forgetting(stages, same_within),
        }

    def forgetting(self, stages: Sequence[str], same_within: SameWithin) -> dict[str, dict[str, Any]]:
        """Compare each task's score with its best earlier score.

        As in Chaudhry et al. (ECCV 2018), per task: `change` is utility now - best over the base and earlier merges.
        It is negative for forgetting, and has a paired 95 % interval over the same documents. Utilities: accuracy, or
        -ln(perplexity). A change below `same_within` is "the same".
        """
        rows = [("base", load_scores(self.base)), *((s, load_scores(self.merged(s))) for s in stages)]
        now = rows[-1][1]
        return {task: _row(task, now, rows[:-1], same_within.model_dump()) for task in now}


def table(summary: dict[str, Any]) -> list[str]:
    """Return a stage's scores as lines for a log."""
    lines = []
    for task, row in summary["forgetting"].items():
        parts = [f"{name} {scores[task]['value']:.4g}" for name, scores in summary["scores"].items() if task in scores]
        since = f"; {row['seen']} since {row['best_after']} ({row['best']:.4g})" if "best" in row else ""
        lines.append(f"{task} ({row['metric']}): {', '.join(parts)}{since}")
    return lines


def _short(scores: Scores) -> dict[str, dict[str, Any]]:
    return {
        name: {"metric": s.metric, "value": s.value, "utility": s.utility, "stderr": s.stderr}
        for name, s in scores.items()
    }


def _row(task: str, now: Scores, earlier: Sequence[tuple[str, Scores]], matters: Mapping[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"metric": now[task].metric, "now": now[task].value}
    comparable = [
        (name, scores) for name, scores in earlier if task in scores and same_documents(now[task], scores[task])
    ]
    if not comparable:
        return row
    after, best = max(comparable, key=lambda pair: pair[1][task].utility)
    change = mean_change([(now, best, [task])], now[task].block)
    if change is None:
        return row
    return row | {
        "best": best[task].value, "best_after": after, "change": change.mean, "low": change.low, "high": change.high,
        "seen": replace(change, matters=matters[now[task].block]).seen,
    }  # fmt: skip
