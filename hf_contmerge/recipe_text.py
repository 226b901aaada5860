"""A recipe's text: the YAML that we read, and changes to it from the command line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from hf_contmerge.errors import RecipeError

if TYPE_CHECKING or not yaml.__with_libyaml__:
    from yaml import SafeLoader
else:
    from yaml import CSafeLoader as SafeLoader  # ten times faster


class _Loader(SafeLoader):
    """Safe YAML in which 1e-5 is a number, as it is in YAML 1.2 and in everybody's recipes."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(text: str) -> Any:
    """Return what YAML text means. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_Loader)


def apply_override(data: Any, override: str) -> None:
    """Change what YAML text meant as `--set a.b=c` says. Raises RecipeError if there is no such place."""
    dotted, equals, value = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise RecipeError(f"--set wants path=value, such as merge.0.rule=opcm; got {override!r}")
    try:
        new = read_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: {value!r} is not a YAML value; put it in double quotes") from error
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
                raise RecipeError(f"--set {override}: {place} is {at!r}; write it out as a mapping first")
        last: Any = int(keys[-1]) if isinstance(at, list) else keys[-1]
        at[last] = new
    except RecipeError:  # a ValueError too
        raise
    except (ValueError, IndexError, AttributeError, TypeError) as error:
        raise RecipeError(f"--set {override}: the recipe has no place {dotted!r}") from error
