"""Published streams of stages, with their orders, from `streams.yml`.

    stages: {suite: cl-standard, order: 2}                       # datasets from the Hub
    stages: {suite: trace, data: LLM-CL-Benchmark}               # from local files

A recipe's stages may be such a mapping; it becomes the list of stages when the recipe is read. Local files are
DATA/STAGE/train.jsonl and test.jsonl (or .json, .parquet, .csv), or lie as in the authors' repository.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.run.recipe.parts import Location, Part
from hf_contmerge.run.recipe.suites import suite_names
from hf_contmerge.runtime.foreign import expanded, is_too_long

_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
_LONGEST_ANSWER = 50  # tokens, as in the scripts of SAPT and O-LoRA
_HELDOUT = 100


class Stream(Part):
    """A published stream in the place of a list of stages."""

    suite: str
    order: int | None = None
    """A published one, by its number; default: the first."""
    data: Location | None = None
    """Folder of local files, in the place of the Hub."""
    max_examples: Annotated[int, Field(ge=1)] = 1000
    """The most examples of a stage to train on."""
    test_examples: Annotated[int, Field(ge=1)] = 500
    """The most examples of a stage to score."""


@dataclass(frozen=True)
class StreamStage:
    """A stage of a stream: a dataset, or an expert."""

    name: str
    instruction: str = ""
    words: tuple[str, ...] = ()
    """Name of each class, by its number on the Hub; () without classes."""
    options: tuple[str, ...] = ()
    """The names in the order of the prompt, if it is another one."""
    document: str = ""
    """Format over the Hub's columns."""
    path: str = ""
    """Dataset on the Hub."""
    config: str | None = None
    test: str = "test"
    label: str = "label"
    """Column with the number of the class."""
    folder: str = ""
    """Place in the authors' own files."""
    exact: bool = False
    """Answers are compared as a whole."""
    expert: str = ""
    """Model on the Hub, a format over the last part of the base's name."""
    tasks: tuple[str, ...] = ()
    """lm-eval's tasks for the expert."""

    def question(self, document: str) -> str:
        """Return the prompt over a document's columns."""
        options = f"Option: {', '.join(self.options or self.words)} \n" if self.instruction else ""
        return f"{self.instruction}{options}{document}\nAnswer:"


@dataclass(frozen=True)
class _Files:
    """A stage's local files."""

    train: Path
    test: Path
    text: str
    """Column with the document."""


def stream_names() -> tuple[str, ...]:
    """Return the names of the streams."""
    return tuple(_contents())


def stream_orders(name: str) -> dict[int, tuple[str, ...]]:
    """Return a stream's published orders, by number. Raises RecipeError."""
    if name not in _contents():
        hint = f" {name} is a suite of tasks: name it in `general_tasks`." if name in suite_names() else ""
        raise RecipeError(unknown("stream", name, _contents()) + hint)
    return {number: tuple(order) for number, order in _contents()[name]["orders"].items()}


def stream_stages(name: str, order: int | None = None) -> tuple[StreamStage, ...]:
    """Return a stream's stages in a published order, by default the first.

    Raises RecipeError for an unknown stream or order.
    """
    orders = stream_orders(name)
    number = next(iter(orders)) if order is None else order
    if number not in orders:
        raise RecipeError(unknown("order", str(number), map(str, orders), where=name))
    stages: Mapping[str, Mapping[str, Any]] = _contents()[name]["stages"]
    return tuple(_stage(stage, stages[stage]) for stage in orders[number])


def _stage(name: str, fields: Mapping[str, Any]) -> StreamStage:
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return StreamStage(name, **values)


def stream_rules(name: str) -> tuple[str, ...]:
    """Return the merge rules compared by a stream's authors."""
    return tuple(_contents()[name].get("rules", ()))


def with_stream(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's fields with a stream's stages as a list.

    Raises RecipeError for an unknown stream, order or field, and for missing local files.
    """
    if not isinstance(recipe.get("stages"), dict):
        return recipe
    stream = _read(recipe["stages"])
    stages = stream_stages(stream.suite, stream.order)
    files = _local_files(stream, stages) if stream.data is not None else {}
    base = str(recipe.get("base_model"))
    return {**recipe, "stages": [_fields(stream, stage, files.get(stage.name), base) for stage in stages]}


def _read(value: dict[str, Any]) -> Stream:
    try:
        return Stream.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        word = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise RecipeError(unknown("field", word, Stream.model_fields, where="stages")) from error
        raise RecipeError(f"stages.{word}: {first['msg']}") from error


def _local_files(stream: Stream, stages: tuple[StreamStage, ...]) -> dict[str, _Files]:
    """Return each stage's local files. Raises RecipeError with all missing ones."""
    assert stream.data is not None
    if is_too_long(stream.data):
        raise RecipeError(f"stages.data is too long for a path ({len(stream.data)} characters). Shorten it.")
    if any(stage.expert for stage in stages):
        raise RecipeError(f"stages.data: {stream.suite} is made of trained experts and reads no files. Remove `data`.")
    home = expanded(stream.data)
    found = {stage.name: _files(home, stage) for stage in stages}
    missing = [name for name, files in found.items() if not files]
    if missing:
        raise RecipeError(
            f"stages.data: {home} lacks the files of {', '.join(missing)}. Each stage of {stream.suite} needs `train` "
            f"and `test` ({', '.join(_ENDINGS)}) with the columns {_contents()[stream.suite]['columns']}, such as "
            f"{home / missing[0] / 'train.jsonl'}."
        )
    return {name: files for name, files in found.items() if files}


def _files(home: Path, stage: StreamStage) -> _Files | None:
    """Return a stage's files in our layout, or in its authors'."""
    places = [(home / stage.name, "text")]
    if stage.folder:
        places += [(home / Path(stage.folder).name, "text"), (home / stage.folder, "sentence")]
    for folder, text in places:
        train, test = (_file(folder, split) for split in ("train", "test"))
        if train and test:
            return _Files(train, test, text)
    return None


def _file(folder: Path, split: str) -> Path | None:
    with suppress(OSError, ValueError):  # no path at all
        return next((path for end in _ENDINGS if (path := folder / f"{split}{end}").is_file()), None)
    return None


def _fields(stream: Stream, stage: StreamStage, files: _Files | None, base: str) -> dict[str, Any]:
    """Return a stage as a recipe has it."""
    if stage.expert:
        expert = stage.expert.format(base=base.partition("@")[0].rstrip("/").rpartition("/")[2])
        return {"name": stage.name, "expert": expert, "tasks": list(stage.tasks)}
    if not stage.words:
        return _with_answers(stream, stage, files)
    document = f"{{{files.text}}}" if files else stage.document
    train: dict[str, Any] = {"path": str(files.train) if files else stage.path, "config": stage.config}
    test = {**train, "split": stage.test}
    if files:
        train, test = {"path": str(files.train)}, {"path": str(files.test)}
    label, question = "label" if files else stage.label, stage.question(document)
    labels = {} if files else {"labels": {label: list(stage.words)}}
    dataset = {**train, "text": f"{question} {{{label}}}", **labels, "max_examples": stream.max_examples, "heldout": 0}
    task = {
        "name": f"{stage.name}_class", "kind": "multiple_choice", "question": question, "answer": label,
        "choices": list(stage.words), "dataset": {**test, "max_examples": stream.test_examples},
    }  # fmt: skip
    return {"name": stage.name, "dataset": dataset, "tasks": [task]}


def _with_answers(stream: Stream, stage: StreamStage, files: _Files | None) -> dict[str, Any]:
    """Return a stage of prompts and answers, from local files."""
    values = _contents()[stream.suite]
    if not files:
        raise RecipeError(
            f"The stream {stream.suite} is read from local files: its authors' are at {values['code']}. Give their "
            f"folder, `stages: {{suite: {stream.suite}, data: DIR}}`, with DIR/{stage.name}/train.jsonl and so on "
            f"(columns: {values['columns']})."
        )
    prompt, answer = values["prompt"], values["answer"]
    dataset = {
        "path": str(files.train), "text": f"{prompt} {{{answer}}}", "max_examples": stream.max_examples,
        "heldout": min(_HELDOUT, stream.test_examples),
    }  # fmt: skip
    task = {
        "name": f"{stage.name}_exact", "kind": "exact_match", "question": prompt, "answer": answer,
        "max_new_tokens": _LONGEST_ANSWER, "dataset": {"path": str(files.test), "max_examples": stream.test_examples},
    }  # fmt: skip
    return {"name": stage.name, "dataset": dataset, "tasks": [task] if stage.exact else []}


@functools.cache
def _contents() -> Mapping[str, Any]:
    return yaml.safe_load(Path(__file__).with_suffix(".yml").read_text(encoding="utf-8"))["streams"]
