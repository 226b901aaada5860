"""What was measured of a growing merge, stage after stage, and what was forgotten; kept beside the state.

STATE/measured/settings.json          which tasks, and how: the same for all stages, so that scores can be compared
STATE/measured/base/                  score.json and score.parquet of the base
STATE/stages/law/measured/expert/     of the stage's expert
STATE/stages/law/measured/merged/     of all stages so far, merged
STATE/stages/law/scores.json          all of that in short, and a table of what was forgotten
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RecipeError
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.scores import Scores, load_scores
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.scoring.forgetting.paired import mean_change, same_documents


@dataclass(frozen=True)
class StageScores:
    """The scores that belong to a state."""

    folder: Path
    """The state's."""

    @property
    def base(self) -> Place:
        return Place(self.folder / "measured" / "base")

    def expert(self, stage: str) -> Place:
        return Place(self.folder / "stages" / stage / "measured" / "expert")

    def merged(self, stage: str) -> Place:
        return Place(self.folder / "stages" / stage / "measured" / "merged")

    def settings(self, tasks: Iterable[Task], evaluate: Evaluate) -> tuple[list[Task], Evaluate]:
        """Return what to measure, and how: the tasks of earlier stages too, or what was forgotten cannot be seen.

        Raises RecipeError if earlier stages measured in another way, whose scores could not be compared.
        """
        file = self.folder / "measured" / "settings.json"
        if not file.is_file():
            return list(tasks), evaluate
        there = json.loads(file.read_text(encoding="utf-8"))
        before, known = Evaluate.model_validate(there["evaluate"]), {t["name"]: Task(**t) for t in there["tasks"]}
        if evaluate.include_path is None:
            evaluate = evaluate.model_copy(update={"include_path": before.include_path})
        then, now = before.measured_by(), evaluate.measured_by()
        for word in now:
            if now[word] != then[word]:
                raise RecipeError(
                    f"The earlier stages of {self.folder} were measured with {word} {then[word]}, and now "
                    f"it is {now[word]}: their scores could not be compared. Give the same, or remove "
                    f"{file.parent} to begin anew."
                )
        for task in tasks:
            if known.setdefault(task.name, task) != task:
                raise RecipeError(
                    f"The task {task.name} was another one in the earlier stages of {self.folder}. Rename it."
                )
        return list(known.values()), evaluate

    def keep_settings(self, tasks: Sequence[Task], evaluate: Evaluate) -> None:
        """Write what is measured, for the stages to come."""
        kept = {"evaluate": evaluate.model_dump(mode="json"), "tasks": [t.model_dump(mode="json") for t in tasks]}
        write_atomically(self.folder / "measured" / "settings.json", json.dumps(kept, indent=1) + "\n")

    def summary(self, stages: Sequence[str]) -> dict[str, Any]:
        """Return what was measured around the last of some stages, and what each task has lost since it was best."""
        last = stages[-1]
        rows = {"base": self.base, "expert": self.expert(last), "merged": self.merged(last)}
        return {
            "stage": last,
            "stages": list(stages),
            "scores": {name: _short(load_scores(place)) for name, place in rows.items()},
            "forgetting": self.forgetting(stages),
        }

    def forgetting(self, stages: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Return for each task how the merge stands against the best of the base and of the merges before it.

        As in Chaudhry et al. (ECCV 2018), task by task: `change` is utility now - best, negative when something was
        forgotten, with its paired interval (95 %) over the same documents. Utilities: accuracy, or -ln(perplexity).
        """
        rows = [("base", load_scores(self.base)), *((s, load_scores(self.merged(s))) for s in stages)]
        now = rows[-1][1]
        return {task: _row(task, now, rows[:-1]) for task in now}


def table(summary: dict[str, Any]) -> list[str]:
    """Return a stage's scores as lines for a log."""
    lines = []
    for task, row in summary["forgetting"].items():
        parts = [f"{name} {found[task]['value']:.4g}" for name, found in summary["scores"].items() if task in found]
        since = f"; {row['seen']} since {row['best_after']} ({row['best']:.4g})" if "best" in row else ""
        lines.append(f"{task} ({row['metric']}): {', '.join(parts)}{since}")
    return lines


def _short(scores: Scores) -> dict[str, dict[str, Any]]:
    return {
        name: {"metric": s.metric, "value": s.value, "utility": s.utility, "stderr": s.stderr}
        for name, s in scores.items()
    }


def _row(task: str, now: Scores, earlier: Sequence[tuple[str, Scores]]) -> dict[str, Any]:
    row: dict[str, Any] = {"metric": now[task].metric, "now": now[task].value}
    comparable = [
        (name, scores) for name, scores in earlier if task in scores and same_documents(now[task], scores[task])
    ]
    if not comparable:
        return row
    after, best = max(comparable, key=lambda found: found[1][task].utility)
    change = mean_change([(now, best, [task])], now[task].block)
    if change is None:
        return row
    return row | {
        "best": best[task].value, "best_after": after, "change": change.mean, "low": change.low, "high": change.high,
        "seen": change.seen,
    }  # fmt: skip
