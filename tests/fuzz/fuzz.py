"""Fuzzes the parsers of the table in targets.py: `make fuzz BUDGET=seconds SEED=number`.

Any end but success or one of our errors is a finding: another exception, more seconds of processor or more memory than
a bound, a file written outside the target's folder, a message of many pages. Inputs that reach a new line or a new
refusal join the corpus. A finding's input is written to regressions/, which test_fuzz.py replays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_contmerge.errors import ContmergeError

if TYPE_CHECKING:
    from fuzz.targets import Place, Target

HERE = Path(__file__).parent
CORPUS, REGRESSIONS = HERE / "corpus", HERE / "regressions"
SECONDS = 10.0
"""Of the processor, for one input. The slowest bound of SECURITY.md is a second."""
MEMORY = 2**31
"""Bytes that one input may add to the process."""
LONGEST_MESSAGE = 10_000
LONGEST_INPUT = 2**16
LARGEST_KEPT = 2**14

Form = Literal["bytes", "text", "json", "yaml", "lines", "record", "sealed yaml", "safetensors"]


# Mutations

_WORDS = [
    b"null", b"true", b"NaN", b"Infinity", b"-Infinity", b".nan", b".inf", b"1e309", b"-1", b"0", b"1e3", b"9" * 400,
    b"9223372036854775808", b"18446744073709551616", b"-9223372036854775809", b"1" + b"0" * 25, b"0x10", b"1_000",
    b"1:1", b"{}", b"[]", b'""', b"~", b"../x", b"/etc/passwd", b"\\u0000", b"\\ud800", b"\x00", b"\x1b[2J",
    b"\xe2\x80\xae", b"\xed\xa0\x80", b"\xff", b"\xef\xbb\xbf", b"&a ", b"*a", b"!!python/object:os.system ", b"!!int ",
    b"!!binary ",
    b"!!set ", b"!!timestamp ", b"<<: ", b"? ", b"- ", b": ", b"---\n", b"|\n", b"%YAML 1.1\n", b"[" * 150, b"{" * 150,
    b'{"a":' * 150, b"- " * 150, b"{{ x }}", b"{% for x in range(9) %}", b"{% endfor %}", b"{0.__class__}", b"{text!r}",
    b"(a+)+", b"(?:x*)*", b"\\d+", b"(?P<a>", b"(?(1)a|b)", b"\r", b"\n", b"\t", b",", b";", b'"', b"'",
    b"#", b"2001-99-99",
    b"12:30:45", b"quickstart:", b"auto", b"::", b"@", b"+", b"=", b"!function a.b",
]  # fmt: skip
_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3.5, -0.5, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**63,
    2**64, -(2**63) - 1, 10**99, 10**300, "", " ", "x", "../x", "/etc/passwd", "a" * 300, "\x00", "\x1b[2J", "\ud800",
    "\u202e", "auto", "NaN", "1e3", "1e309", "0", "-1", "null", "all", "{x}", "{text}", "(a+)+$", "(", "*", "base", [],
    {}, [[]], [{}], {"": None}, [None], [1, 2], {"a": 1}, ["x", "x"], [True, 1, "1"], {"x": {"x": {"x": 1}}}, "lora",
    "magmax", "x" * 5000, [0] * 1000, "float32", "F32", [0, 0], [0, 2**62], [-1, 4],
]  # fmt: skip


@dataclass
class Mutator:
    """Makes inputs from others. Equal seeds make equal inputs."""

    dice: random.Random
    words: list[Any] = field(default_factory=list)
    """Keys and values seen in the corpus, to put in other places."""

    def mutated(self, data: bytes, other: bytes, form: Form) -> bytes:
        """Return a changed input of a form."""
        dice = self.dice
        if form == "safetensors":
            return self._safetensors(data)
        if form in ("record", "sealed yaml") and dice.random() < 0.95:  # forged: with a seal that fits
            seal = sealed_json if form == "record" else sealed_yaml
            return seal(self.mutated(unsealed(data), unsealed(other), "json" if form == "record" else "yaml"))
        if form in ("json", "yaml", "lines", "record") and dice.random() < 0.7:
            changed = self._structured(data, form)
            if changed is not None:
                return changed if dice.random() < 0.9 else self._bytes(changed, other)
        return self._bytes(data, other)

    def _bytes(self, data: bytes, other: bytes) -> bytes:
        text = bytearray(data)
        for _ in range(self.dice.choice((1, 1, 1, 2, 2, 4, 8))):
            self.dice.choice(_CHANGES)(self.dice, text, other)
        if self.dice.random() < 1 / 5000:
            text = text * (2**19 // (len(text) + 1) + 1)
            return bytes(text)
        return bytes(text[:LONGEST_INPUT])

    def _structured(self, data: bytes, form: Form) -> bytes | None:
        """Change the tree of JSON, YAML or a line of JSON; None if there is none."""
        if form == "lines":
            lines = data.split(b"\n")
            at = self.dice.randrange(len(lines))
            changed = self._structured(lines[at], "json")
            return None if changed is None else b"\n".join([*lines[:at], changed, *lines[at + 1 :]])[:LONGEST_INPUT]
        tree = _tree(data, form)
        if not isinstance(tree, dict | list):
            return None
        for _ in range(self.dice.choice((1, 1, 1, 2, 3))):
            tree = self._changed(tree)
        return _dumped(tree, form, self.dice)

    def _changed(self, tree: Any) -> Any:
        """Return a tree with one node changed."""
        spots = _spots(tree)
        if not spots:
            return self.dice.choice(_VALUES)
        parent, key = self.dice.choice(spots)
        kind = self.dice.randrange(12)
        if kind == 0:
            del parent[key]
        elif kind == 1 and isinstance(parent, dict):
            parent[self._word(str)] = parent.pop(key)
        elif kind == 2:
            parent[key] = [parent[key]]
        elif kind == 3:
            parent[key] = {self._word(str): parent[key]}
        elif kind == 4:
            other, at = self.dice.choice(spots)
            parent[key] = json.loads(json.dumps(other.get(at) if isinstance(other, dict) else _item(other, at)))
        elif kind == 5:
            parent[key] = _retyped(parent[key])
        elif kind == 6:
            parent[key] = _deep(parent[key], self.dice.choice((3, 60, 120)), self.dice.random() < 0.5)
        elif kind == 7 and isinstance(parent[key], list):
            parent[key] = (parent[key] * self.dice.choice((2, 3, 200)))[:2000]
        elif kind == 8 and isinstance(parent, dict):
            parent[self._word(str)] = self._word(object)
        elif kind == 9 and isinstance(parent[key], int | float):
            parent[key] = self.dice.choice((-1, 0, 2, 10, 1000, 2**31, 1e30)) * parent[key]
        elif kind == 10:
            parent[key] = self._word(object)
        else:
            parent[key] = _copied(self.dice.choice(_VALUES))
        return tree

    def _word(self, kind: type) -> Any:
        choice = self.dice.choice(self.words if self.words and self.dice.random() < 0.7 else _VALUES)
        return _copied(choice) if isinstance(choice, kind) else str(choice)

    def _safetensors(self, data: bytes) -> bytes:
        """Change the header, and most often its length with it."""
        (length,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
        header, rest = data[8 : 8 + length], data[8 + length :]
        if self.dice.random() < 0.1:
            return self._bytes(data, data)
        changed = self._structured(header, "json") if self.dice.random() < 0.8 else None
        changed = self._bytes(header, header) if changed is None else changed
        if self.dice.random() < 0.3:
            rest = rest[: self.dice.randrange(len(rest) + 1)]
        claimed = (
            len(changed) if self.dice.random() < 0.95 else self.dice.choice((0, 1, 2**20, 2**31, 2**63, 2**64 - 1))
        )
        return struct.pack("<Q", claimed) + changed + rest


def _flip(dice: random.Random, text: bytearray, _other: bytes) -> None:
    if text:
        text[dice.randrange(len(text))] ^= 1 << dice.randrange(8)


def _set(dice: random.Random, text: bytearray, _other: bytes) -> None:
    if text:
        text[dice.randrange(len(text))] = dice.randrange(256)


def _insert(dice: random.Random, text: bytearray, _other: bytes) -> None:
    at = dice.randrange(len(text) + 1)
    text[at:at] = dice.choice(_WORDS)


def _overwrite(dice: random.Random, text: bytearray, _other: bytes) -> None:
    at, word = dice.randrange(len(text) + 1), dice.choice(_WORDS)
    text[at : at + len(word)] = word


def _delete(dice: random.Random, text: bytearray, _other: bytes) -> None:
    at = dice.randrange(len(text) + 1)
    del text[at : at + dice.choice((1, 1, 2, 8, 64))]


def _repeat(dice: random.Random, text: bytearray, _other: bytes) -> None:
    at, size = dice.randrange(len(text) + 1), dice.choice((1, 2, 4, 16, 64))
    text[at:at] = text[at : at + size] * dice.choice((1, 2, 10, 100))


def _truncate(dice: random.Random, text: bytearray, _other: bytes) -> None:
    del text[dice.randrange(len(text) + 1) :]


def _splice(dice: random.Random, text: bytearray, other: bytes) -> None:
    at, start = dice.randrange(len(text) + 1), dice.randrange(len(other) + 1)
    text[at : at + dice.choice((0, 8, 64))] = other[start : start + dice.choice((4, 16, 64, 512))]


def _number(dice: random.Random, text: bytearray, _other: bytes) -> None:
    numbers = list(re.finditer(rb"-?\d+", bytes(text)))
    if numbers:
        start, end = dice.choice(numbers).span()
        text[start:end] = dice.choice(_WORDS[:19])


def _line(dice: random.Random, text: bytearray, _other: bytes) -> None:
    lines = bytes(text).split(b"\n")
    at, to = dice.randrange(len(lines)), dice.randrange(len(lines))
    lines[to:to] = [lines[at]]
    text[:] = b"\n".join(lines)


def _binary(dice: random.Random, text: bytearray, _other: bytes) -> None:
    """Write a little-endian number, as counts and lengths of binary formats are."""
    at, size = dice.randrange(len(text) + 1), dice.choice((1, 2, 4, 8))
    value = dice.choice((0, 1, 2, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
    text[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


_CHANGES: list[Callable[[random.Random, bytearray, bytes], None]] = [
    _flip, _flip, _set, _insert, _insert, _overwrite, _delete, _delete, _repeat, _truncate, _splice, _splice, _number,
    _line, _binary,
]  # fmt: skip


def _spots(tree: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of nodes below the root, the upper ones first."""
    spots: list[tuple[Any, Any]] = []
    level = [tree] if isinstance(tree, dict | list) else []
    while level and len(spots) < 500:
        spots += [(part, key) for part in level for key in (part if isinstance(part, dict) else range(len(part)))]
        parts = [value for part in level for value in (part.values() if isinstance(part, dict) else part)]
        level = [value for value in parts if isinstance(value, dict | list)]
    return spots


def _item(values: list[Any], at: int) -> Any:
    return values[at] if at < len(values) else None


def _copied(value: Any) -> Any:
    return json.loads(json.dumps(value)) if isinstance(value, dict | list) else value


def _retyped(value: Any) -> Any:
    """Return a value in another type."""
    if isinstance(value, dict):
        return list(value)
    if isinstance(value, list):
        return {str(i): item for i, item in enumerate(value)}
    if isinstance(value, bool | None):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return list(value[:20]) if len(value) % 2 else len(value)


def _deep(value: Any, levels: int, lists: bool) -> Any:
    for _ in range(levels):
        value = [value] if lists else {"a": value}
    return value


def _tree(data: bytes, form: Form) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        if form != "yaml":
            return None
    import yaml

    try:  # dates become text
        return json.loads(
            json.dumps(yaml.load(data, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), default=str)
        )
    except Exception:
        return None


def _dumped(tree: Any, form: Form, dice: random.Random) -> bytes:
    try:
        text = json.dumps(tree, ensure_ascii=dice.random() < 0.7)
    except (ValueError, RecursionError):
        return b"[" * 200
    if form == "yaml":
        text = text.replace("NaN", ".nan").replace("Infinity", ".inf").replace("\t", " ")
    if dice.random() < 0.05 and text.startswith("{") and '"' in text:  # a duplicate key
        key = text.split('"')[1]
        text = f'{{"{key}": {dice.choice(("1", "null", "[]"))}, {text[1:]}'
    return text.encode("utf-8", "surrogatepass")[:LONGEST_INPUT]


def sealed_json(text: bytes) -> bytes:
    """Return JSON text of an object as a record, its seal fitting."""
    body = text.strip().removesuffix(b"}").rstrip()
    return body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n'


def sealed_yaml(text: bytes) -> bytes:
    """Return YAML with the seal of a file of ours."""
    return text + b"# sha256: " + hashlib.sha256(text).hexdigest().encode() + b"\n"


def unsealed(data: bytes) -> bytes:
    """Return a sealed file's text."""
    body, mark, _ = data.rpartition(b',\n "sha256": "')
    return body + b"\n}" if mark else data.rpartition(b"# sha256: ")[0] or data


# One execution


class Slow(BaseException):
    """An input that takes too long. No `except Exception` of a library swallows it."""


@dataclass(frozen=True)
class End:
    """How an execution ended."""

    finding: str = ""
    """What is wrong, and where: equal for all inputs of one fault."""
    place: str = ""
    """Where it was accepted or refused."""
    detail: str = ""


_WATCHED = {
    "open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.system",
    "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pickle.find_class", "shutil.rmtree",
    "shutil.copyfile", "os.chmod", "os.utime",
}  # fmt: skip
_guarded: list[str] = []
_escapes: list[str] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _guarded or event not in _WATCHED:
        return
    if event == "open":
        path, mode, flags = (*args, None, None)[:3]
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
            isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        )
        if not writes or isinstance(path, int):
            return
    elif (
        event.startswith(("os.mk", "os.r", "os.sy", "os.li", "os.tr", "os.ch", "os.ut", "shutil"))
        and event != "os.system"
    ):
        if event in ("os.remove", "os.rmdir", "os.mkdir") and args[-1] not in (-1, None):  # below an open folder
            return
        path = args[1] if event in ("os.rename", "os.link", "os.symlink", "shutil.copyfile") else args[0]
    else:
        _escapes.append(event)
        return
    if isinstance(path, str | bytes | os.PathLike):
        place = os.path.realpath(os.fsdecode(path))
        if "__pycache__" in place:  # an import's
            return
        if place != "/dev/null" and not place.startswith(tuple(_guarded)):
            _escapes.append(f"{event} outside the folder: {place}")


_audited = False


@contextmanager
def watched(folders: Sequence[str]) -> Iterator[list[str]]:
    """List the writes outside of folders, the processes started and the connections made inside."""
    global _audited
    if not _audited:
        sys.addaudithook(_audit)
        _audited = True
    _guarded[:], _escapes[:] = folders, []
    try:
        yield _escapes
    finally:
        _guarded.clear()


def _alarm(*_: Any) -> None:
    raise Slow(f"more than {SECONDS:.0f} s")


def run(target: Target, place: Place, data: bytes) -> End:
    """Give one input to a target."""
    place.put(data)
    with suppress(OSError):  # where Linux can: the peak starts again at what is in use
        Path("/proc/self/clear_refs").write_text("5")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGPROF, _alarm)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with watched(place.writable) as escapes:
            try:
                target.read(place)
                end = End(place="accepted")
            except (ContmergeError, OSError, *target.refuses) as error:
                end = End(place=f"{type(error).__name__} at {_where(error)}", detail=str(error))
                if len(end.detail) > LONGEST_MESSAGE:
                    end = End(f"message of many pages at {_where(error)}", detail=str(error)[:2000])
                elif isinstance(error, UnicodeError):
                    end = End(f"{type(error).__name__} at {_where(error)}", detail=_trace(error))
            except (Exception, Slow, SystemExit, KeyboardInterrupt) as error:
                end = End(f"{type(error).__name__} at {_where(error)}", detail=_trace(error))
        if escapes:
            end = End(f"reached out: {escapes[0].partition(':')[0]}", detail="\n".join(escapes))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > MEMORY and not end.finding:
        end = End(f"{grown / 2**30:.1f} GiB at {end.place}")
    place.clear()
    return end


def _where(error: BaseException) -> str:
    """Return the innermost line of ours in a traceback."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    file, line = next((f for f in reversed(frames) if "/hf_contmerge/" in f[0]), frames[-1])
    return f"{'/'.join(file.split('/')[-2:])}:{line}"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]


@contextmanager
def apart(cache: Path) -> Iterator[None]:
    """Hold back warnings and logs; keep the cache of `datasets` in a folder."""
    import datasets

    before, tempdir = datasets.config.HF_DATASETS_CACHE, tempfile.tempdir
    cache.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.CRITICAL)
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE, tempfile.tempdir = cache, str(cache)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)
        datasets.enable_progress_bars()
        datasets.config.HF_DATASETS_CACHE, tempfile.tempdir = before, tempdir


# A campaign


@dataclass
class Campaign:
    """The fuzzing of one target."""

    target: Target
    place: Place
    dice: random.Random
    inputs: list[bytes]
    places: set[str] = field(default_factory=set)
    lines: set[tuple[str, int]] = field(default_factory=set)
    executions: int = 0
    seconds: float = 0.0
    findings: dict[str, int] = field(default_factory=dict)
    kept: int = 0

    def __post_init__(self) -> None:
        self.mutator = Mutator(self.dice, list(_words_of(self.inputs, self.target.form)))
        for data in self.inputs:
            self._execute(data, traced=True)

    def turn(self, seconds: float) -> None:
        """Fuzz for some seconds."""
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            data = self.mutator.mutated(self.dice.choice(self.inputs), self.dice.choice(self.inputs), self.target.form)
            self._execute(data, traced=self.executions % 32 == 0)
        self.seconds += time.monotonic() - started

    def _execute(self, data: bytes, *, traced: bool) -> None:
        self.executions += 1
        before = len(self.lines)
        if traced:
            sys.settrace(self._calls)
        try:
            end = run(self.target, self.place, data)
        finally:
            sys.settrace(None)
        if end.finding:
            self._report(end, data)
        elif end.place not in self.places or len(self.lines) > before:
            self.places.add(end.place)
            self._keep(data)

    def _calls(self, frame: Any, _event: str, _arg: Any) -> Any:
        return self._lines if "/hf_contmerge/" in frame.f_code.co_filename else None

    def _lines(self, frame: Any, _event: str, _arg: Any) -> Any:
        self.lines.add((frame.f_code.co_filename, frame.f_lineno))
        return self._lines

    def _keep(self, data: bytes) -> None:
        if len(data) <= LARGEST_KEPT and data not in self.inputs and len(self.inputs) < 2000:
            self.inputs.append(data)
            folder = CORPUS / self.target.name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
            self.kept += 1

    def _report(self, end: End, data: bytes) -> None:
        self.findings[end.finding] = self.findings.get(end.finding, 0) + 1
        if self.findings[end.finding] == 1:
            print(f"\n== {self.target.name}: {end.finding}\n{end.detail}", flush=True)
            write_regression(self.target, self._smaller(data, end.finding))

    def _smaller(self, data: bytes, finding: str) -> bytes:
        """Cut parts off as long as the finding stays."""
        stop, size = time.monotonic() + 20, len(data) // 2
        while size and time.monotonic() < stop:
            for start in range(0, len(data), size):
                shorter = data[:start] + data[start + size :]
                shorter = _resealed(shorter, self.target.form)
                if len(shorter) < len(data) and run(self.target, self.place, shorter).finding == finding:
                    data = shorter
                    break
            else:
                size //= 2
            if size < len(data) // 64 and "Slow" in finding:
                break
        return data


def _resealed(data: bytes, form: Form) -> bytes:
    if form == "record":
        return sealed_json(unsealed(data))
    return sealed_yaml(unsealed(data)) if form == "sealed yaml" else data


def _words_of(inputs: list[bytes], form: Form) -> Iterator[Any]:
    """Yield the keys and the plain values of inputs."""
    found: dict[str, Any] = {}
    for data in inputs:
        for part in data.split(b"\n") if form == "lines" else [unsealed(data)]:
            tree = _tree(part[8:] if form == "safetensors" else part, "yaml" if "yaml" in form else "json")
            for parent, key in _spots(tree) if isinstance(tree, dict | list) else ():
                value = parent[key]
                found |= {
                    repr(word): word for word in (key, value) if isinstance(word, str | int | float | bool | None)
                }
    return iter(found.values())


def write_regression(target: Target, data: bytes) -> Path:
    """Keep the input of a finding, for the test that replays it."""
    folder = REGRESSIONS / target.name
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / hashlib.sha256(data).hexdigest()[:12]
    file.write_bytes(data)
    return file


def inputs_of(target: Target, home: Path) -> list[bytes]:
    """Return a target's seeds and what its corpus and regressions hold."""
    kept = [p.read_bytes() for f in (CORPUS, REGRESSIONS) for p in sorted((f / target.name).glob("*"))]
    return [*dict.fromkeys([*target.seeds(home), *kept])]


def work(budget: float, seed: int, names: list[str], state: Path) -> None:
    """Fuzz targets in turns; write the counts after each."""
    from fuzz.targets import TARGETS, Place, make_home

    scratch = Path(tempfile.mkdtemp(prefix="fuzz-", dir=state))
    (state / "now").write_text("the toys\n")
    with apart(scratch / "home" / "cache"):
        home = make_home(scratch / "home")
        limit = _address_space() + 2 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        end = time.monotonic() + budget
        campaigns = []
        for target in TARGETS:
            if not names or target.name in names:
                place = Place.of(target, home, scratch / target.name.replace(" ", "-"))
                _note(state, target, place)
                campaigns.append(
                    Campaign(target, place, random.Random(f"{seed} {target.name}"), inputs_of(target, home))
                )
        while time.monotonic() < end:
            for campaign in campaigns:
                _note(state, campaign.target, campaign.place)
                campaign.turn(min(campaign.target.turn, max(end - time.monotonic(), 0)))
                _save(state, campaigns)
            remove_below(home / "cache")


def remove_below(folder: Path) -> None:
    """Empty a folder."""
    for path in folder.iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


def _note(state: Path, target: Target, place: Place) -> None:
    """Write where the input lies, for whoever finds this process dead."""
    (state / "now").write_text(f"{target.name}\n{place.file}")


def _save(state: Path, campaigns: list[Campaign]) -> None:
    counts = {c.target.name: [c.executions, c.seconds, len(c.lines), len(c.inputs), c.findings] for c in campaigns}
    (state / f"counts-{os.getpid()}.new").write_text(json.dumps(counts))
    (state / f"counts-{os.getpid()}.new").replace(state / f"counts-{os.getpid()}.json")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main() -> int:
    """Run workers until the budget is spent: one that a target kills is a finding, and another takes its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=60, help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("targets", nargs="*", help="names from the table; by default all")
    args = parser.parse_args()
    if args.worker:
        work(args.budget, args.seed, args.targets, args.worker)
        return 0
    end, seed = time.monotonic() + args.budget, args.seed
    died: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        while (left := end - time.monotonic()) > 0:
            words = [f"--budget={left}", f"--seed={seed}", f"--worker={folder}", *args.targets]
            worker = subprocess.Popen([sys.executable, __file__, *words], env=_environment(Path(folder)))
            code = _wait(worker, Path(folder))
            if code == 0:
                break
            name, _, file = (Path(folder) / "now").read_text().partition("\n")
            died[name] += 1
            print(f"\n== {name}: the process ended with {code}", flush=True)
            if Path(file).is_file():
                kept = REGRESSIONS / name / f"died-{hashlib.sha256(Path(file).read_bytes()).hexdigest()[:12]}"
                kept.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, kept)
            seed += 1
        print(table(Path(folder), died))
        findings = sum(died.values()) + sum(len(row[4]) for row in _counts(Path(folder)).values())
    return 1 if findings else 0


def _wait(worker: subprocess.Popen[bytes], folder: Path) -> int:
    """Wait for a worker; kill one that hangs where no signal of Python reaches it."""
    try:
        before, since = -1.0, time.monotonic()
        while worker.poll() is None:
            time.sleep(1)
            spent = sum(os.times()[2:4]) + _seconds(worker.pid)
            stamp = max((p.stat().st_mtime for p in folder.iterdir()), default=0.0)
            if stamp != before:
                before, since, used = stamp, time.monotonic(), spent
            elif spent - used > 180 or time.monotonic() - since > 1800:
                worker.kill()
        return worker.returncode
    finally:
        worker.kill()


def _seconds(process: int) -> float:
    """Return the seconds of processor that a process has used."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    caches = {"HF_CONTMERGE_CACHE": "off", "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
              "TQDM_DISABLE": "1", "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    kept = {word: os.environ[word] for word in ("HOME", "LANG", "PATH", "VIRTUAL_ENV") if word in os.environ}
    return {**kept, **own, **caches}


def _counts(folder: Path) -> dict[str, list[Any]]:
    """Return the counts of all workers, by target."""
    total: dict[str, list[Any]] = {}
    for file in folder.glob("counts-*.json"):
        for name, (executions, seconds, lines, inputs, findings) in json.loads(file.read_text()).items():
            row = total.setdefault(name, [0, 0.0, 0, 0, {}])
            row[:4] = row[0] + executions, row[1] + seconds, max(row[2], lines), max(row[3], inputs)
            row[4] = {**row[4], **findings}
    return total


def table(folder: Path, died: Counter[str]) -> str:
    """Return the table of executions and findings."""
    rows = [f"{'target':24s} {'executions':>12s} {'per second':>11s} {'lines':>6s} {'inputs':>7s} {'findings':>9s}"]
    counts = _counts(folder)
    for name, (executions, seconds, lines, inputs, findings) in counts.items():
        found = len(findings) + died[name]
        rows.append(
            f"{name:24s} {executions:12,d} {executions / (seconds or 1):11,.0f} {lines:6d} {inputs:7d} {found:9d}"
        )
    found = sum(died.values()) + sum(len(row[4]) for row in counts.values())
    rows.append(f"{'all':24s} {sum(row[0] for row in counts.values()):12,d} {'':27s}{found:9d}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # this folder is a package
    sys.exit(main())
