"""The public part of a run: names for paths, blanks for secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from hf_contmerge.merge_rules import named_rule
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace
from hf_contmerge.run.recipe.schema import Merge, Recipe
from hf_contmerge.runtime.foreign import parse_yaml, read_text
from hf_contmerge.runtime.hiding import REMOVED, names_secret, without_secrets
from hf_contmerge.runtime.quickstart import QUICKSTART_MODELS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
LOCAL_PATH = re.compile(r"/|~|\.\.?/|[A-Za-z]:[\\/]|\\\\|file:")
_FILE = re.compile(r"\.(jsonl?|parquet|csv|txt|arrow|gguf|ya?ml)$")
_SNAPSHOT = re.compile(r"(?:.*/)?models--([\w.-]+)/snapshots/([\w.-]+)/?")
"""Of the Hub's cache: repository, commit."""
_NAMED = ("base_model", "continue_from", "expert", "minus", "path", "include_path", "output")
_OF_LINEAGE = (
    "rule", "parameters", "base_sha256", "scale", "factor", "dtype", "rounding", "stored", "model_sha256", "versions",
    "running_norm", "amplification",
)  # fmt: skip
_OF_EXPERT = ("stage", "sha256", "norm", "kind", "weight", "chosen")
"""Fields of merge.json without places and times."""


def mapped(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Return JSON-like data with every string replaced by change(key, string)."""
    if isinstance(value, dict):
        return {k: mapped(v, change, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [mapped(v, change, key) for v in value]
    return change(key, value) if isinstance(value, str) else value


def _without_nulls(part: Any, data: Any) -> Any:
    """Return a dumped part of a recipe without unset fields.

    A null is kept where it says something, as in `max_length: null` of TRL.
    """
    if isinstance(part, BaseModel):
        fields = type(part).model_fields
        unset = [
            word for word, value in data.items() if value is None and word in fields and fields[word].default is None
        ]
        return {word: _without_nulls(getattr(part, word), v) for word, v in data.items() if word not in unset}
    if isinstance(part, list | tuple):
        return [_without_nulls(each, dumped) for each, dumped in zip(part, data, strict=True)]
    return data


def hub_id(name: str) -> str | None:
    """Return the Hub id behind a name; None for a local model."""
    name = _cached_id(name) or name
    if not HUB_ID.fullmatch(name) or _FILE.search(name) or Path(name).exists():
        return None
    return name.partition("@")[0]


def hub_model(name: str) -> str:
    """Return a model's Hub id for a card, else its public name."""
    return hub_id(QUICKSTART_MODELS.get(name, name)) or public_name(name)


def _cached_id(name: str) -> str | None:
    """Return the owner/name@commit of a folder in the Hub's cache."""
    found = _SNAPSHOT.fullmatch(name)
    return f"{found[1].replace('--', '/')}@{found[2]}" if found else None


def public_name(name: str) -> str:
    """Return a Hub id or address unchanged, a path's last component."""
    name = _cached_id(name) or name
    if hub_id(name) or ("://" in name and not name.startswith("file:")):
        return name
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] or "."


def accepted_name(name: str) -> str:
    """Return a public name as `base_model` of a card.

    The Hub refuses a card whose base_model could not be a model's id, as with quickstart:smollm2.
    """
    return re.sub(r"[^\w./-]+", "-", name)


def _public_word(key: str, value: str) -> str:
    """Return a recipe's string as the world may see it."""
    if names_secret(key):
        return REMOVED
    if (value and key in _NAMED) or (key != "text" and LOCAL_PATH.match(value)):
        value = public_name(value)
    return without_secrets(value)


def public_recipe(recipe: Recipe) -> str:
    """Return the recipe as the world may see it, in YAML."""
    data = mapped(_without_nulls(recipe, recipe.model_dump(mode="json")), _public_word)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def public_mergekit_recipe(run: Run, entry: Merge, t: int) -> str | None:
    """Return the stage's merge.yml with public model names."""
    file = run.merged(t, entry).mergekit_recipe
    if not file.is_file():
        return None
    root = run.folder.resolve()
    given = {
        expert_of(run, entry, s).model.resolve(): stage.expert
        for s in range(1, t + 1)
        if (stage := run.stage(s)).expert and not stage.minus  # a difference is written into the run
    }

    def changed(key: str, value: str) -> str:
        if key == "model" and "+" in value:  # mergekit's notation for a model with an adapter
            model, _, adapter = value.partition("+")
            return f"{changed('base_model', model)}+{changed(key, adapter)}"
        path = Path(value).resolve()
        if key == "base_model":
            return _public_word(key, run.recipe.base_model)
        if key == "model" and given.get(path):
            return _public_word("expert", str(given[path]))
        if key == "model" and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
        return _public_word("path" if key == "model" else key, value)

    data = mapped(parse_yaml(read_text(file)), changed)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def expert_of(run: Run, entry: Merge, t: int) -> ExpertPlace:
    """Return the place of the expert behind a merge."""
    start = entry.start_from or named_rule(entry.rule).start_from
    return run.expert(t, f"merged-{entry.name}" if start == "merged" else start)


def public_lineage(lineage: Mapping[str, Any]) -> dict[str, Any]:
    """Return a written model's lineage with public names."""
    experts = [
        {word: value for word, value in expert.items() if word in _OF_EXPERT} | {"model": public(expert["model"])}
        for expert in lineage["experts"]
    ]
    rest = {word: value for word, value in lineage.items() if word in _OF_LINEAGE}
    return {**rest, "base": public(lineage["base"]), "experts": experts}


def public(name: str) -> str:
    """Return a model's or a dataset's public name, without secrets."""
    return without_secrets(public_name(name))
