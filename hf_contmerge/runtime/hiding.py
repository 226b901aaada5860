"""Finds tokens and passwords in text, and blanks them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any

REMOVED = "(removed)"

_TOKEN = re.compile(
    r"""\b(?:
        hf_[A-Za-z0-9]{30,} | api_org_[A-Za-z0-9]{20,}                          # Hugging Face
      | (?:AKIA|ASIA)[0-9A-Z]{16}                                               # AWS
      | sk-(?=[\w-]{0,100}\d)[\w-]{20,}                                               # OpenAI, Anthropic
      | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{20,} | glpat-[\w-]{20,}      # GitHub, GitLab
      | xox[abeprs]-[\w-]{10,} | AIza[\w-]{35}                                  # Slack, Google
      | eyJ[\w-]{10,400}\.[\w-]{10,}\.[\w-]*                                       # JSON web tokens
    )
    | -----BEGIN\ [A-Z\ ]*PRIVATE\ KEY-----(?:[^-]*-----END\ [A-Z\ ]*PRIVATE\ KEY-----)?
    | (?<=[Bb]earer\ )[\w.~+/-]{16,}
    | (?<=://)[^/\s@]+@                                                         # the user of an address
    | (?<=[?&])(?i:access_token|token|api_?key|key|sig|signature|password|auth|x-amz-[a-z-]+)=[^&\s\#'"]+
    """,
    re.VERBOSE,
)
_NAMED = re.compile(
    r"(?:\w*_)?(?:secret\w*|passwords?|passwd|api_?key|access_key(?:_id)?|token|credentials?|private_key)",
    re.IGNORECASE,
)
_NO_SECRETS = re.compile(r"(?:eos|bos|pad|unk|sep|cls|mask|image|additional_special)_token", re.IGNORECASE)
_VARIABLE = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_TURNS = frozenset("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_SHORTEST = 12  # characters of a variable's value; shorter ones stand in ordinary text


def without_secrets(text: str, known: Collection[str] | None = None) -> str:
    """Blank tokens, passwords of addresses, and values of secret environment variables.

    `known`: these values; by default they are looked up.
    """
    for value in _of_environment() if known is None else known:
        text = text.replace(value, REMOVED)
    return _TOKEN.sub(REMOVED, text)


def names_secret(field: str) -> bool:
    """Say if a field's name asks for a token or a password."""
    return bool(_NAMED.fullmatch(field)) and not _NO_SECRETS.fullmatch(field)


def holds_secret(text: str, known: Collection[str] | None = None) -> bool:
    """Say if a text holds a token, or an address's password.

    `known`: as in `without_secrets`.
    """
    values = _of_environment() if known is None else known
    return bool(_TOKEN.search(text)) or any(value in text for value in values)


def secrets_in(value: Any) -> Iterator[str]:
    """Yield the dotted paths of the secrets in JSON-like data."""
    yield from _secrets_in(value, "", _of_environment())


def _secrets_in(value: Any, path: str, known: Collection[str]) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            place = f"{path}.{key}" if path else str(key)
            if holds_secret(str(key), known):
                yield path or "a field's name"
            elif names_secret(str(key)) and isinstance(part, str) and part:
                yield place
            else:
                yield from _secrets_in(part, place, known)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from _secrets_in(part, f"{path}.{number}" if path else str(number), known)
    elif isinstance(value, str) and holds_secret(value, known):
        yield path


def blanked(value: Any) -> Any:
    """Return JSON-like data without secrets, found by value or field name."""
    return _blanked(value, "", _of_environment())


def _blanked(value: Any, field: str, known: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {key: _blanked(part, str(key), known) for key, part in value.items()}
    if isinstance(value, list):
        return [_blanked(part, field, known) for part in value]
    if not isinstance(value, str):
        return value
    return REMOVED if value and names_secret(field) else without_secrets(value, known)


def shown(value: Any, most: int = 60) -> str:
    """Return the start of a value's text for a message, secrets blanked."""
    return repr(blanked(_start(value)))[:most]


def _start(value: Any, depth: int = 5) -> Any:
    """Return a value's first parts: a foreign one may have millions."""
    if isinstance(value, str):
        return value[:1000]
    if not isinstance(value, dict | list | tuple) or not value:
        return value
    if depth == 0:
        return "..."
    if isinstance(value, dict):
        return {key: _start(part, depth - 1) for key, part in islice(value.items(), 8)}
    return type(value)(_start(part, depth - 1) for part in value[:8])


def printable(text: str) -> str:
    """Return a text for the terminal: no secrets, control characters as escapes."""
    plain = without_secrets(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(repr(c)[1:-1] if is_control(c) else c for c in plain)


def is_control(character: str) -> bool:
    """Say if a character moves the cursor or turns the text around.

    Also for half a character (a surrogate).
    """
    return character in _TURNS or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")


def _of_environment() -> list[str]:
    return [
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and not value.startswith(("/", "~", "."))
    ]
