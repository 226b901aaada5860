"""Reads recipes from YAML, with command-line overrides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.streams import with_stream
from hf_contmerge.runtime.foreign import LARGEST_YAML, SafeLoader, is_too_long, parse_yaml
from hf_contmerge.runtime.hiding import blanked, is_control, secrets_in, shown


class _Loader(SafeLoader):
    """Safe YAML with 1e-5 as a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(text: str) -> Any:
    """Parse YAML text. Raises yaml.YAMLError."""
    return parse_yaml(text, _Loader)


def apply_override(data: Any, override: str) -> None:
    """Apply `--set a.b=c` to parsed YAML.

    Raises RecipeError for a missing path.
    """
    dotted, equals, value = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise RecipeError(f"--set expects path=value, such as merge.0.rule=opcm; got {override!r}")
    try:
        new = read_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: {value!r} is not a YAML value; put it in double quotes") from error
    set_field(data, dotted, new, f"--set {override}")


def set_field(data: Any, dotted: str, value: Any, where: str) -> None:
    """Set a field of parsed YAML by dotted path; numbers index lists.

    `where`: for errors. Raises RecipeError for a missing path.
    """
    keys = dotted.split(".")
    if isinstance(data, dict) and re.match(r"stages\.\d", dotted):
        data |= with_stream(data)
    at: Any = data
    try:
        for i, key in enumerate(keys[:-1]):
            if isinstance(at, list):
                at = at[int(key)]
            else:
                if at.get(key) is None:
                    at[key] = {}
                at = at[key]
            if isinstance(at, str):  # a shorthand such as `dataset: file.jsonl` has no fields to set
                place = ".".join(keys[: i + 1])
                raise RecipeError(f"{where}: {place} is {at!r}; write it as a mapping first")
        last: Any = int(keys[-1]) if isinstance(at, list) else keys[-1]
        at[last] = value
    except RecipeError:  # a ValueError too
        raise
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(f"{where}: the recipe has no path {dotted!r}") from error


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: `a.b=c`, as for `--set`: a dotted path (numbers index lists) and a YAML value.

    Raises:
        RecipeError: the file is missing or not YAML, or a field is unknown, missing or of the wrong type.
    """
    data = read_mapping(path)
    if isinstance(data, dict) and "recipe" in data and "stages" not in data:
        raise RecipeError(f"{path} is a study, not a recipe. Give it to `contmerge study`, which plans it with --plan.")
    for override in overrides:
        apply_override(data, override)
    return parse_recipe(data, where=str(path))


def read_mapping(path: str | Path) -> Any:
    """Parse a recipe's file, without checks of its fields. Raises RecipeError."""
    try:
        with Path(path).open("rb") as file:  # a pipe will do: `contmerge run <(...)`
            return read_yaml(file.read(LARGEST_YAML + 1).decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    except (OSError, ValueError) as error:  # a study may name a file that no system has
        cause = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"Cannot read the recipe {path}: {cause}. Give the path of a YAML file.") from error


def parse_recipe(data: Any, *, where: str = "recipe") -> Recipe:
    """Check parsed YAML and return the recipe.

    Raises RecipeError as `load_recipe` does.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must hold a mapping with name, base_model, stages and merge; got {shown(data, 80)}")
    if "merge_method" in data:
        raise RecipeError(
            f"{where} is a mergekit recipe (it has `merge_method`). Run it with `mergekit-yaml {where} OUT`; "
            "a recipe for contmerge has `stages` and `merge`."
        )
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, where)) from None  # pydantic's own message shows values
    _require_no_secrets(data, where)
    _require_visible(data, where)
    return recipe


def _require_no_secrets(data: dict[str, Any], where: str) -> None:
    """Raise RecipeError for a token or a password: cards quote recipes."""
    place = next(secrets_in(data), None)
    if place is not None:
        raise RecipeError(
            f"{where}: {place} holds a token or a password, and a recipe is copied into runs, trackers and model "
            "cards. Remove it; use an environment variable (HF_TOKEN, WANDB_API_KEY) or `hf auth login`."
        )


_PATHS = {"base_model", "expert", "minus", "path", "include_path", "output", "chat_template_path", "dataset"}
_FREE_TEXT = {"text", "question", "choices", "answer", "stop", "labels"}


def _require_visible(data: Any, where: str) -> None:
    """Raise RecipeError for control characters in names and paths: terminals obey them."""
    for place, text in _strings(data, ""):
        sign = next(filter(is_control, text), None)
        if sign:
            raise RecipeError(f"{where}: {place} holds the control character {sign!a}. Remove it.")
        if place.rpartition(".")[2] in _PATHS and is_too_long(text):
            raise RecipeError(f"{where}: {place} is too long for a path ({len(text)} characters). Shorten it.")


def _strings(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Yield strings of parsed YAML with dotted paths, except free text."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, part in parts:
        place = f"{path}.{key}" if path else str(key)
        yield path or "a field's name", str(key)
        if key not in _FREE_TEXT:
            yield from _strings(part, place)
    if isinstance(value, str):
        yield path, value


def recipe_yaml(recipe: Recipe) -> str:
    """Return a recipe as YAML, with all defaults and without secrets."""
    return yaml.safe_dump(blanked(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


_MOST_MISTAKES = 30


def explain(error: ValidationError, where: str, root: type[BaseModel] = Recipe) -> str:
    """Format pydantic's errors, one sentence per field, with suggestions."""
    lines = []
    errors = error.errors()
    for item in errors[:_MOST_MISTAKES]:
        if item["type"] == "too_short" and item["input"]:  # a list with wrong items, reported separately
            continue
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            fields = _fields_at(item["loc"][:-1], root)
            parent = ".".join(str(part) for part in item["loc"][:-1]) or f"the {root.__name__.lower()}"
            lines.append(unknown("field", str(item["loc"][-1]), fields, where=parent))
        elif item["type"] == "missing":
            lines.append(f"{place} is missing.")
        else:
            got = "" if isinstance(item["input"], dict) else f" (got {shown(item['input'])})"
            lines.append(f"{place}{': ' * bool(place)}{item['msg'].removeprefix('Value error, ')}{got}")
    if len(errors) > _MOST_MISTAKES:
        lines.append(f"and {len(errors) - _MOST_MISTAKES} more mistakes")
    return f"{where}: " + "\n  ".join(lines)


def _fields_at(loc: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    for part in loc:
        field = model.model_fields.get(str(part))
        model = (field and _part_in(field.annotation)) or model
    return list(model.model_fields)


def _part_in(annotation: Any) -> type[BaseModel] | None:
    """Return the part of a recipe in a field's type, if any."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((part for inner in get_args(annotation) if (part := _part_in(inner))), None)
