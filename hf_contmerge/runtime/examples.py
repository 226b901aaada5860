"""The package's recipes and launcher configurations, in the checkout or the wheel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from hf_contmerge.errors import RecipeError, unknown

_PACKAGE = Path(__file__).resolve().parents[1]


class Example(NamedTuple):
    """A file to copy."""

    name: str
    """Its path below recipes/, without the ending: finance, accelerate/fsdp2."""
    file: Path

    @property
    def kind(self) -> str:
        if self.name.startswith("accelerate/"):
            return "launcher"
        return "mergekit" if re.search("^merge_method:", self.text(), flags=re.M) else "recipe"

    def text(self) -> str:
        return self.file.read_text(encoding="utf-8")

    def sentence(self) -> str:
        """Return the first sentence of the comment at the top."""
        head = re.match(r"(#[^\n]*\n)+", self.text())
        words = " ".join(line.lstrip("# ") for line in head.group().splitlines()) if head else ""
        return re.split(r"(?<=[.:]) ", words, maxsplit=1)[0].rstrip(":").rstrip()


def own_file(folder: str, name: str = "") -> Path:
    """Return a file of the checkout, or its copy in the wheel."""
    inside = _PACKAGE / folder / name
    return inside if inside.exists() else _PACKAGE.parent / folder / name


def examples() -> dict[str, Example]:
    """Return name -> example, recipes first."""
    home = own_file("recipes")
    files = [*sorted(home.glob("*.yml")), *sorted(home.glob("accelerate/*.yaml"))]
    names = [file.relative_to(home).with_suffix("").as_posix() for file in files]
    return {name: Example(name, file) for name, file in zip(names, files, strict=True)}


def find_example(name: str) -> Example:
    """Return an example by name. Raises RecipeError."""
    known, plain = examples(), re.sub(r"^recipes/|\.ya?ml$", "", name)
    if plain not in known:
        raise RecipeError(f"{unknown('example', name, known)} `contmerge example list` describes them.")
    return known[plain]


def launcher_file(name: str) -> Path:
    """Return an accelerate configuration: a file, or one of ours by name.

    Raises:
        RecipeError: neither.
    """
    if Path(name).is_file():
        return Path(name)
    ours = {path.removeprefix("accelerate/"): example for path, example in examples().items() if "/" in path}
    if name not in ours:
        raise RecipeError(f"{unknown('accelerate configuration', name, ours)} Or give a file.")
    return ours[name].file
