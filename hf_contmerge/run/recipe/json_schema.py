"""The JSON schema of recipes, for editors.

Types come from the pydantic models, meanings from the tables of docs/recipe.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_contmerge.run.recipe.schema import Recipe

Schema = dict[str, Any]
_WORD: Schema = {"type": "string"}
_SHORT_FORMS: Mapping[str, Schema] = {
    "Dataset": _WORD, "Task": _WORD, "Merge": _WORD, "Rung": _WORD,
    "StatisticsSettings": {"type": "array", "items": _WORD},
}  # fmt: skip
"""What may stand in place of a mapping; the models' validators read it."""
_ONE_OR_MORE = (("Train", "strategy"), ("Guard", "on"), ("Recipe", "baselines"))
"""Lists of which a single word may stand for itself."""


def recipe_schema(page: Path) -> Schema:
    """Return the schema, with short forms and meanings.

    `page`: docs/recipe.md.
    """
    schema = Recipe.model_json_schema()
    models: dict[str, Schema] = {"Recipe": schema, **schema["$defs"]}
    meanings = _meanings(page.read_text(encoding="utf-8"))
    for name, model in models.items():
        fields = model["properties"]
        for field, value in fields.items():
            single = (name, field) in _ONE_OR_MORE
            fields[field] = {**_with_short_forms(value, single), "description": meanings[name, field]}
        model.pop("description", None)  # the docstring, for readers of the code
    models["Rung"].pop("required")  # {rule: name}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _with_short_forms(field: Schema, single: bool) -> Schema:
    if single:
        return {**_only_default(field), "anyOf": [_WORD, _bare(field)]}
    if "$ref" in field:
        short = _SHORT_FORMS.get(field["$ref"].rpartition("/")[2])
        return {**_only_default(field), "anyOf": [{"$ref": field["$ref"]}, short]} if short else field
    changed = dict(field)
    if "items" in field:
        changed["items"] = _with_short_forms(field["items"], False)
    if "anyOf" in field:
        changed["anyOf"] = [_with_short_forms(option, False) for option in field["anyOf"]]
    return changed


def _only_default(field: Schema) -> Schema:
    return {"default": field["default"]} if "default" in field else {}


def _bare(field: Schema) -> Schema:
    return {word: value for word, value in field.items() if word != "default"}


def _meanings(page: str) -> dict[tuple[str, str], str]:
    """Return (section, field) -> its meaning, without links."""
    meanings: dict[tuple[str, str], str] = {}
    for section in page.split("\n### ")[1:]:
        title, _, rest = section.partition("\n")
        for field, text in re.findall(r"^\| `(\w+)` \| .*? \| .*? \| (.*) \|$", rest, flags=re.M):
            meanings[title, field] = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text).replace(r"\|", "|")
    return meanings
