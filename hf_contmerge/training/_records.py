"""Records of text files (.jsonl, .json, .csv, .tsv, .txt), read without guessing.

A record is JSON text with its place. JSON keeps the text of the file, numbers included. The fields of a CSV file are
strings, and an empty one is null. Each line of a text file is a record. The encoding is UTF-8, or the one that a byte
order mark names.
"""

from __future__ import annotations

import codecs
import csv
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, TextIO

import datasets
import pyarrow
from datasets.builder import Key
from datasets.utils.file_utils import xopen

from hf_contmerge.errors import DataError
from hf_contmerge.runtime.foreign import repeated
from hf_contmerge.training._packed import require_bounded

Kind = Literal["json", "csv", "text"]

_BATCH = 1000
_CHUNK = 2**20
_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
          codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
"""Byte order marks, longest first: UTF-16's begins UTF-32's."""
_BLANK = " \t\r\n"
_BLANKS = re.compile(f"[{_BLANK}]*")
_QUOTED = re.compile(r'"[^"]*"')
_LONGEST = 2**24
"""Characters of a line, a field or a value. A longer one is no example, and its tokens would fill the memory."""


class Record(NamedTuple):
    """A record's JSON text, and where it stands."""

    text: str
    place: str
    """`line 12`, after the file's name."""


class Number(float):
    """A JSON number with a fraction, shown as written."""

    def __new__(cls, text: str) -> Number:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str

    def __str__(self) -> str:
        return self.text

    def __format__(self, spec: str) -> str:
        return float.__format__(self, spec) if spec else self.text


def parse_record(text: str) -> Any:
    """Return a record's value. Raises ValueError for damaged JSON."""
    return _DECODER.decode(text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"it has the key {repeated(name for name, _ in pairs)[0]!r} twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=Number, parse_constant=Number)


@dataclass
class RecordsConfig(datasets.BuilderConfig):
    """The files' kind, and the CSV delimiter if it is declared."""

    kind: Kind = "json"
    delimiter: str | None = None


class Records(datasets.ArrowBasedBuilder):
    """Reads files into the columns `text` and `place`."""

    BUILDER_CONFIG_CLASS = RecordsConfig
    config: RecordsConfig

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features({name: datasets.Value("string") for name in COLUMNS}))

    def _split_generators(self, dl_manager: Any) -> list[Any]:
        files: Any = self.config.data_files
        return [
            datasets.SplitGenerator(str(split), {"files": _unpacked(dl_manager, names), "names": list(names)})
            for split, names in files.items()
        ]

    def _generate_tables(self, files: list[Any], names: list[str]) -> Iterator[tuple[Key, pyarrow.Table]]:
        for number, (file, name) in enumerate(zip(files, names, strict=True)):
            records = read_records(file, name, self.config.kind, self.config.delimiter)
            for batch in itertools.count():
                part = list(itertools.islice(records, _BATCH))
                if not part:
                    break
                yield Key(number, batch), pyarrow.table(list(map(pyarrow.array, zip(*part, strict=True))), COLUMNS)


COLUMNS = list(Record._fields)


def _unpacked(manager: Any, names: list[str]) -> Any:
    """Download files, and unpack compressed ones within bounds."""
    if manager.is_streaming:
        return manager.download_and_extract(names)
    fetched = manager.download(names)
    for file, name in zip(fetched, names, strict=True):
        require_bounded(Path(file), name)
    return manager.extract(fetched)


def read_records(file: str, name: str, kind: Kind, delimiter: str | None = None) -> Iterator[Record]:
    """Yield a file's records.

    Args:
        file: local path, or URL.
        name: the file in messages.
        kind: how it is read.
        delimiter: of CSV; None for the one that the header shows.

    Raises:
        DataError: the file cannot be read; the message names file and line.
    """
    readers: dict[Kind, Callable[[TextIO], Iterable[Record]]] = {
        "json": lambda stream: _json(stream, name),
        "csv": lambda stream: _csv(stream, name, delimiter),
        "text": lambda stream: _text(stream, name),
    }
    with _open(file) as raw:
        encoding = _encoding(raw, name)
        stream = TextIOWrapper(raw, encoding, newline="" if kind == "csv" else "\n")
        try:
            yield from readers[kind](stream)
        except UnicodeError as error:
            raise _not_text(file, name, encoding) from error


def _open(file: str) -> Any:
    return open(file, "rb") if os.path.isfile(file) else xopen(file, "rb")  # a local name may have `::`


def _encoding(raw: IO[bytes], name: str) -> str:
    """Return the encoding of a byte order mark, or UTF-8."""
    head = raw.read(4)
    raw.seek(0)
    if len(head) == 4 and (head[0] == head[2] == 0 or head[1] == head[3] == 0) and head.count(0) == 2:
        raise DataError(f"{name} looks like UTF-16 without a byte order mark. Save it as UTF-8.")
    return next((encoding for mark, encoding in _MARKS.items() if head.startswith(mark)), "utf-8-sig")


def _not_text(file: str, name: str, encoding: str) -> DataError:
    """Return the error for another encoding, with the first byte's place."""
    cure = "Save the file as UTF-8."
    if encoding != "utf-8-sig":
        return DataError(f"{name} is not {encoding.upper()}, as its byte order mark says. {cure}")
    with _open(file) as raw:
        for number, line in enumerate(raw, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = f"byte {error.start + 1} is 0x{line[error.start]:02x}"
                return DataError(f"{name}, line {number}: {byte}, which is not UTF-8. {cure}")
    return DataError(f"{name} is not UTF-8. {cure}")


# Text


def _lines(stream: TextIO, name: str, start: int = 1) -> Iterator[str]:
    """Yield a file's lines, counted from `start`. Raises DataError.

    A line may be too long to be an example.
    """
    for number in itertools.count(start):
        line = stream.readline(_LONGEST + 1)
        if not line:
            return
        if len(line) > _LONGEST:
            raise _too_long(f"{name}, line {number}")
        yield line


def _too_long(where: str) -> DataError:
    return DataError(f"{where}: more than {_LONGEST:,} characters, which is no example. Split it, or remove it.")


def _text(stream: TextIO, name: str) -> Iterator[Record]:
    for number, line in enumerate(_lines(stream, name), 1):
        yield Record(json.dumps({"text": line.removesuffix("\n").removesuffix("\r")}), f"line {number}")


# CSV


def _csv(stream: TextIO, name: str, delimiter: str | None) -> Iterator[Record]:
    """Yield a row per record by the header's names; empty is null."""
    csv.field_size_limit(_LONGEST)
    read = _lines(stream, name)
    first = next(read, "")
    lines = csv.reader(itertools.chain([first], read), delimiter=delimiter or _delimiter(first), strict=True)
    header: list[str] = []
    end = 0
    try:
        for fields in lines:
            start, end = end + 1, lines.line_num
            if not header:
                header = _header(fields, name)
            elif fields:
                yield Record(json.dumps(_row(header, fields, f"{name}, line {start}")), f"line {start}")
    except csv.Error as error:
        raise DataError(f"{name}, line {end + 1}: this is no CSV ({error}). Check the quotes in it.") from error


def _delimiter(header: str) -> str:
    """Return the first of comma, tab and semicolon in the header."""
    names = _QUOTED.sub("", header)
    return next((sign for sign in ",\t;" if sign in names), ",")


def _header(names: list[str], file: str) -> list[str]:
    if twice := repeated(names):
        raise DataError(f"{file}: two columns are named {twice[0]!r}. Give each column its own name in the first line.")
    return names


def _row(header: list[str], fields: list[str], where: str) -> dict[str, str | None]:
    if len(fields) != len(header):
        raise DataError(
            f"{where}: the row has {len(fields)} fields and the first line {len(header)}. Quote each field that has "
            "the delimiter, a quote or a line break in it."
        )
    return {name: field or None for name, field in zip(header, fields, strict=True)}


# JSON


def _json(stream: TextIO, name: str) -> Iterator[Record]:
    """Yield JSON Lines, an array's items, or objects over several lines."""
    blank = 0
    while not (first := stream.readline(_LONGEST + 1)).strip(_BLANK):
        if not first:
            return
        blank += 1
    if first.lstrip(_BLANK).startswith("[") or not _is_json(first):
        yield from _Values(stream, first, blank + 1, name).records()
        return
    for number, line in enumerate(itertools.chain([first], _lines(stream, name, blank + 2)), blank + 1):
        if line.strip(_BLANK):
            yield _checked(line.strip(_BLANK), name, f"line {number}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _checked(text: str, name: str, place: str) -> Record:
    """Return an object's record, or null's. Raises DataError for others."""
    try:
        parse_record(text)
    except (ValueError, RecursionError) as error:
        raise _no_json(error, f"{name}, {place}") from error
    if text[0] == "{":
        return Record(text, place)
    if text == "null":
        return Record("{}", place)
    raise DataError(f"{name}, {place}: an object with the columns was expected; got {text:.60}.")


def _no_json(error: Exception, where: str) -> DataError:
    if isinstance(error, RecursionError):
        why = "values are nested too deeply"
    else:
        why = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"{where}: this is no JSON object ({why}). Correct it, or remove it.")


def _blanks_end(text: str, start: int) -> int:
    match = _BLANKS.match(text, start)
    return match.end() if match else start


class _Values:
    """Values of JSON text, read part by part."""

    def __init__(self, stream: TextIO, begin: str, line: int, name: str) -> None:
        self._stream, self._buffer, self._at, self._line, self._name = stream, begin, 0, line, name

    def records(self) -> Iterator[Record]:
        """Yield an array's items, or one value after the other."""
        array = self._next() == "["
        self._at += array
        while (sign := self._next()) not in ("]" if array else "", ""):
            yield self._record(sign)
            if array and (sign := self._next()) not in ",]":
                raise self._error("',' or ']' was expected")
            self._at += array and sign == ","
        if array and not sign:
            raise self._error("the array has no end: the file is cut off")
        self._at += array
        if self._next():
            raise self._error("something follows the array")

    def _record(self, sign: str) -> Record:
        place, text = f"line {self._line}", self._value()
        return _checked(f'{{"text": {text}}}' if sign == '"' else text, self._name, place)

    def _value(self) -> str:
        """Return the text of the next value."""
        while True:
            try:
                end = json.JSONDecoder().raw_decode(self._buffer, self._at)[1]
                break
            except json.JSONDecodeError as error:
                if not self._more():
                    self._line += self._buffer.count("\n", self._at, error.pos)
                    raise self._error(error.msg) from error
            except ValueError as error:
                raise self._error("a number has too many digits") from error
            except RecursionError as error:
                raise _no_json(error, f"{self._name}, line {self._line}") from error
        text = self._buffer[self._at : end]
        if len(text) > _LONGEST:
            raise _too_long(f"{self._name}, line {self._line}")
        self._line += text.count("\n")
        self._at = end
        return text

    def _next(self) -> str:
        """Return the next visible sign; "" at the end."""
        while True:
            start, self._at = self._at, _blanks_end(self._buffer, self._at)
            self._line += self._buffer.count("\n", start, self._at)
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def _more(self) -> bool:
        """Read on, at least doubling the text: long values are parsed rarely."""
        left = self._buffer[self._at :]
        if len(left) > _LONGEST + 1:  # an array on one line begins with as many
            raise _too_long(f"{self._name}, line {self._line}")
        part = self._stream.read(max(_CHUNK, len(left)))
        self._buffer, self._at = left + part, 0
        return bool(part)

    def _error(self, why: str) -> DataError:
        return DataError(f"{self._name}, line {self._line}: this is no JSON ({why}). Correct the file.")
