"""Finds tokens and passwords in text, and blanks them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

REMOVED = "(removed)"

_TOKEN = re.compile(
    r"""\b(?:
        hf_[A-Za-z0-9]{30,} | api_org_[A-Za-z0-9]{20,}                          # Hugging Face
      | (?:AKIA|ASIA)[0-9A-Z]{16}                                               # AWS
      | sk-(?=[\w-]*\d)[\w-]{20,}                                               # OpenAI, Anthropic
      | gh[pousr]_[A-Za-z0-9]{30,} | github_pat_\w{20,} | glpat-[\w-]{20,}      # GitHub, GitLab
      | xox[abeprs]-[\w-]{10,} | AIza[\w-]{35}                                  # Slack, Google
      | eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]*                                       # JSON web tokens
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


def without_secrets(text: str) -> str:
    """Blank tokens, passwords of addresses, and values of secret environment variables."""
    for value in _of_environment():
        text = text.replace(value, REMOVED)
    return _TOKEN.sub(REMOVED, text)


def holds_secret(text: str) -> bool:
    """Say if a text holds a token or an address with a password."""
    return bool(_TOKEN.search(text)) or any(value in text for value in _of_environment())


def names_secret(field: str) -> bool:
    """Say if a field's name asks for a token or a password."""
    return bool(_NAMED.fullmatch(field)) and not _NO_SECRETS.fullmatch(field)


def secrets_in(value: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted paths of the secrets in JSON-like data."""
    if isinstance(value, dict):
        for key, part in value.items():
            place = f"{path}.{key}" if path else str(key)
            if holds_secret(str(key)):
                yield path or "a field's name"
            elif names_secret(str(key)) and isinstance(part, str) and part:
                yield place
            else:
                yield from secrets_in(part, place)
    elif isinstance(value, list | tuple):
        for number, part in enumerate(value):
            yield from secrets_in(part, f"{path}.{number}" if path else str(number))
    elif isinstance(value, str) and holds_secret(value):
        yield path


def blanked(value: Any, field: str = "") -> Any:
    """Return JSON-like data without its secrets, found by value or by their field's name."""
    if isinstance(value, dict):
        return {key: blanked(part, str(key)) for key, part in value.items()}
    if isinstance(value, list):
        return [blanked(part, field) for part in value]
    if not isinstance(value, str):
        return value
    return REMOVED if value and names_secret(field) else without_secrets(value)


def shown(value: Any, most: int = 60) -> str:
    """Return the start of a value's text for a message, secrets blanked."""
    return repr(blanked(value))[:most]


def printable(text: str) -> str:
    """Return a text for the terminal: no secrets, control characters as escapes."""
    plain = without_secrets(text)
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(repr(c)[1:-1] if is_control(c) else c for c in plain)


def is_control(character: str) -> bool:
    """Say if a character moves the cursor, turns the text around, or is half of one."""
    return character in _TURNS or (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t")


def _of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _VARIABLE.search(name) and not value.startswith(("/", "~", ".")):
            yield value
