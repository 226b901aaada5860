"""docs/recipe.md lists every field of a recipe, with the type and the default that pydantic knows."""

import json
import re
from typing import Any

import pytest
from toys import ROOT

from hf_contmerge.run.recipe.schema import Recipe

PAGE = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
SCHEMA = Recipe.model_json_schema()
MODELS: dict[str, Any] = {"Recipe": SCHEMA, **SCHEMA["$defs"]}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def type_words(field: Any) -> str:
    """Return a field's type as the page has it."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(type_words(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {type_words(field['items'])}"
    limits = " and ".join(f"{sign} {field[word]:.15g}" for word, sign in BOUNDS.items() if word in field)
    return f"{'mapping' if field['type'] == 'object' else field['type']} {limits}".strip()


def default_words(field: Any) -> str:
    """Return the default of a field that is not required."""
    if "$ref" in field:
        return "its defaults"
    return "none" if field["default"] is None else f"`{as_yaml(field['default'])}`"


def as_yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {as_yaml(v)}" for k, v in value.items() if v not in (None, {})) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    return value if isinstance(value, str) and re.fullmatch(r"\w+", value) else json.dumps(value)


def rows(section: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ", 3) for line in section.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("name", MODELS)
def test_every_field_has_its_row(name: str) -> None:
    model = MODELS[name]
    _, found, rest = PAGE.partition(f"\n### {name}\n")
    assert found, f"docs/recipe.md lacks a section ### {name}"
    section = rest.split("\n### ")[0]
    required = model.get("required", [])
    expected = [
        [f"`{word}`", type_words(field), "required" if word in required else default_words(field)]
        for word, field in model["properties"].items()
    ]
    listed = rows(section)
    assert [row[:3] for row in listed] == expected
    assert all(row[3].endswith(".") for row in listed)


def test_every_section_is_a_model() -> None:
    assert set(re.findall(r"^### (\w+)$", PAGE, flags=re.M)) == set(MODELS)
