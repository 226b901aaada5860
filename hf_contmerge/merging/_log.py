"""state.json: fields, reading, writing, checks of changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError, RecipeError, RunError
from hf_contmerge.merge_rules import Norms
from hf_contmerge.merging.merge import FoldedExpert
from hf_contmerge.models.survival import Survival
from hf_contmerge.runtime.files import write_atomically

_EXPORTS = "exports.jsonl"
FORMAT = 1
"""Incremented when older programs cannot read a state."""


@dataclass(frozen=True)
class Entry:
    """An expert in state.json."""

    stage: str
    model: str
    folder: str
    sha256: str
    norm: float
    kind: str
    seconds: float = 0.0
    added: str = ""

    def expert(self) -> FoldedExpert:
        return FoldedExpert(self.stage, Path(self.folder), self.sha256, self.norm, name=self.stage)


@dataclass(frozen=True)
class Log:
    """The contents of state.json."""

    rule: str
    parameters: dict[str, Any]
    base: str
    base_folder: str
    base_sha256: str
    base_stamp: str
    experts: tuple[Entry, ...] = ()
    running: str | None = None
    running_norm: float = 0.0
    format: int = FORMAT
    versions: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    """Stages dropped so far; left out of the file if empty."""

    def norms(self) -> Norms:
        return Norms(tuple(e.norm for e in self.experts), self.running_norm)


def read_log(folder: Path) -> Log:
    """Read state.json.

    Raises:
        RunError: the file is missing, damaged or of another version.
    """
    file = folder / "state.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise RunError(
                f"{file} has format {values.get('format')}, but this program reads {FORMAT}. Use the version of "
                f"hf_contmerge that made it ({values.get('versions', {}).get('hf_contmerge', 'unknown')})."
            )
        lists = {"experts": tuple(Entry(**e) for e in values["experts"]), "dropped": tuple(values.get("dropped", ()))}
        return Log(**{**values, **lists})
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} holds no state. Start one: contmerge merge init {folder} --base MODEL --rule NAME"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{file} is damaged ({error}). Restore it, or start a new state.") from error


def write_log(folder: Path, log: Log) -> None:
    """Replace state.json, the commit of a change."""
    values = {word: value for word, value in asdict(log).items() if value or word != "dropped"}
    write_atomically(folder / "state.json", json.dumps(values, indent=1) + "\n")


def log_export(folder: Path, out: Path, experts: int, survival: Survival) -> None:
    """Append an export to exports.jsonl, unless it is the last one."""
    line = json.dumps({"model": str(out.resolve()), "experts": experts, **survival.to_json()}) + "\n"
    file = folder / _EXPORTS
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not before.endswith(line):
        write_atomically(file, before + line)


def read_exports(folder: Path) -> list[dict[str, Any]]:
    """Return the exports of a state, in order."""
    file = folder / _EXPORTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError as error:
        raise RunError(f"{file} is damaged ({error}). Remove it: it only lists the written models.") from error


def require_new(folder: Path) -> None:
    """Raise RunError unless a folder is empty.

    A leftover of a crash in `write_log` is accepted.
    """
    if folder.exists() and (not folder.is_dir() or any(p.name != ".state.json.new" for p in folder.iterdir())):
        raise RunError(f"{folder} is not empty. Choose a new folder for the state, or add to the existing state.")


def require_kept(kept: Sequence[Entry], stage: str) -> None:
    """Raise ModelError unless all kept experts are unchanged."""
    gone = [e for e in kept if not Path(e.folder).is_dir()]
    changed = [e for e in kept if e not in gone and not e.expert().is_unchanged()]
    if gone or changed:
        lines = [f"  {e.stage}: {e.folder} is missing" for e in gone]
        lines += [f"  {e.stage}: {e.folder} now holds other weights" for e in changed]
        raise ModelError(
            f"To drop {stage}, the state is folded again from the other experts, but these are missing or changed:\n"
            + "\n".join(lines)
            + "\nRestore them and rerun the command. The state is unchanged."
        )


def stage_names(taken: Sequence[str], models: Sequence[str | Path], given: Sequence[str]) -> list[str]:
    """Return unique stage names, given or from model names.

    Raises:
        RecipeError: no expert, or stage names that are too few, too many or taken.
    """
    if not models:
        raise RecipeError("No expert to add: pass at least one.")
    if given and len(given) != len(models):
        raise RecipeError(f"{len(models)} experts but {len(given)} stage names: pass one name per expert, or none.")
    used, names = list(taken), []
    for i, model in enumerate(models):
        name = given[i] if given else str(model).rstrip("/").split("/")[-1].partition("@")[0]
        if given and name in used:
            raise RecipeError(f"A stage {name} exists already. Choose a name other than {', '.join(used)}.")
        number, unique = 2, name
        while unique in used:
            number, unique = number + 1, f"{name}-{number}"
        used.append(unique)
        names.append(unique)
    return names


def name_of(model: str | Path) -> str:
    """Return a model's Hub id or absolute path."""
    path = Path(model).expanduser()
    return str(path.resolve()) if path.exists() else str(model)
