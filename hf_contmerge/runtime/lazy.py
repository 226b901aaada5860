"""Public names of a package that are loaded on first use."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(package: str, homes: Mapping[str, str], *more: str) -> tuple[Callable[[str], Any], Callable, list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package.

    Type checkers follow none of this: the package imports the same names once more under TYPE_CHECKING.

    Args:
        package: the package's `__name__`.
        homes: public name -> the module below the package that defines it.
        more: public names that the package defines itself.
    """
    names = [*more, *homes]

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return load, lambda: names, names
