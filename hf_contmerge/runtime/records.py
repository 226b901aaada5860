"""Records: JSON with a format number and a seal against changes.

The last field, `sha256`, is the digest of all bytes before it. Lines of a log and YAML files end in the same digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from hf_contmerge.errors import RunError
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.foreign import parse_json, read_text, require_shape

Record = dict[str, Any]

FORMAT = 2
"""Of all records; incremented when older programs cannot read them. Format 1 had no seals."""


class _Seal(NamedTuple):
    """The marks around the digest of a text."""

    before: str
    after: str

    def put(self, text: str) -> str:
        return f"{text}{self.before}{_sha256(text)}{self.after}"

    def take(self, sealed: str) -> str | None:
        """Return the text below a seal, or None. Raises ValueError if broken."""
        text, found, end = sealed.rpartition(self.before)
        if not found:
            return None
        if end != _sha256(text) + self.after:
            raise ValueError("its bytes do not match the digest in its last line")
        return text


_RECORD = _Seal(',\n "sha256": "', '"\n}\n')
_LINE = _Seal(', "sha256": "', '"}')
_YAML = _Seal("# sha256: ", "\n")


def write_record(path: Path, values: Mapping[str, Any], *, finite: bool = False) -> None:
    """Replace a record atomically. `finite`: raise ValueError for infinities and NaN."""
    write_atomically(path, record_text(values, finite=finite))


def record_text(values: Mapping[str, Any], *, finite: bool = False) -> str:
    """Return the text of a record."""
    text = json.dumps({"format": FORMAT, **values}, indent=1, allow_nan=not finite)
    return _RECORD.put(text.removesuffix("\n}"))


class _Fields(Record):
    """The fields of a record. Raises RunError for a missing one."""

    def __init__(self, values: Record, path: Path, cure: str) -> None:
        super().__init__(values)
        self._path, self._cure = path, cure

    def __missing__(self, field: str) -> Any:
        raise RunError(f"{self._path} is damaged: it lacks {field!r}. {self._cure}")


_COMMON = {"files?": {str: str}, "versions?": {str: str}}


def read_record(path: Path, cure: str, shape: Mapping[str, Any] = MappingProxyType({})) -> Record:
    """Return a record's fields.

    Args:
        path: the file.
        cure: what to do if it is damaged.
        shape: of its fields, as in `require_shape`: whoever forges a record forges its seal, too.

    Raises:
        RunError: the record is missing, damaged, or of another format.
    """
    try:
        text = read_text(path)
        body = _RECORD.take(text)
        values = parse_json(text if body is None else body + "\n}")
        if not isinstance(values, dict):
            raise ValueError(f"it holds {text.strip()[:20] or 'nothing'} in place of fields")
    except OSError as error:
        raise RunError(f"Cannot read {path}: {error.strerror}. {cure}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. {cure}") from error
    number = values.pop("format", 1)
    if number != FORMAT:
        raise RunError(_other_format(path, number, values, cure))
    if body is None:
        raise RunError(f"{path} is damaged: the digest at its end is missing. {cure}")
    try:
        require_shape(values, {**_COMMON, **shape})
    except ValueError as error:
        raise RunError(f"{path} is damaged: {error}. {cure}") from error
    return _Fields(values, path, cure)


def sealed_line(values: Mapping[str, Any]) -> str:
    """Return a line of a log."""
    return _LINE.put(json.dumps(values).removesuffix("}")) + "\n"


def read_lines(path: Path, cure: str, shape: Mapping[str, Any] = MappingProxyType({})) -> list[Record]:
    """Return the lines of a log. Raises RunError for damage.

    Arguments as `read_record`. There may be no lines.
    """
    lines = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1] if path.is_file() else (), 1):
        try:
            body = _LINE.take(line.decode("utf-8"))
            if body is None:
                raise ValueError("its digest is missing")
            lines.append(parse_json(body + "}"))
            require_shape(lines[-1], dict(shape))
        except ValueError as error:
            raise RunError(f"Line {number} of {path} is damaged: {error}. {cure}") from error
    return lines


def seal_yaml(text: str) -> str:
    """Add a digest to YAML, as a comment in its last line."""
    return _YAML.put(text)


def require_seal(path: Path, cure: str) -> None:
    """Raise RunError unless a YAML file is as it was written."""
    try:
        if _YAML.take(path.read_bytes().decode("utf-8")) is None:
            raise ValueError("the digest in its last line is missing")
    except OSError as error:
        raise RunError(f"Cannot read {path}: {error.strerror}. {cure}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged or was edited: {error}. {cure}") from error


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _other_format(path: Path, number: Any, values: Record, cure: str) -> str:
    made = values.get("versions")
    version = made.get("hf_contmerge") if isinstance(made, dict) else None
    by = f"hf_contmerge {version}" if version else "another version of hf_contmerge"
    return (
        f"{path} has format {number!r:.20}, but this program reads format {FORMAT}, whose records hold digests. "
        f"Continue with the version that wrote it ({by}). If it is this version's, it is damaged. {cure}"
    )
