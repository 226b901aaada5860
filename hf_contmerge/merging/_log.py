"""state.json: fields, reading, writing, checks of changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError, RecipeError, RunError
from hf_contmerge.merge_rules import Norms
from hf_contmerge.merging.merge import FoldedExpert
from hf_contmerge.models.identity import Identity
from hf_contmerge.models.survival import Survival
from hf_contmerge.runtime.digests import Digests, changed_files
from hf_contmerge.runtime.records import read_lines, read_record, sealed_line, write_record

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
    base_files: Digests
    experts: tuple[Entry, ...] = ()
    running: str | None = None
    running_norm: float = 0.0
    running_files: Digests = field(default_factory=dict)
    tokenizer_change: dict[str, Any] | None = None
    """Chat template, end and padding of the newest expert that was trained here with others."""
    versions: dict[str, str] = field(default_factory=dict)

    def norms(self) -> Norms:
        return Norms(tuple(e.norm for e in self.experts), self.running_norm)

    def base_identity(self) -> Identity:
        return Identity(self.base_sha256, self.base_stamp, self.base_files)

    def lineage(self) -> dict[str, Any]:
        """Return the fields that go with a written model."""
        own = ("base_stamp", "base_files", "running", "running_files", "tokenizer_change")
        return {name: value for name, value in asdict(self).items() if name not in own}


def read_log(folder: Path) -> Log:
    """Read state.json; folders of experts inside the state are stored relative to it.

    Raises:
        RunError: the file is missing, damaged or of another version.
    """
    file = folder / "state.json"
    if not file.exists():
        raise RunError(f"{folder} holds no state. Start one: contmerge merge init {folder} --base MODEL --rule NAME")
    values = read_record(file, _CURE)
    try:
        experts = [Entry(**{**e, "folder": str(folder.resolve() / e["folder"])}) for e in values["experts"]]
        return Log(**{**values, "experts": tuple(experts)})
    except (TypeError, KeyError) as error:  # sealed, by another program
        raise RunError(f"{file} is damaged: {error}. {_CURE}") from error


def write_log(folder: Path, log: Log) -> None:
    """Replace state.json, the commit of a change."""
    home = folder.resolve()
    experts = [{**asdict(e), "folder": _inside(home, Path(e.folder))} for e in log.experts]
    write_record(folder / "state.json", {**asdict(log), "experts": experts})


def _inside(home: Path, folder: Path) -> str:
    return str(folder.relative_to(home) if folder.is_relative_to(home) else folder)


def damaged_state(folder: Path, log: Log) -> list[Path]:
    """Return the files of a running state that are not as state.json says."""
    return [folder / name for name in changed_files(folder, log.running_files)]


def require_whole(folder: Path, log: Log) -> None:
    """Raise RunError for a running state with missing or damaged files."""
    if damaged := damaged_state(folder, log):
        raise RunError(
            f"{damaged[0]} changed or went missing after {folder / 'state.json'} was written: nothing is built on it. "
            f"{_CURE}"
        )


def log_export(folder: Path, out: Path, experts: int, survival: Survival) -> None:
    """Append an export to exports.jsonl."""
    line = {"model": str(out.resolve()), "experts": experts, **survival.to_json()}
    with (folder / _EXPORTS).open("a", encoding="utf-8") as file:
        file.write(sealed_line(line))


def read_exports(folder: Path) -> list[dict[str, Any]]:
    """Return the exports of a state, in order."""
    return read_lines(folder / _EXPORTS, "Remove it: it only lists the written models.")


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
