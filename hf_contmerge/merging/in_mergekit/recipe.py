"""Reading of mergekit recipes supported by this engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.errors import RecipeError, unknown
from hf_contmerge.merge_rules import COMMON, MergeRule, parameter_types, rule_class, rule_of, yaml_word
from hf_contmerge.merging.rules import dtype_named, make_rule, rounding_named
from hf_contmerge.models.rounding import Rounding
from hf_contmerge.runtime.foreign import LARGEST_YAML, parse_documents, read_text

_WORDS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer")
_THEIRS_ALONE = ("slices", "modules", "chat_template")
MERGEKITS_OWN = {
    # mergekit's own methods of these names: further parameters, with the values that equal our rules.
    "task_arithmetic": {"weight": 1.0, "normalize": False, "rescale": False, "density": 1.0, "int8_mask": False},
    "ties": {"weight": 1.0, "normalize": True, "rescale": False, "int8_mask": False},
}
_THEIR_DEFAULTS = {"task_arithmetic": {"lambda": 1.0}, "ties": {"lambda": 1.0, "density": 1.0}}
_OF_ONE_MODEL = ("weight", "density")  # of mergekit's own methods: per model, else global


@dataclass(frozen=True)
class MergekitRecipe:
    """A supported mergekit recipe.

    It has full models, one rule and one value per parameter.
    """

    rule: str
    parameters: dict[str, Any]
    base: str
    models: tuple[str, ...]
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_from: str | None = None
    rounding: Rounding = "stochastic"
    weights: tuple[float, ...] = ()
    """Of the models, with a linear rule."""
    chosen: tuple[Mapping[str, float], ...] = ()
    """Of each model, its own values of the rule's parameters `of_newest`."""


def read_mergekit_recipe(path: Path) -> MergekitRecipe:
    """Read a recipe.

    Raises:
        RecipeError: a mistake, or a feature supported only by mergekit.
    """
    words = _words(path)
    rule, base = str(words["merge_method"]), _reference(words["base_model"], path)
    plain = make_rule(rule, {}, where=str(path))
    known = parameter_types(type(plain))
    if base.adapter:
        raise RecipeError(f"{path}: base_model {base} has an adapter. Merge it into a model first, and use that model.")
    entries = [entry for entry in _entries(words["models"], path) if entry.model != base]  # mergekit skips the base too
    if not entries:
        raise RecipeError(f"{path} lists no model besides base_model. List at least one expert.")
    models = [entry.model.expert_of(base, path) for entry in entries]
    given = words.get("parameters") or {}
    weights, chosen = _weights(plain, entries, given, path), [_chosen(plain, entry, path) for entry in entries]
    given = {word: value for word, value in given.items() if word != "weight" or not plain.linear}
    entries = [_Entry(e.model, {w: v for w, v in e.parameters.items() if w not in _own(plain)}) for e in entries]
    given = {**given, **_shared(entries, given, rule, path)}
    tokenizer_from = _tokenizer_source(words, path)
    return MergekitRecipe(
        rule, _checked_parameters(rule, given, known, path), base.name, tuple(models),
        _dtype_word(words, "dtype", path), _dtype_word(words, "out_dtype", path),
        base.name if tokenizer_from == "base" else tokenizer_from, _rounding(rule, given, path),
        weights, tuple(chosen),
    )  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """A mergekit model reference: MODEL[@REVISION][+ADAPTER[@REVISION]]."""

    name: str
    adapter: str | None = None

    def __str__(self) -> str:
        return f"{self.name}+{self.adapter}" if self.adapter else self.name

    def expert_of(self, base: _Model, path: Path) -> str:
        """Return the expert: model, or adapter of the base."""
        if self.adapter and self.name != base.name:
            raise RecipeError(
                f"{path}: {self} adds an adapter to {self.name}, which is not base_model {base}. Use one name for both "
                "if they are one model; else merge the adapter into its model first, and list the result."
            )
        return self.adapter or self.name


@dataclass(frozen=True)
class _Entry:
    """An entry of `models`."""

    model: _Model
    parameters: Mapping[str, Any]


def _words(path: Path) -> dict[str, Any]:
    """Read the recipe's top level; check its words."""
    try:
        documents = parse_documents(read_text(path, most=LARGEST_YAML))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"Cannot read {path}: {error}") from error
    if len(documents) > 1:
        raise RecipeError(
            f"{path} holds {len(documents)} recipes. Put each into its own file, or use `mergekit-multi {path}`."
        )
    words = documents[0] if documents else None
    if not isinstance(words, dict):
        raise RecipeError(
            f"{path} is not a mergekit recipe: expected a mapping with merge_method, base_model and models."
        )
    for word in words:
        if word in _THEIRS_ALONE:
            raise RecipeError(f"{path} uses {word!r}, supported only by mergekit. Use `mergekit-yaml {path} OUT`.")
        if word not in _WORDS:
            raise RecipeError(unknown("word", str(word), _WORDS, where=str(path)))
    for word in ("merge_method", "base_model", "models"):
        if not words.get(word):
            raise RecipeError(f"{path} lacks {word!r}. A merge needs merge_method, base_model and models.")
    for word, kind, what in (
        ("models", list, "a list"),
        ("parameters", dict, "a mapping"),
        ("tokenizer", dict, "a mapping"),
    ):
        if not isinstance(words.get(word) or kind(), kind):
            raise RecipeError(f"{path}: {word} must be {what}; got {words[word]!r}.")
    return words


def _entries(listed: Sequence[Any], path: Path) -> list[_Entry]:
    for entry in listed:
        parts = set(entry) if isinstance(entry, Mapping) else set()
        if (
            "model" not in parts
            or parts - {"model", "parameters"}
            or not isinstance(entry.get("parameters") or {}, dict)
        ):
            raise RecipeError(f"{path}: an entry of `models` must be `- model: NAME`; got {entry!r}.")
    return [_Entry(_reference(entry["model"], path), entry.get("parameters") or {}) for entry in listed]


def _reference(value: Any, path: Path) -> _Model:
    """Read a model reference.

    Forms: `model`, `model@revision`, `model+adapter`, or {model: ..., lora: ...} with {path: ..., revision: ...}.
    """
    parts: list[Any] = []
    if isinstance(value, str):
        parts = list(value.split("+"))
    elif isinstance(value, Mapping) and "model" in value and not set(value) - {"model", "lora"}:
        parts = [value["model"], *([value["lora"]] if value.get("lora") else [])]
    if not 1 <= len(parts) <= 2:
        raise RecipeError(
            f"{path}: a model must be `NAME`, `NAME@REVISION`, `BASE+ADAPTER`, or `{{model: {{path: NAME}}}}` (for a "
            f"name with + or @ in it); got {value!r}."
        )
    return _Model(*(_name(part, path) for part in parts))


def _name(value: Any, path: Path) -> str:
    """Return a folder or a Hub id, with @revision."""
    name, at, revision = value.partition("@") if isinstance(value, str) else ("", "", None)
    if isinstance(value, Mapping) and not set(value) - {"path", "revision"}:
        name, revision = value.get("path"), value.get("revision")
    if not isinstance(name, str) or not name or "@" in str(revision or "") or (at and not revision):
        raise RecipeError(f"{path}: a model must be `NAME`, `NAME@REVISION` or `{{path: NAME}}`; got {value!r}.")
    if revision and Path(name).is_dir():
        raise RecipeError(
            f"{path}: {value} has revision {revision!r}, but {name} is a local folder without revisions. Remove the "
            "revision; for a folder with @ in its name write `{model: {path: NAME}}`."
        )
    return f"{name}@{revision}" if revision else name


def _own(rule: MergeRule) -> list[str]:
    """Return a rule's parameters per model."""
    return [*map(yaml_word, rule.of_newest), *(["weight"] if rule.linear else [])]


def _weights(rule: MergeRule, entries: Sequence[_Entry], top: Mapping[str, Any], path: Path) -> tuple[float, ...]:
    """Return the models' weights with a linear rule. Raises RecipeError."""
    if not rule.linear:
        return ()
    given = [as_number(entry.parameters.get("weight", top.get("weight", 1.0))) for entry in entries]
    if wrong := [w for w in given if not is_number(w)]:
        raise RecipeError(f"{path}: weight must be one number per model; got {wrong[0]!r}. Use `mergekit-yaml`.")
    return tuple(map(float, given))


def _chosen(rule: MergeRule, entry: _Entry, path: Path) -> dict[str, float]:
    """Return a model's own values of the parameters `of_newest`, checked."""
    words = [word for word in map(yaml_word, rule.of_newest) if word in entry.parameters]
    values = {word: as_number(entry.parameters[word]) for word in words}
    try:
        checked = rule_of(type(rule), type(rule).__name__, values).parameters()
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}, {entry.model}: {error}") from error
    return {word: checked[word] for word in words}


def _shared(entries: Sequence[_Entry], top: Mapping[str, Any], rule: str, path: Path) -> dict[str, Any]:
    """Return the models' common parameters. Raises RecipeError."""
    shared: dict[str, Any] = {}
    for entry in entries:
        for word in entry.parameters:
            values = [as_number(e.parameters.get(word, top.get(word))) for e in entries]
            if rule not in MERGEKITS_OWN or word not in _OF_ONE_MODEL or any(v != values[0] for v in values):
                raise RecipeError(
                    f"{path}: {word} of {entry.model} is a parameter of one model, but {rule} treats all experts "
                    f"equally. Remove it, or use `mergekit-yaml {path} OUT` with a method that weights them."
                )
            shared[word] = values[0]
    return shared


def _rounding(rule: str, given: Mapping[str, Any], path: Path) -> Rounding:
    """Return the rounding; mergekit's own methods round to the nearest value."""
    try:
        return rounding_named(given.get("rounding", "nearest" if rule in MERGEKITS_OWN else None))
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error


def _checked_parameters(rule: str, given: Mapping[str, Any], known: Mapping[str, Any], path: Path) -> dict[str, Any]:
    parameters: dict[str, Any] = dict(_THEIR_DEFAULTS.get(rule, {}))
    theirs = MERGEKITS_OWN.get(rule, {})
    for word, raw in given.items():
        value = as_number(raw)
        if word == "rounding":  # see `_rounding`
            continue
        if isinstance(value, list | dict):
            raise RecipeError(f"{path}: {word} must be one value for all tensors; got {value!r}. Use `mergekit-yaml`.")
        if word in theirs and word not in known:
            if value != theirs[word] and word != "int8_mask":  # affects mergekit's memory, not the result
                raise RecipeError(
                    f"{path}: {word} must be {theirs[word]!r} here; `mergekit-yaml {path} OUT` takes {value!r}."
                )
        elif word == "scale" and not rule_class(rule).tunable:
            if value != "model":
                raise RecipeError(f"{path}: scale must be `model` here; `mergekit-yaml {path} OUT` takes {value!r}.")
        elif word not in (*known, *COMMON):
            raise RecipeError(unknown("parameter", str(word), known, where=f"{path} for {rule}"))
        else:
            parameters[word] = value
    make_rule(rule, parameters, where=str(path))  # checks the values
    return parameters


def is_number(value: Any) -> bool:
    """Return True for an int or float, not for a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def as_number(value: Any) -> Any:
    """Convert numeric strings, such as YAML's 1e-1."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdecimal() else number


def _dtype_word(words: Mapping[str, Any], word: str, path: Path) -> str | None:
    value = words.get(word)
    name = str(value).removeprefix("torch.") if value else None
    try:
        dtype_named(name)
    except RecipeError as error:
        raise RecipeError(f"{path}, {word}: {error}") from error
    return name


def _tokenizer_source(words: Mapping[str, Any], path: Path) -> str | None:
    """Return the tokenizer's source: model, `base`, None."""
    tokenizer, source = words.get("tokenizer"), words.get("tokenizer_source")
    if tokenizer is not None and source:
        raise RecipeError(f"{path} has both tokenizer and tokenizer_source, which mergekit refuses. Remove one.")
    if tokenizer is not None:
        source = tokenizer.get("source", "union")  # as in mergekit
    extra = sorted(set(tokenizer or {}) - {"source"})
    if source == "union" or extra:
        raise RecipeError(
            f"{path}: the tokenizer setting {'union' if source == 'union' else extra[0]!r} may change the vocabulary, "
            f"supported only by mergekit. Use `mergekit-yaml {path} OUT`, or `source: base`."
        )
    if not source or source == "base":
        return source or None
    model = _reference(source, path)
    if model.adapter:
        raise RecipeError(f"{path}: the tokenizer source {model} is an adapter. Use a model without adapter.")
    return model.name
