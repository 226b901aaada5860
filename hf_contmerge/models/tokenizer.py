"""Changes of a tokenizer besides its tokens: chat template, end, padding.

Training can set them. They go into the files of experts and merges next to the weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hf_contmerge.models.config import chat_template, optional_json, tokens_of
from hf_contmerge.models.contents import companions
from hf_contmerge.runtime.files import remove

_FILES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "vocab", "merges", "spiece")


_TOKEN = ([str, int], None)
SHAPE = {"eos": _TOKEN, "pad": _TOKEN, "chat_template": (str, None)}
"""Of a change in a record."""


class Token(NamedTuple):
    """A token of the vocabulary."""

    text: str
    number: int


@dataclass(frozen=True)
class TokenizerChange:
    """Differences from the base's tokenizer; None for equal fields."""

    eos: Token | None = None
    pad: Token | None = None
    chat_template: str | None = None

    def __bool__(self) -> bool:
        return self != TokenizerChange()

    def write(self, folder: Path) -> None:
        """Apply the change to the files of a model folder.

        The generation config keeps its other ends: any of them stops a generation.
        """
        words = {f"{name}_token": token.text for name, token in self._tokens().items()}
        numbers = {f"{name}_token_id": token.number for name, token in self._tokens().items()}
        _edit(folder / "tokenizer_config.json", lambda values: _without_template(values, self) | words)
        _edit(folder / "special_tokens_map.json", lambda values: values | words)
        _edit(folder / "config.json", lambda values: _numbered(values, numbers))
        _edit(folder / "generation_config.json", lambda values: values | numbers | self._ends(values))
        if self.chat_template is not None:
            remove(folder / "chat_template.json")  # an older place, which would count too
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @classmethod
    def read(cls, record: Mapping[str, Any] | None) -> TokenizerChange:
        """Return the change in a record; none without one."""
        if not record:
            return UNCHANGED
        eos, pad = (Token(*record[name]) if record[name] else None for name in ("eos", "pad"))
        return cls(eos, pad, record["chat_template"])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _tokens(self) -> dict[str, Token]:
        return {name: token for name, token in (("eos", self.eos), ("pad", self.pad)) if token}

    def _ends(self, values: dict[str, Any]) -> dict[str, Any]:
        if not self.eos:
            return {}
        old = values.get("eos_token_id")
        ends = [end for end in (old if isinstance(old, list) else [old]) if isinstance(end, int)]
        return {"eos_token_id": list(dict.fromkeys([self.eos.number, *ends]))}


UNCHANGED = TokenizerChange()


def tokenizer_change(base: Path, expert: Path) -> TokenizerChange:
    """Return how an expert's tokenizer differs from the base's.

    Empty where it has other tokens, or none are listed.
    """
    tokens = tokens_of(expert)
    if not tokens or tokens != tokens_of(base):
        return UNCHANGED
    change = UNCHANGED
    for name in ("eos", "pad"):
        text = _special(expert, name)
        unset = name == "pad" and text == _special(expert, "eos")  # trainers pad with the end where nothing is said
        if text in tokens and text != _special(base, name) and not unset:
            change = replace(change, **{name: Token(text, tokens[text])})
    template = _template(expert)
    return replace(change, chat_template=template) if template != _template(base) else change


def tokenizer_folder(base: Path, expert: Path) -> Path:
    """Return an expert's folder if its tokenizer differs, else the base's."""
    return expert if tokenizer_change(base, expert) else base


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer next to an adapter."""
    for path in companions(source):
        if path.name.startswith(_FILES):
            shutil.copyfile(path, target / path.name)


def _special(folder: Path, name: str) -> str:
    token = optional_json(folder / "tokenizer_config.json").get(f"{name}_token")
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _template(folder: Path) -> str | None:
    found = chat_template(folder)
    return found if isinstance(found, str) else None


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Rewrite a JSON file if it exists and the change changes it."""
    before = optional_json(file)
    after = change(dict(before))
    if file.is_file() and after != before:
        file.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _without_template(values: dict[str, Any], change: TokenizerChange) -> dict[str, Any]:
    if change.chat_template is not None:
        values.pop("chat_template", None)  # an older place of what the .jinja file holds
    return values


def _numbered(values: dict[str, Any], numbers: dict[str, int]) -> dict[str, Any]:
    """Set ids in a config, and in its text part."""
    if isinstance(values.get("text_config"), dict):
        values["text_config"] = values["text_config"] | numbers
    return values | numbers
