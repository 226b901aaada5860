"""Merge rules: the maths of continual merging, one method a file.

    running_t = rule.update(running_{t-1}, expert_t - base)               one tensor, float32, running_0 = 0
    merged_t  = base + rule.scale(norms_t) * rule.read_out(running_t)     the scale is one number for the whole model

Every rule can scale the read-out by layers, from `first_layer` to `last_layer` (LiNeS, arXiv 2410.17146).

A rule is a frozen dataclass; its fields are the method's parameters, by the paper's symbol (a trailing underscore
keeps Python's keywords free: `lambda_` is `lambda` in YAML). File name = word in the YAML = class name in lower case:
dropping `merge_rules/opcm.py` with a class `Opcm` in here makes `rule: opcm` and mergekit's `merge_method: opcm`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from hf_contmerge.runtime.plugins import Registry

StartFrom = Literal["base", "previous", "merged"]
Shape = tuple[int, ...]
State = Tensor | Mapping[str, Tensor]
"""What a rule keeps of a weight: a tensor, or the parts that it names."""

INPUTS_LIMIT = 8192
"""The widest linear map whose statistic `inputs` is the whole second moment (256 MB); of wider ones, its diagonal."""


def inputs_shape(width: int) -> Shape:
    """Return the shape of the statistic `inputs` for a map's width."""
    return (width, width) if width <= INPUTS_LIMIT else (width,)


@dataclass(frozen=True)
class Weight:
    """A weight of the model, for rules."""

    name: str
    """As the base model stores it."""
    is_matrix: bool
    """True for a linear map (2-D, or a 3-D stack of them); False for vocabulary tables, routers, norms and biases,
    which projection rules must leave unprojected."""
    stage: int
    """1 for the first expert; at read-out, the number of experts folded so far."""
    shape: Shape = ()
    """In the model. The tensors that a rule gets may be a piece of the weight, or a small core."""
    depth: float | None = None
    """The place of its layer: 0 for the first, 1 for the last one, 0 for an only one. None outside the layers."""
    threshold: float | None = None
    """In `update`, with a rule that has a `share_kept`: the size |D| from which on an element of this expert is among
    the largest of the whole model. None where the whole model is not known."""
    statistics: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """In `update`: statistics of the expert by kind, if the rule `needs` them and this weight has them.

    `inputs`: X'X / n for a sample of n tokens, whose inputs of the map are the rows of X; of shape `inputs_shape(in)`.
    `fisher`: squares of the gradients of the examples' log likelihood, summed and divided by the tokens. `adam`: the
    optimizer's second moments at the end of the training. Both have the weight's shape, and every trained weight has
    them; should transformers hold one in a form that cannot be taken apart, a warning names it.
    """


@dataclass(frozen=True)
class Norms:
    """Frobenius norms over a model's floating tensors, each stored tensor once.

    `experts`: |expert_t - base| for t = 1..T, in stage order. `running`: |running_T|, over all slots or parts.
    """

    experts: tuple[float, ...]
    running: float


@dataclass(frozen=True)
class MergeRule(ABC):
    """A merging method: a pure update per tensor, a scale per model."""

    reference: ClassVar[str]
    """Where the method was published (a URL)."""
    start_from: ClassVar[StartFrom]
    """What the paper's experts start from: each from the base, from the previous expert, or from the merged model."""
    whole_model_scale: ClassVar[bool] = False
    """True when `scale` reads the norms, so that no tensor can be written before all have been seen."""
    unit: ClassVar[Literal["element", "matrix", "tensor"]] = "tensor"
    """What must be seen at once. "element": any piece of a weight may be folded alone; "matrix": so too, but for
    matrices, which are decomposed (that is what its time goes into); "tensor": each weight in one piece."""
    slots: ClassVar[int] = 1
    """How many tensors of the weight's shape the state needs; if more than one, `running` has them as a first axis.
    `parts` is the long form."""
    needs: ClassVar[tuple[str, ...]] = ()
    """The statistics of each expert that `update` reads, by kind: `inputs`, `fisher`, `adam`. Linear maps then come in
    one piece; with the last two, set `unit` to tensor. May be a property."""
    basis_free: ClassVar[bool] = False
    """True when update(P S Q', P D Q') = P update(S, D) Q' for any P and Q with orthonormal columns, and read_out
    returns the state itself: then low-rank experts are folded as small cores, and no large matrix is ever formed.
    Not for rules with named parts or statistics."""
    degree: ClassVar[int] = 1
    """The highest power of task vectors in the state. Above 1, float32 holds it for moderate values only; a state
    beyond float32 is refused."""
    linear: ClassVar[bool] = False
    """True when state and result are linear in the task vectors, for given statistics. Experts may then have weights:
    their task vectors are multiplied by them before `update`."""
    selects: ClassVar[bool] = False
    """True when each element of the state (of named parts, the first) is one expert's value, and so has an owner."""

    former: ClassVar[Mapping[str, Any]] = {}
    """Recipe word -> default of an earlier version: what a record without this word was made with."""
    tunable: ClassVar[tuple[str, ...]] = ()
    """Fields that only multiply the scale: neither `update` nor `read_out` looks at them, so that another value costs
    one pass over a state that is there. Recipes may say `auto` for them."""
    of_newest: ClassVar[Mapping[str, int]] = {}
    """Fields that `update` reads and that may differ from expert to expert, with the first stage that depends on them:
    another value costs one more fold of the newest expert. Recipes may say `auto` for them."""

    first_layer: float = field(default=1.0, kw_only=True, repr=False)
    """Factor on what is read out for the first layer. Recipes: `layers: {first: ..., last: ...}`."""
    last_layer: float = field(default=1.0, kw_only=True, repr=False)
    """The same for the last layer; those between lie on a line."""

    @property
    def ill_posed(self) -> bool:
        """True when rounding errors grow with each stage.

        States are then float64, and merges measure the growth.
        """
        return False

    def parts(self, weight: Weight) -> Mapping[str, Shape]:
        """Return name -> shape of the state's parts.

        Parts are float32, or float64 if `ill_posed`.

        A rule that overrides this gets and returns a mapping of these names as its running state. A weight with a part
        that does not end in the weight's own shape comes in one piece.
        """
        return {"": (self.slots, *weight.shape) if self.slots > 1 else weight.shape}

    def share_kept(self, weight: Weight) -> float | None:
        """Return the share of largest elements behind `weight.threshold`.

        One number for all weights; None for a weight whose elements do not count. A rule that overrides this reads
        each expert once more.
        """
        return None

    @abstractmethod
    def update(self, running: Any, task_vector: Tensor, weight: Weight) -> State:
        """Fold one expert into the running state, in float32 or float64.

        Args:
            running: a tensor of the weight's shape, or (slots, *shape) where the rule has more slots than one; or the
                parts that the rule names. Zeros before the first expert. Must not be modified.
            task_vector: expert - base, the weight's shape. Must not be modified.
            weight: which weight this is.

        Returns:
            The new running state, of the shapes and dtype of `running`. May hold the inputs themselves.
        """

    def read_out(self, running: Any, weight: Weight) -> Tensor:
        """Return the tensor to scale: float32, the weight's shape."""
        return running

    @abstractmethod
    def scale(self, norms: Norms) -> float:
        """Return the factor in merged = base + scale * read_out(running)."""

    def layer_factor(self, depth: float) -> float:
        """Return the factor on a layer's read-out, by depth."""
        if self.first_layer == self.last_layer:
            return self.first_layer
        return self.first_layer + (self.last_layer - self.first_layer) * depth

    def searchable(self) -> tuple[str, ...]:
        """Return the fields with `auto` in recipes."""
        return (*self.tunable, *self.of_newest, *COMMON[:1])

    def parameters(self) -> dict[str, Any]:
        """Return the parameters by their names in recipes; common ones if set."""
        common = {word: value for word in COMMON if (value := getattr(self, word)) != 1.0}
        return {yaml_word(f.name): getattr(self, f.name) for f in own_fields(type(self))} | common


COMMON = tuple(f.name for f in dataclasses.fields(MergeRule))
"""The parameters that every rule has."""


def own_fields(cls: type[MergeRule]) -> list[dataclasses.Field[Any]]:
    """Return a rule's dataclass fields without the common ones."""
    return [f for f in dataclasses.fields(cls) if f.name not in COMMON]


def yaml_word(field_name: str) -> str:
    """Return a dataclass field's name as recipes spell it: `lambda_` is `lambda`."""
    return field_name.removesuffix("_")


_RULES: Registry[MergeRule] = Registry("rule", __name__, MergeRule)


def rule_names() -> tuple[str, ...]:
    """Return the names of all rules: ours, of packages, of plugin files."""
    return _RULES.names()


def rule_class(name: str) -> type[MergeRule]:
    """Return the class of a rule.

    Raises:
        KeyError: no such rule.
        RecipeError: two packages or files define it, or its own cannot be loaded.
    """
    return _RULES.find(name)


def named_rule(name: str, *, where: str = "") -> type[MergeRule]:
    """Return a rule's class. `where`: the place in a recipe, for errors."""
    return _RULES.named(name, where=where)


def get_rule(name: str, /, **parameters: Any) -> MergeRule:
    """Make a rule by name and parameters. Raises as `rule_class` and `rule_of`."""
    return rule_of(rule_class(name), name, parameters)


def rule_of(cls: type[MergeRule], name: str, parameters: Mapping[str, Any]) -> MergeRule:
    """Make a rule of a class; messages call it `name`.

    Raises:
        TypeError: a parameter that the rule does not have.
        ValueError: a parameter of the wrong type or outside its range.
    """
    own = {yaml_word(f.name): f.name for f in own_fields(cls)}
    fields, hints, values = {**own, **{word: word for word in COMMON}}, get_type_hints(cls), {}
    for word, value in parameters.items():
        if word not in fields:
            raise TypeError(f"{name} has no parameter {word!r}; it has: {', '.join(own) or 'none'}")
        values[fields[word]] = _checked(f"{name}'s {word}", value, hints[fields[word]])
    return cls(**values)


def parameter_types(cls: type[MergeRule]) -> Mapping[str, tuple[Any, Any]]:
    """Return recipe word -> (type, default) of a rule's own parameters."""
    hints = get_type_hints(cls)
    return {yaml_word(f.name): (hints[f.name], f.default) for f in own_fields(cls)}


_LARGEST = 3.4028234663852886e38  # float32, in which rules compute


def _checked(what: str, value: Any, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{what} must be one of {', '.join(map(repr, get_args(kind)))}; got {value!r}")
        return value
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST:
        return float(value)
    if kind is not float and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{what} must be a finite {kind.__name__}; got {value!r}")
