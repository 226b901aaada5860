"""Names of models on the command line: also runs and merge states."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_contmerge.errors import RunError, unknown
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.runtime.foreign import expanded, is_too_long
from hf_contmerge.runtime.ranks import is_launched

LOG = logging.getLogger(__name__)

ANY_MODEL = "a folder, a Hub id, a .gguf file, RUN[@ENTRY] (its last merge) or a merge state"


@contextmanager
def opened_model(name: str) -> Iterator[str]:
    """Yield a model's name for scoring and loading.

    A run's is its last merged model. A merge state's model is written to a folder that is removed afterwards.

    Raises:
        RunError: the run has no merged model, or the state no expert.
    """
    path = Path() if is_too_long(name) else expanded(name)
    folder, _, entry = path.name.rpartition("@")
    if run := _run_of(path):
        yield str(_last_merge(run, ""))
    elif folder and (run := _run_of(path.parent / folder)):
        yield str(_last_merge(run, entry))
    elif (path / "state.json").is_file() and not (path / "config.json").is_file():
        with tempfile.TemporaryDirectory(prefix="contmerge-") as scratch:
            yield str(_written(path, Path(scratch)))
    else:
        yield name


def _run_of(folder: Path) -> Run | None:
    is_run = (folder / "recipe.yml").is_file() and not (folder / "config.json").is_file()
    return Run.load(folder) if is_run else None


def _last_merge(run: Run, name: str) -> Path:
    """Return the folder of a run's or entry's last merge."""
    done = {entry.name: entry for entry in run.recipe.merge if run.last_merged(entry)}
    if not done:
        raise RunError(f"{run.folder} holds no merged model yet. Finish the run: {run.command}")
    if name and name not in done:
        raise RunError(unknown("merge entry", name, done, where=str(run.folder)))
    entry = done[name] if name else _usual(run, done)
    place = run.merged(run.last_merged(entry), entry)
    place.check("merge", "merged")
    return place.model


def _usual(run: Run, done: dict[str, Merge]) -> Merge:
    wish = run.recipe.publish.merge if run.recipe.publish else None
    entry = done.get(wish or "") or next(iter(done.values()))
    if len(done) > 1:
        others = ", ".join(f"{run.folder}@{name}" for name in done if name != entry.name)
        LOG.warning("%s has %d merges; this is %s. Others: %s", run.folder, len(done), entry.name, others)
    return entry


def _written(folder: Path, scratch: Path) -> Path:
    from hf_contmerge.merging.state import MergeState

    if is_launched():
        raise RunError(f"{folder} is a merge state: under a launcher, write its model with `contmerge merge export`.")
    return MergeState.load(folder).export(scratch / "merged")
