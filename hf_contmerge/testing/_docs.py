"""The docstring of a rule or strategy."""


def docstring(cls: type) -> str:
    """Return a class's own docstring, without dataclass's line."""
    written = cls.__doc__ or ""
    return "" if written.startswith(f"{cls.__name__}(") else written
