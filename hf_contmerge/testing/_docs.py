"""The docstring of a rule or strategy."""


def docstring(cls: type) -> str:
    """Return a class's own docstring, without the line that dataclass writes."""
    written = cls.__doc__ or ""
    return "" if written.startswith(f"{cls.__name__}(") else written
