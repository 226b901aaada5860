"""Loads public names of a package on first use."""

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import Any


def attach(package: str, homes: Mapping[str, str], *more: str) -> None:
    """Give a package public names, imported on first use.

    Type checkers must not see a `__getattr__`, by which every name would exist; so it is set here. They find the names
    where the package imports them once more, under TYPE_CHECKING.

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

    vars(sys.modules[package]).update(__getattr__=load, __dir__=lambda: names, __all__=names)
