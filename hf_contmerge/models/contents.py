"""Lists the files of a model: weights, companions, code.

Everything else in a folder (trainer state, logs, notes, other formats) is neither read nor copied nor published.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ModelError
from hf_contmerge.runtime.foreign import is_file_name, read_json, read_object, read_text, require_shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

_COMPANION = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|tekken|normalizer|byte_maps|word_shape|word_pronunciation"
    r"|(\w+[_-])?vocab([_-]\w+)?|(\w+_)?(pre)?processor_config|chat_template)\.json"
    r"|(\w+_)?vocab\.txt|merges\.txt|dict\.txt|emoji\.json|bpe\.codes|vocab\.bpe|[\w.-]+\.(tiktoken|spm)|chat_template\.jinja"
    r"|[\w.-]*(tokenizer|spiece|sentencepiece|spm|bpe)[\w.-]*\.(model|vocab)|prophetnet\.tokenizer"
    r"|additional_chat_templates/[\w.-]+\.jinja|(?i:licen[cs]e|notice|copying|use_policy)(\.(txt|md))?"
)
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_IMPORT = re.compile(r"^[ \t]*(?:import[ \t]+\.(\w+)[ \t]*$|from[ \t]+\.(\w+)[ \t]+import)", re.MULTILINE)


def weight_files(folder: Path) -> tuple[list[str], tuple[str, ...]]:
    """Return the files read by `from_pretrained`, and their index's names.

    A single file comes before an index. Every tensor of every listed file counts, listed by name or not.

    Raises:
        ModelError: no weights are found, or the index is damaged.
    """
    name = str(_json(folder / "config.json").get("transformers_weights") or "")
    if any(_DISTRIBUTED.fullmatch(path.name) for path in folder.glob("shard-*.safetensors")):
        raise ModelError(f"{folder} is a distributed checkpoint. Load it with transformers and call save_pretrained.")
    name = name or next((n for n in (SINGLE, INDEX) if (folder / n).is_file()), "")
    if not name:
        raise ModelError(_no_weights(folder))
    if not name.endswith(".index.json"):
        return [_inside(folder, folder / "config.json", name)], ()
    weight_map = read_weight_map(folder / _inside(folder, folder / "config.json", name))
    return [_inside(folder, folder / name, file) for file in sorted(set(weight_map.values()))], tuple(weight_map)


def is_weights(name: str) -> bool:
    """Say if a file is named as weights or their index."""
    return bool(_WEIGHTS.fullmatch(name))


def companions(folder: Path) -> list[Path]:
    """Return config, tokenizer, templates, licence and code of a model.

    Raises:
        ModelError: one is a link to a file outside the model.
    """
    files = [p for p in sorted((*folder.glob("*"), *folder.glob("additional_chat_templates/*"))) if p.is_file()]
    chosen = [p for p in files if _COMPANION.fullmatch(p.relative_to(folder).as_posix())]
    chosen += [folder / name for name in sorted(code_files(folder))]
    for path in chosen:
        _require_inside(folder, path)
    return chosen


def check_contents(folder: Path) -> None:
    """Raise ModelError for a mixed folder, or links to other places."""
    if (folder / ADAPTER).is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        whole = SINGLE if (folder / SINGLE).is_file() else INDEX
        raise ModelError(
            f"{folder} holds a whole model ({whole}) and an adapter ({ADAPTER}): transformers would load both. "
            "Move one of them to a folder without the other, and give the folder you mean."
        )
    companions(folder)


def _no_weights(folder: Path) -> str:
    others = sorted(p.name for p in folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    seen = f" It has {', '.join(others[:3])}, which is not read." if others else ""
    return (
        f"{folder} holds no *.safetensors of a model: expected {SINGLE} or {INDEX}.{seen} Pickled weights (.bin, .pt) "
        "are not read: load the model once with transformers and call save_pretrained."
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """Return tensor -> file of an index. Raises ModelError.

    An index may be damaged, or point outside the folder.
    """
    try:
        values = read_json(index)
        require_shape(values, {"weight_map": {str: str}})
    except (OSError, ValueError) as error:
        raise ModelError(f"Cannot read {index}: {error}. Fetch the model again.") from error
    for file in set(values["weight_map"].values()):
        _require_name(index, file)
    return values["weight_map"]


def _require_name(by: Path, name: str) -> None:
    if not is_file_name(name):
        raise ModelError(f"{by} points outside its folder: {name:.200}. Fetch the model again.")


def _inside(folder: Path, by: Path, name: str) -> str:
    """Return a file's name. Raises ModelError if missing or outside the folder."""
    _require_name(by, name)
    if not (folder / name).is_file():
        raise ModelError(f"{by} names a missing file: {name}. Fetch the model again.")
    return name


def _require_inside(folder: Path, path: Path) -> None:
    """Raise ModelError for links out of a model and the Hub's cache."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise ModelError(f"{path} links to {real}, outside the model. Put the file itself there, or remove the link.")


def code_files(folder: Path) -> set[str]:
    """Return the Python files behind `auto_map`, with the files they import."""
    waiting = [f"{m}.py" for path in folder.glob("*config.json") for m in _modules(_json(path).get("auto_map"))]
    files: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in files and is_file_name(name) and (folder / name).is_file():
            files.add(name)
            text = _source(folder / name)
            waiting += [f"{one or other}.py" for one, other in _IMPORT.findall(text)]
    return files


def auto_classes(folder: Path) -> dict[str, str]:
    """Return Auto class -> place of the model's custom code."""
    maps = [
        auto_map for path in folder.glob("*config.json") if isinstance(auto_map := _json(path).get("auto_map"), dict)
    ]
    return {name: str(place) for auto_map in maps for name, place in auto_map.items()}


def code_refused(folder: Path) -> ModelError:
    """Return the error for a model whose own code is not allowed."""
    files = ", ".join(sorted(set(auto_classes(folder).values()))) or "auto_map in its config"
    return ModelError(
        f"{folder} needs code of its own ({files}). Read that code, then allow it: `--trust-remote-code`, and in a "
        "recipe `trust_remote_code: true` (in Python: trust_remote_code=True). Merging alone (`contmerge merge`) needs "
        "no code."
    )


def _source(file: Path) -> str:
    try:
        return read_text(file)
    except ValueError:  # no Python either
        return ""


def _modules(auto_map: Any) -> Iterator[str]:
    """Yield the modules of an auto_map, a tokenizer's lists too."""
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str) and "--" not in reference:  # else the code stays on the Hub
                yield reference.partition(".")[0]


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}
