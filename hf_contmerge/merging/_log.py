"""state.json: fields, reading, writing, checks of changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError, RecipeError, RunError, shell_word
from hf_contmerge.merge_rules import Norms
from hf_contmerge.merging.merge import FoldedExpert
from hf_contmerge.merging.trust import Trust
from hf_contmerge.models.identity import Identity
from hf_contmerge.models.survival import Survival
from hf_contmerge.models.tokenizer import SHAPE as TOKENIZER_CHANGE
from hf_contmerge.runtime.digests import Digests, changed_files
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.foreign import expanded, is_file_name, require_own_files
from hf_contmerge.runtime.records import read_lines, read_record, sealed_line, write_record
from hf_contmerge.runtime.shapes import PARAMETERS, SURVIVAL

_EXPORTS = "exports.jsonl"
_CURE = "Restore it from a copy, or start a new state from the experts with `contmerge merge init` and `merge add`."


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
    files: Digests = field(default_factory=dict)
    """Of an expert inside the state's folder."""
    weight: float = 1.0
    """Its task vector is multiplied by it; left out of the file if 1."""

    def expert(self) -> FoldedExpert:
        return FoldedExpert(self.stage, Path(self.folder), self.sha256, self.norm, name=self.stage, weight=self.weight)

    def to_json(self) -> dict[str, Any]:
        return {word: value for word, value in asdict(self).items() if word != "weight" or value != 1.0}


@dataclass(frozen=True)
class Log:
    """The contents of state.json."""

    rule: str
    parameters: dict[str, Any]
    base: str
    base_folder: str
    base_sha256: str
    base_stamp: str
    base_files: Digests
    experts: tuple[Entry, ...] = ()
    running: str | None = None
    running_norm: float = 0.0
    amplification: float | None = None
    """Of rounding, with an ill-posed rule."""
    running_files: Digests = field(default_factory=dict)
    tokenizer_change: dict[str, Any] | None = None
    """Chat template, end and padding of the newest expert that was trained here with others."""
    versions: dict[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    """Stages dropped so far; left out of the file if empty."""

    def norms(self) -> Norms:
        return Norms(tuple(e.norm for e in self.experts), self.running_norm)

    def trust(self) -> Trust | None:
        return None if self.amplification is None else Trust(self.amplification)

    def base_identity(self) -> Identity:
        return Identity(self.base_sha256, self.base_stamp, self.base_files)

    def lineage(self) -> dict[str, Any]:
        """Return the fields of a written model."""
        own = ("base_stamp", "base_files", "running", "running_files", "tokenizer_change")
        return {name: value for name, value in self.to_json().items() if name not in own}

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "experts": [e.to_json() for e in self.experts]}


_SHAPE = {
    "rule": str, "parameters": PARAMETERS, "base": str, "base_folder": str, "base_sha256": str,
    "base_stamp": str, "base_files": {str: str}, "running?": (str, None), "running_norm?": float,
    "amplification?": (float, None), "running_files?": {str: str}, "tokenizer_change?": (TOKENIZER_CHANGE, None),
    "dropped?": [str], "experts": [{
        "stage": str, "model": str, "folder": str, "sha256": str, "norm": float, "kind": str, "seconds?": float,
        "added?": str, "files?": {str: str}, "weight?": float,
    }],
}  # fmt: skip
_EXPORT = {"model": str, "experts": int, **SURVIVAL}


def read_log(folder: Path) -> Log:
    """Read state.json; folders inside the state are relative to it.

    Raises:
        RunError: the file is missing, damaged or of another version.
    """
    file = folder / "state.json"
    if not file.exists():
        command = f"contmerge merge init {shell_word(folder)} --base MODEL --rule NAME"
        raise RunError(f"{folder} holds no state. Start one: {command}")
    values = read_record(file, _CURE, _SHAPE)
    try:
        experts = (Entry(**{**e, "folder": str(folder.resolve() / e["folder"])}) for e in values["experts"])
        log = Log(**{**values, "experts": tuple(experts), "dropped": tuple(values.get("dropped", ()))})
        _require_own_names(log)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # a forged record has its seal, too
        raise RunError(f"{file} is damaged: {error}. {_CURE}") from error
    require_own_files(folder, error=RunError)
    return log


def _require_own_names(log: Log) -> None:
    """Raise ValueError for names with path separators or control characters."""
    if log.running and not re.fullmatch(r"running-\d+", log.running):
        raise ValueError(f"running is {log.running!r}")
    for entry in log.experts:
        if not is_file_name(entry.stage):
            raise ValueError(f"a stage is named {entry.stage!r}")
    for word in (log.rule, log.base, log.base_folder, *(x for e in log.experts for x in (e.model, e.folder, e.kind))):
        if not word.isprintable():
            raise ValueError(f"control characters in {word!r}")


def write_log(folder: Path, log: Log) -> None:
    """Replace state.json, the commit of a change. Raises ModelError for infinite numbers."""
    home = folder.resolve()
    experts = [{**e.to_json(), "folder": _inside(home, Path(e.folder))} for e in log.experts]
    values = {word: value for word, value in asdict(log).items() if value or word != "dropped"}
    try:
        write_record(folder / "state.json", {**values, "experts": experts}, finite=True)
    except ValueError as error:
        raise ModelError(f"{folder}: a norm or parameter is infinite or NaN. The state is unchanged.") from error


def _inside(home: Path, folder: Path) -> str:
    return str(folder.relative_to(home) if folder.is_relative_to(home) else folder)


def damaged_state(folder: Path, log: Log) -> list[Path]:
    """Return the files of a running state with other bytes than recorded."""
    return [folder / name for name in changed_files(folder, log.running_files)]


def require_whole(folder: Path, log: Log) -> None:
    """Raise RunError for a running state with missing or damaged files."""
    if damaged := damaged_state(folder, log):
        raise RunError(
            f"{damaged[0]} changed or went missing after {folder / 'state.json'} was written: nothing is built on it. "
            f"{_CURE}"
        )


def log_export(folder: Path, out: Path, experts: int, survival: Survival) -> None:
    """Append an export to exports.jsonl, unless it is the last one."""
    line = sealed_line({"model": str(out.resolve()), "experts": experts, **survival.to_json()})
    file = folder / _EXPORTS
    before = file.read_text(encoding="utf-8") if file.is_file() else ""
    if not before.endswith(line):
        write_atomically(file, before + line)


def read_exports(folder: Path) -> list[dict[str, Any]]:
    """Return the exports of a state, in order."""
    return read_lines(folder / _EXPORTS, "Remove it: it only lists the written models.", _EXPORT)


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


_LAYOUT = re.compile(r"experts?|checkpoint-\d+|snapshots|[0-9a-f]{40}")
"""Folders that say what lies in them, not what was learnt."""


def own_name(model: str | Path) -> str:
    """Return an expert's stage, repository or folder: what was learnt.

    runs/x/stages/01-law/experts/base/expert is law, experts/law/expert and owner/law are law.
    """
    words = str(model).rstrip("/")
    parts = [part for part in name_of(words).split("/") if part]
    if not parts:
        return words
    if "stages" in parts[:-1] and (stage := re.fullmatch(r"\d\d+-(.+)", parts[_last(parts, "stages") + 1])):
        return stage[1]
    name = next((part for part in reversed(parts) if not _LAYOUT.fullmatch(part)), parts[-1])
    return name.removeprefix("models--").rpartition("--")[2].partition("@")[0]  # in the Hub's cache


def _last(parts: Sequence[str], word: str) -> int:
    return len(parts) - 1 - parts[::-1].index(word)


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
        name = given[i] if given else own_name(model)
        if not is_file_name(name):
            raise RecipeError(
                f"A stage cannot be named {name!r}. Give one without slashes with `--as` (in Python: `stages`)."
            )
        if given and name in used:
            raise RecipeError(f"A stage {name} exists already. Choose a name other than {', '.join(used)}.")
        number, unique = 2, name
        while unique in used:
            number, unique = number + 1, f"{name}-{number}"
        used.append(unique)
        names.append(unique)
    return names


def expert_weights(given: Sequence[float], stages: Sequence[str]) -> list[float]:
    """Return a weight per expert. Raises RecipeError for another number."""
    if given and len(given) != len(stages):
        raise RecipeError(f"{len(stages)} experts but {len(given)} weights: pass one weight per expert, or none.")
    return [float(weight) for weight in given] or [1.0] * len(stages)


def name_of(model: str | Path) -> str:
    """Return a model's Hub id or absolute path."""
    path = expanded(model)
    return str(path.resolve()) if path.exists() else str(model)
