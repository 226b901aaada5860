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
import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.run.recipe.parts import Location, Name, Part, Seed
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.streams import stream_names, stream_orders, with_stream
from hf_contmerge.run.recipe.text import explain, parse_recipe, read_mapping, set_field
from hf_contmerge.runtime.foreign import repeated

Order = tuple[str, ...]
_MOST_CELLS = 10_000

_FIXED = {"name": "the cell", "output": "the cell", "seed": "`seeds`", "stages": "`orders`"}
"""Fields of a recipe that the grid sets, and what sets them."""


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
    orders: Annotated[int, Field(ge=1)] | str | tuple[Order, ...] = 1
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
            for values in itertools.product(*self.vary.values()):
                fields = dict(zip(self.vary, values, strict=True))
                yield _setting_name(fields), fields
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
        return f"{self.setting}_order-{self.order}_seed-{self.seed}"


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
    cells = []
    for setting, fields in study.changes():
        data: Any = copy.deepcopy(study.recipe)
        for field, value in fields.items():
            set_field(data, field, copy.deepcopy(value), f"setting {setting} of study {study.name}")
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


def _named(cell: StudyCell) -> StudyCell:
    """Return a cell with its name in the recipe."""
    return StudyCell(cell.setting, cell.order, cell.seed, cell.recipe.model_copy(update={"name": cell.name}))
