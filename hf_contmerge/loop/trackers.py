"""Losses, norms and scores for experiment trackers.

`train.report_to` names the trackers: TensorBoard, Weights & Biases, Trackio. One tracker run covers the whole recipe;
the trainer's own callbacks would start a run per stage. Each stage is a group of charts (`01-law/previous/loss`), and
steps count across stages. Each task is a group with a curve per line over the stages (`law_heldout/magmax`), whose step
is the number of stages. The report's picture and table come last.
"""

from __future__ import annotations

import csv
import importlib.util
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RecipeError, ResourceError, unknown
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import Place
from hf_contmerge.run.recipe.phases import Phase
from hf_contmerge.run.recipe.schema import Recipe, Train
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.hiding import blanked

KNOWN = ("tensorboard", "trackio", "wandb")
_OVER_STAGES = "over stages"

Log = Callable[[int, Mapping[str, float]], None]
"""Logs values by name at a step."""


class Trackers:
    """The trackers of a run; a no-op without any."""

    def __init__(self, opened: Sequence[Any] = (), lines: Sequence[str] = ()) -> None:
        """Take opened trackers and the names of the run's lines."""
        self._opened, self._lines, self._before, self._over = opened, lines, 0, set[Path]()

    @classmethod
    def open(cls, run: Run) -> Trackers:
        """Start or resume the recipe's trackers. Raises as `check_trackers`."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        folder, opened = run.folder / "trackers", []
        for name in check_trackers(run.recipe.train):
            tracker = LOGGER_TYPE_TO_CLASS[name](run.recipe.name, **_settings(name, folder))
            tracker.start()
            opened.append(tracker)
            if name == "wandb":  # wandb's own steps may not decrease, as they do after `contmerge redo`
                tracker.tracker.define_metric("*", step_metric="step")
                tracker.tracker.define_metric(f"{_OVER_STAGES}/*", step_metric="stages")
            if name != "tensorboard":
                tracker.store_init_configuration(_flat(run.recipe))
        return cls(opened, (*run.expert_kinds(), *(entry.name for entry in run.recipe.merge)))

    def stage_is_over(self, place: Place, steps: int) -> None:
        """Advance the step by an expert's steps, once."""
        self._before += steps if place.folder not in self._over else 0
        self._over.add(place.folder)

    def of(self, place: Place, phase: Phase) -> Log:
        """Return a function to log a phase's points.

        It takes a stage's step and values by name. Points logged before a resume are skipped.
        """
        mark = place.logged(phase)

        def log(step: int, values: Mapping[str, float]) -> None:
            if self._opened and _logged(mark) < step:
                self._log({f"{_group(place)}/{name}": value for name, value in values.items()}, self._before + step)
                write_atomically(mark, str(step))

        return log

    def of_scores(self, t: int, place: Place) -> Log:
        """Return a function to log scores after stage `t`.

        Every line begins at the base model.
        """
        log, lines = self.of(place, "score"), self._lines if t == 0 else (place.folder.name,)

        def both(step: int, values: Mapping[str, float]) -> None:
            if _logged(place.logged("score")) < step:
                tasks = {name.rpartition("/")[0]: value for name, value in values.items()}
                self._log({f"{_OVER_STAGES}/{task}/{x}": tasks[task] for task in tasks for x in lines}, t, "stages")
            log(step, values)

        return both

    def _log(self, values: Mapping[str, float], step: int, unit: str = "step") -> None:
        for tracker in self._opened:
            if tracker.name == "wandb":
                tracker.log({**values, unit: step})
            else:
                tracker.log(values, step=step)

    def reported(self, picture: Path) -> None:
        """Log the report's picture and its table of scores."""
        for tracker in self._opened:
            _ARTEFACTS[tracker.name](tracker, picture, picture.with_name("scores.csv"))

    def merged(self, place: Place, record: Mapping[str, Any]) -> None:
        """Log the scale and the norms of a merge."""
        norms = record["norms"]
        newest = norms["experts"][-1:] or [0.0]  # empty if a guard left the first expert out
        point = {"scale": record["scale"], "running_norm": norms["running"], "expert_norm": newest[0]}
        self.of(place, "merge")(0, point)

    def close(self) -> None:
        """Flush and close all trackers."""
        for tracker in self._opened:
            tracker.finish()


def check_trackers(train: Train) -> list[str]:
    """Return the names of a recipe's trackers.

    Raises:
        RecipeError: an unknown tracker.
        ResourceError: a tracker is not installed.
    """
    words = train.sft_fields.get("report_to") or []
    names = [words] if isinstance(words, str) else list(words)
    names = [name for name in names if name != "none"]
    if "all" in names:
        return [name for name in KNOWN if importlib.util.find_spec(name)]
    for name in names:
        if name not in KNOWN:
            raise RecipeError(unknown("tracker", str(name), [*KNOWN, "all", "none"], where="train.report_to"))
        if not importlib.util.find_spec(name):
            raise ResourceError(
                f"train.report_to names {name}, which is not installed. Install it with `pip install {name}`, or "
                "remove it from report_to."
            )
    return names


def _to_tensorboard(tracker: Any, picture: Path, table: Path) -> None:
    from matplotlib.image import imread

    tracker.tracker.add_image("report/forgetting", imread(picture)[..., :3], dataformats="HWC")
    header, *rows = _rows(table)
    lines = [header, ["---"] * len(header), *rows]
    tracker.tracker.add_text("report/scores", "\n".join(f"| {' | '.join(row)} |" for row in lines))


def _to_wandb(tracker: Any, picture: Path, table: Path) -> None:
    import wandb  # pyright: ignore[reportMissingImports]

    header, *rows = _rows(table)
    tracker.log({"report/forgetting": wandb.Image(str(picture)), "report/scores": wandb.Table(header, rows)})
    artefact = wandb.Artifact(f"report-{tracker.tracker.id}", type="report")
    artefact.add_dir(str(picture.parent))
    tracker.tracker.log_artifact(artefact)


def _to_trackio(tracker: Any, picture: Path, table: Path) -> None:
    import pandas
    import trackio  # pyright: ignore[reportMissingImports]

    tracker.log({
        "report/forgetting": trackio.Image(str(picture)),
        "report/scores": trackio.Table(dataframe=pandas.read_csv(table)),
    })  # fmt: skip


_ARTEFACTS = {"tensorboard": _to_tensorboard, "wandb": _to_wandb, "trackio": _to_trackio}


def _rows(table: Path) -> list[list[str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _logged(mark: Path) -> int:
    """Return the last logged step; -1 for none, or a damaged file."""
    text = mark.read_text(encoding="utf-8", errors="replace") if mark.exists() else ""
    return int(text) if re.fullmatch(r"\d{1,18}", text) else -1


def _settings(name: str, folder: Path) -> dict[str, Any]:
    """Return a tracker's arguments, equal after a resume."""
    if name == "tensorboard":
        return {"logging_dir": folder}
    file = folder / "id"
    own = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    if not re.fullmatch("[0-9a-f]{12}", own):  # none, or not of ours
        own = uuid.uuid4().hex[:12]
        write_atomically(file, own)
    return {"name": own, "resume": "allow"} | ({"id": own, "dir": str(folder)} if name == "wandb" else {})


def _flat(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's settings as plain numbers and strings."""
    fields = blanked(recipe.model_dump(mode="json"))
    return {name: value if isinstance(value, int | float | str) else str(value) for name, value in fields.items()}


def _group(place: Place) -> str:
    """Return a place's chart group: 01-law/previous, 01-law/magmax, 00-base."""
    parts = place.folder.parts[place.folder.parts.index("stages") + 1 :] if "stages" in place.folder.parts else ()
    return "/".join(part for part in parts if part not in ("experts", "merges"))
