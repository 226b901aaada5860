"""Parameters of a dataclass, checked against its annotations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")

LARGEST_SEED = 2**32 - 1
"""NumPy's generators take no larger one."""


def with_fields(cls: type[T], name: str, parameters: Mapping[str, Any]) -> T:
    """Make an object of a dataclass from parameters; `name` is for messages.

    Raises:
        TypeError: a parameter that it does not have.
        ValueError: a value that it cannot have.
    """
    hints = get_type_hints(cls, include_extras=True)
    kinds = {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}  # pyright: ignore[reportArgumentType]
    return cls(**{word: _checked(f"{name}'s {word}", v, kinds.get(word, Any)) for word, v in parameters.items()})


def _checked(what: str, value: Any, kind: Any) -> Any:
    """Return a parameter's value, checked against the field's annotation."""
    try:
        strict = ConfigDict(strict=True, allow_inf_nan=False)
        return TypeAdapter(kind, config=strict).validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        if own := problem.partition("Value error, ")[2]:
            raise ValueError(f"{what}: {own}") from error
        raise ValueError(f"{what} {problem.replace('Input should be', 'must be')}; got {value!r}") from error
