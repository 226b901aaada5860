"""The published files of a model, an adapter or a state.

Nothing else leaves a folder, and nothing that its record does not vouch for.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from hf_contmerge.errors import ModelError, RunError
from hf_contmerge.models.contents import ADAPTER, companions, is_weights
from hf_contmerge.models.lora.layout import FILE
from hf_contmerge.report._public import LOCAL_PATH, hub_model, mapped
from hf_contmerge.runtime.foreign import read_json, require_own_files

Contents = Path | bytes

PICTURE, EVALUATIONS = "forgetting.png", ".eval_results/contmerge.yaml"
_OURS = {"README.md", "recipe.yml", "merge.yml", "merge.json", PICTURE, EVALUATIONS}
STATE = "state/"
"""Folder of a published merge state."""


def is_ours(name: str) -> bool:
    """Say if an earlier push may have written a file."""
    return is_weights(name) or name in _OURS or name.startswith(STATE)


def size_of(contents: Contents) -> int:
    """Return a file's number of bytes."""
    return len(contents) if isinstance(contents, bytes) else contents.stat().st_size


def model_contents(folder: Path, recorded: Collection[str], *, apart: Collection[str] = ()) -> dict[str, Contents]:
    """Return path -> contents of a model's or an adapter's files.

    Args:
        folder: of the model.
        recorded: names of the files that its record vouches for.
        apart: names of files and folders that may lie there and stay there.

    Raises:
        ModelError: it holds other files, or links to other places.
        RunError: it holds no weights.
    """
    require_own_files(folder, error=ModelError)
    found = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    found = {name: path for name, path in found.items() if name.partition("/")[0] not in apart}
    allowed = {path.relative_to(folder).as_posix() for path in companions(folder)} | {ADAPTER, FILE}
    refused = [n for n, path in found.items() if path.is_symlink() or not (n in allowed or is_weights(n))]
    if refused:
        raise ModelError(
            f"{folder} holds {', '.join(refused)}. Only weights, config, tokenizer, templates, licence and the model's "
            "code are ever uploaded: move the others elsewhere and push again. Nothing was uploaded."
        )
    if later := [name for name in found if name not in recorded]:
        raise ModelError(
            f"{folder} holds {', '.join(later)}, which its record does not list: it came later. Move it elsewhere and "
            "push again; add it to the repository itself. Nothing was uploaded."
        )
    if not any(path.suffix == ".safetensors" for path in found.values()):
        raise RunError(f"{folder} holds no weights. Make it again, then push.")
    return {name: _cleaned(path) for name, path in found.items()}


def _cleaned(path: Path) -> Contents:
    """Return a file's contents; configs lose local paths."""
    if path.suffix != ".json" or "config" not in path.name:  # a vocabulary may hold "/home" as a token: leave it alone
        return path
    try:
        data = read_json(path)
    except ValueError as error:
        raise ModelError(f"{path} is damaged: {error}. Make the model again, then push.") from error

    def public(key: str, value: str) -> str:
        return hub_model(value) if key.endswith(("path", "file", "dir")) and LOCAL_PATH.match(value) else value

    cleaned = mapped(data, public)
    return path if cleaned == data else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
