"""A study: one recipe over orders of the stages, seeds and settings.

    name: texts
    recipe: recipe.yml                       # a recipe's file, or its fields
    orders: 3                                # random ones, the recipe's first; or `all`; or lists of the stages' names;
                                             # or a stream, such as cl-standard: its published ones
    seeds: [0, 1, 2]
    vary: {train.learning_rate: [2.0e-5, 1.0e-4], train.strategy: [full, lora]}         # every combination
    settings: [{name: slow-lora, set: {train.strategy: lora, train.learning_rate: 1.0e-5}}]     # and these

The study folder holds a run for each cell of the grid:

    studies/<name>/
      study.yml                              the study with every default
      runs/<setting>_order-1_seed-0/         a run, as `contmerge run` makes it
      experts/<digest>/                      experts, each trained once for all runs
      report/                                index.html study.md study.tex study.csv study.json study.png
      study.json                             written when everything above is done
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.run.recipe.parts import LONGEST_NAME, Location, Name, Part, Seed
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.streams import stream_names, stream_orders, with_stream
from hf_contmerge.run.recipe.text import explain, parse_recipe, read_mapping, set_field
from hf_contmerge.runtime.foreign import repeated

Order = tuple[str, ...]


def _read_orders(value: Any) -> Any:
    """Refuse other forms in one sentence."""
    lists = isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_order, value))
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (lists or count or isinstance(value, str)):
        raise ValueError(
            "must be `all`, a number from 1 on, a stream, or lists of stage names such as [[a, b], [b, a]]"
        )
    return value


def _is_order(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


_MOST_CELLS = 10_000

_FIXED = {"name": "the cell", "output": "the cell", "seed": "`seeds`", "stages": "`orders`"}
"""Fields of a recipe that the grid sets, and what sets them."""

_DOCUMENTS = ("limit", "include_path", "validation")
"""Fields of `evaluate` that choose documents; the last one only with a guard or `auto`."""


class Setting(Part):
    """Fields of the recipe for some cells: dotted path -> value."""

    name: Name
    set: dict[str, Any]


class Study(Part):
    """A grid of runs."""

    name: Name
    recipe: Location | dict[str, Any]
    """A recipe's file, relative to this one's folder, or a recipe's fields."""
    output: Location | None = None
    """The study folder; default: studies/<name>."""
    orders: Annotated[int | str | tuple[Order, ...], BeforeValidator(_read_orders)] = 1
    """`all`, or a stream for its published orders."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    vary: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default={})
    settings: tuple[Setting, ...] = ()
    keep: Literal["all", "scores"] = "all"
    """scores: a finished run's merged weights are deleted, and all experts with the last run. Records, scores and
    reports stay; `contmerge redo RUN merge` brings merged models back while the experts are there."""
    reference: str | None = None
    """The line that others are compared with: a merge entry, `fine-tuning alone`, or `SETTING: LINE`. Default:
    fine-tuning alone in its best setting, without it the best line."""

    @model_validator(mode="after")
    def _differ(self) -> Study:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: {', '.join(map(str, self.seeds))} has one twice")
        for field in (*self.vary, *(field for setting in self.settings for field in setting.set)):
            first = field.partition(".")[0]
            if first in _FIXED and (first != "stages" or field in ("stages", "stages.order")):
                raise ValueError(f"{field} cannot vary here: {_FIXED[first]} sets it")
        for field, values in self.vary.items():
            if repeated(json.dumps(value, sort_keys=True, default=str) for value in values):
                raise ValueError(f"vary: {field} has one value twice; each counts once")
        if (count := self._count()) > _MOST_CELLS:
            raise ValueError(f"`vary` and `settings` give {count} settings, at most {_MOST_CELLS} are run")
        if twice := sorted(repeated(name for name, _ in self.changes())):
            raise ValueError(f"two settings are named {', '.join(twice)}; give each a different `name`")
        return self

    def _count(self) -> int:
        """Return an upper bound of the settings, without making them."""
        return math.prod(map(len, self.vary.values())) + len(self.settings)

    def runs(self, stages: int) -> int:
        """Return an upper bound of the runs over a recipe's stages."""
        asked = _published(self.orders)
        orders = math.factorial(min(stages, 20)) if asked == "all" else asked if isinstance(asked, int) else len(asked)
        return orders * len(self.seeds) * max(1, self._count())

    def changes(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield each setting's name and its fields of the recipe."""
        if self.vary or not self.settings:
            taken = set[str]()
            for values in itertools.product(*self.vary.values()):
                fields = dict(zip(self.vary, values, strict=True))
                name = _setting_name(fields)
                yield (name := _told_apart(name, fields) if name in taken else name), fields
                taken.add(name)
        for setting in self.settings:
            yield setting.name, setting.set

    def folder(self) -> Path:
        """Return the study folder, unless the command line names another."""
        return Path(self.output or f"studies/{self.name}")


@dataclass(frozen=True)
class StudyCell:
    """One run of a study."""

    setting: str
    order: int
    """Counted from 1."""
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        place = f"_order-{self.order}_seed-{self.seed}"
        return _within(self.setting, LONGEST_NAME - len(place)) + place


def load_study(path: str | Path) -> Study:
    """Read a study, its recipe included.

    Raises:
        RecipeError: a file is missing or not YAML, or a field is unknown, missing or of the wrong type.
    """
    data = read_mapping(path)
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must hold a mapping with name, recipe, orders and seeds; got {data!r:.80}")
    if "stages" in data and "recipe" not in data:
        raise RecipeError(f"{path} is a recipe, not a study. A study has `recipe: {path}`, `orders`, `seeds`, `vary`.")
    try:
        study = Study.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, str(path), Study)) from error
    if isinstance(study.recipe, str):
        study = study.model_copy(update={"recipe": read_mapping(Path(path).parent / study.recipe)})
    return study


def study_cells(study: Study) -> list[StudyCell]:
    """Return a study's runs: by setting, then seed, then order.

    Raises:
        RecipeError: a cell's recipe has an error, an order is not one of all stages, or there is nothing to vary.
    """
    where = f"recipe of study {study.name}"
    plain = parse_recipe(study.recipe, where=where)
    _require_few(study, len(plain.stages))
    orders = study_orders(study, [stage.name for stage in plain.stages])
    cells, first, known = [], None, dict[str, str]()
    for setting, fields in study.changes():
        data: Any = copy.deepcopy(study.recipe)
        for field, value in fields.items():
            set_field(data, field, copy.deepcopy(value), f"setting {setting} of study {study.name}")
        varied = parse_recipe(data, where=f"{where}, setting {setting}")
        _require_comparable(study, plain, (first := first or (setting, varied)), (setting, varied))
        if (same := known.setdefault(varied.model_dump_json(), setting)) != setting:
            raise RecipeError(f"Settings {same} and {setting} of study {study.name} are the same; each counts once.")
        stages = {stage["name"]: stage for stage in with_stream(data)["stages"]}
        for seed, (number, order) in itertools.product(study.seeds, enumerate(orders, 1)):
            run = {**data, "seed": seed, "name": "cell", "output": None, "stages": [stages[name] for name in order]}
            cell = StudyCell(setting, number, seed, parse_recipe(run, where=f"{where}, setting {setting}"))
            cells.append(_named(cell))
    if len(cells) < 2:
        raise RecipeError(
            f"Study {study.name} has nothing to vary: give it several `orders`, `seeds`, values in `vary`, or "
            "`settings`. For a single run, use `contmerge run`."
        )
    return cells


def _require_few(study: Study, stages: int) -> None:
    """Raise RecipeError for more runs than anyone could wait for."""
    if (count := study.runs(stages)) > _MOST_CELLS:
        raise RecipeError(f"Study {study.name} has {count} runs, at most {_MOST_CELLS} are made. Vary less.")


def _require_comparable(study: Study, plain: Recipe, first: tuple[str, Recipe], second: tuple[str, Recipe]) -> None:
    """Raise RecipeError for a setting with other stages or documents.

    What lies in files is compared before the first run (loop/plan/study.py).
    """
    (other, there), (setting, here) = first, second
    names, own = ([stage.name for stage in recipe.stages] for recipe in (plain, here))
    if own != names:
        raise RecipeError(
            f"Setting {setting} of study {study.name} has the stages {', '.join(own)}, and the recipe has "
            f"{', '.join(names)}. All settings have the same stages; make a study of each."
        )
    if here.tunes != there.tunes:
        one, none = (setting, other) if here.tunes else (other, setting)
        raise RecipeError(
            f"Setting {one} of study {study.name} has a guard or an `auto` parameter, and {none} has neither: they are "
            "scored on different documents (evaluate.validation), which cannot be compared. Make both merge entries of "
            "one recipe, or a study of each."
        )
    for field in _DOCUMENTS if here.tunes else _DOCUMENTS[:-1]:
        values = getattr(there.evaluate, field), getattr(here.evaluate, field)
        if values[0] != values[1]:
            raise RecipeError(
                f"evaluate.{field} of study {study.name} is {values[0]} in setting {other} and {values[1]} in "
                f"{setting}: scores of different documents cannot be compared. Give all settings one value, or make a "
                "study of each."
            )


def _published(orders: int | str | tuple[Order, ...]) -> int | Literal["all"] | tuple[Order, ...]:
    """Replace a stream by its published orders. Raises RecipeError."""
    if not isinstance(orders, str):
        return orders
    if orders == "all":
        return "all"
    if orders not in stream_names():
        raise RecipeError(unknown("value of `orders`", orders, ["all", *stream_names()]))
    return tuple(stream_orders(orders).values())


def study_orders(study: Study, stages: list[str]) -> list[Order]:
    """Return the orders of a study's stages. Raises RecipeError."""
    asked = _published(study.orders)
    if isinstance(asked, str):
        return list(itertools.permutations(stages))
    if isinstance(asked, int):
        return _random_orders(stages, asked)
    for order in asked:
        if sorted(order) != sorted(stages):
            missing, strange = sorted(set(stages) - set(order)), sorted(set(order) - set(stages))
            problem = (
                f"misses {', '.join(missing)}" if missing
                else f"names {', '.join(strange)}, no stage of the recipe ({', '.join(stages)})" if strange
                else "names a stage twice"
            )  # fmt: skip
            raise RecipeError(f"orders: [{', '.join(order)}] {problem}. Each order names every stage once.")
    if len(set(asked)) < len(asked):
        raise RecipeError("orders: one order is there twice; each counts once.")
    return list(asked)


def _random_orders(stages: list[str], count: int) -> list[Order]:
    """Return distinct random orders, always the same; the given one first."""
    if count > math.factorial(len(stages)):
        raise RecipeError(f"orders: {len(stages)} stages have {math.factorial(len(stages))} orders; got {count}")
    found, dice = {tuple(stages): None}, random.Random(0)
    while len(found) < count:
        found.setdefault(tuple(dice.sample(stages, len(stages))))
    return list(found)


def _setting_name(fields: dict[str, Any]) -> str:
    """Return a short name for a setting, fit for a folder."""
    words = []
    for field, value in fields.items():
        text = "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        words.append(text if re.search("[A-Za-z]{2}", text) else f"{field.rpartition('.')[2]}-{text}")
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", "_".join(words)).strip("-._")[:60] or "plain"


def _told_apart(name: str, fields: dict[str, Any]) -> str:
    """Return another name, always the same, where one is taken."""
    return _shortened(name, 60, json.dumps(fields, sort_keys=True, default=str))


def _within(name: str, length: int) -> str:
    """Return a name, shortened if necessary."""
    return name if len(name) <= length else _shortened(name, length, name)


def _shortened(name: str, length: int, text: str) -> str:
    """Return the beginning of a name, with the digest of a text."""
    return f"{name[: length - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _named(cell: StudyCell) -> StudyCell:
    """Return a cell with its name in the recipe."""
    return StudyCell(cell.setting, cell.order, cell.seed, cell.recipe.model_copy(update={"name": cell.name}))
