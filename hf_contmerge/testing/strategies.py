"""Checks of training strategies, by two stages on a toy model."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.models.architecture import find_architecture
from hf_contmerge.models.experts import open_expert
from hf_contmerge.models.loading import load_model, load_tokenizer
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.fields import with_fields
from hf_contmerge.testing._docs import docstring
from hf_contmerge.testing._watch import BrokenPromise
from hf_contmerge.testing.course import STEPS, Course, texts_for
from hf_contmerge.train_strategies import TrainStrategy, named_strategy

Strategy = str | type[TrainStrategy]
Check = Callable[[Course], None]

_EQUATION = re.compile(r" (=|<-|[-+*/]) ")
_REFERENCE = re.compile(r"https?://|arXiv|\bdoi\b", re.IGNORECASE)


def check_strategy(strategy: Strategy | Sequence[Strategy], /, **parameters: Any) -> None:
    """Check training strategies; raise AssertionError for a broken promise.

    The message names the promise. A toy Llama of 30,000 weights is trained for two stages of six steps, in seconds.

    It must have a docstring with its equation and a reference, and refuse parameters that it does not have and values
    of a wrong type. In both stages the loss must fall, and the expert keep the base's names, shapes and finite values.
    The second stage must do without the first's dataset. Training that was killed must resume from its checkpoint to
    the same bytes, of the expert and of what is remembered. Hooks must leave their inputs alone.

    Several ranks are not tried: test `sharded` and sums over ranks yourself.

    Args:
        strategy: its word in recipes, or its class; or a list of those that are combined.
        parameters: as in recipes: of several strategies, by word. A class has its name in lower case as its word.

    Raises:
        AssertionError: a check fails.
        RecipeError: an unknown word.
        ResourceError: a strategy cannot work on this machine.
        ValueError: strategies that cannot be combined, or a parameter that one refuses.
    """
    several = [strategy] if isinstance(strategy, str | type) else strategy
    classes = dict(_named(one) for one in several)
    if len(classes) < len(several):
        raise ValueError(f"the same strategy twice: {', '.join(_named(one)[0] for one in several)}")
    with tempfile.TemporaryDirectory(prefix="contmerge-") as home:
        course = Course(Path(home), classes, parameters)
        course.strategies()
        for check in CHECKS:
            check(course)


def _named(strategy: Strategy) -> tuple[str, type[TrainStrategy]]:
    if isinstance(strategy, str):
        return strategy, named_strategy(strategy)
    return strategy.__name__.lower(), strategy


def _promise(check: Callable[[Course], Iterator[str]]) -> Check:
    """Return a check; it raises for the first fault."""

    @functools.wraps(check)
    def kept(course: Course) -> None:
        fault = next(check(course), None)
        if fault:
            raise BrokenPromise(course, check.__name__, fault)

    return kept


@_promise
def says_what_it_is(course: Course) -> Iterator[str]:
    """Check for an equation, a reference and a carrier's memory."""
    for word, cls in course.classes.items():
        written = docstring(cls)
        if not written:
            yield f"the class {cls.__name__} has no docstring"
        if not _EQUATION.search(written):
            yield f"the docstring of {cls.__name__} has no equation, such as `loss + strength * ...`"
        if not _REFERENCE.search(written + (sys.modules[cls.__module__].__doc__ or "")):
            yield f"neither {cls.__name__} nor its module names a reference in its docstring: an arXiv number or a URL"
        if cls.carrier and not cls.bytes_per_parameter:
            yield f"{word} is a carrier, and its `bytes_per_parameter` is 0"


@_promise
def refuses_what_it_does_not_have(course: Course) -> Iterator[str]:
    """Check the errors for unknown parameters and wrong types."""
    for word, cls in course.classes.items():
        if not _refuses(course, word, "lamda", 0.7):
            yield f"{word} accepts the unknown parameter `lamda`, or refuses it without its name"
        for name in _parameters(cls):
            if not _refuses(course, word, name, object()):
                yield f"{word} accepts an object() as `{name}`, or refuses it without its name; annotate the field"


def _parameters(cls: type[TrainStrategy]) -> list[str]:
    return [p.name for p in inspect.signature(cls).parameters.values() if p.kind != p.VAR_KEYWORD]


def _refuses(course: Course, word: str, parameter: str, value: Any) -> bool:
    try:
        with_fields(course.classes[word], word, {**course.parameters_of(word), parameter: value})
    except (TypeError, ValueError) as error:
        return parameter in str(error)
    return False


def opens_on_meta(course: Course) -> None:
    """Check that `open` needs no values if the strategy says so."""
    architecture = find_architecture(course.base)
    assert architecture
    try:
        course.strategies().try_open(copy.deepcopy(architecture.model))
    except Exception as error:  # code of others may fail in any way
        fault = f"on a model without values, `open` ends with {type(error).__name__}: {error}"
        raise BrokenPromise(course, "opens_on_meta", fault) from error


def needs_no_earlier_data(course: Course) -> None:
    """Check the second stage after the deletion of the first's dataset."""
    assert course.first
    try:
        assert course.second
    except BrokenPromise:
        raise
    except Exception as error:  # code of others may fail in any way
        fault = f"the first stage's dataset was deleted, and the second ends with {type(error).__name__}: {error}"
        raise BrokenPromise(course, "needs_no_earlier_data", fault) from error


def leaves_its_inputs_alone(course: Course) -> None:
    """Check the hooks' arguments, the model and earlier memory, while training."""
    assert course.first
    assert course.second


@_promise
def keeps_names_shapes_and_finite_values(course: Course) -> Iterator[str]:
    """Check the experts' files against the base."""
    assert course.second
    base = Weights(course.base)
    start: Mapping[str, Tensor] = {name: torch.zeros(()) for name in base.names}
    for name in ("first", "second"):
        try:
            vectors = dict(_task_vectors(course.home / name, base))
        except ModelError as error:
            yield f"the {name} stage's expert does not fit the base: {error}"
            return
        strange = [weight for weight, vector in vectors.items() if not vector.isfinite().all()]
        if strange:
            yield f"{strange[0]} of the {name} stage's expert has values that are not finite"
        if all(bool((vector == start[weight]).all()) for weight, vector in vectors.items()):
            yield f"the {name} stage's expert is the model that the stage starts from"
        start = vectors


def _task_vectors(expert: Path, base: Weights) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight's change, flat, of a model or adapter."""
    opened = open_expert(expert, base, force=True)
    for name in base.floating():
        tensor = base.tensor(name)
        yield name, opened.reader(name, tensor)(0, tensor.numel(), tensor.reshape(-1).float())


@_promise
def learns(course: Course) -> Iterator[str]:
    """Check for a falling loss in both stages, tokens unweighted."""
    for stage, name in enumerate(("first", "second"), 1):
        losses = losses_of(course, stage, course.second if stage == 2 else course.first)
        if not falls(losses) or len(losses) not in (2, STEPS):
            yield f"the loss does not fall in the {name} stage: {', '.join(f'{loss:.4f}' for loss in losses)}"


def losses_of(course: Course, stage: int, record: Mapping[str, Any]) -> list[float]:
    """Return the logged losses; for weighted tokens, plain ones around the stage."""
    if course.strategies().overriding("token_weights"):  # p * -log p rises up to p = 1 / e
        return [_plain_loss(course, model, stage) for model in (("base", "first"), ("first", "second"))[stage - 1]]
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


def falls(losses: Sequence[float]) -> bool:
    """Check for losses that fall; more than two by pairs."""
    ends = 1 if len(losses) == 2 else 2
    return sum(losses[-ends:]) < sum(losses[:ends])


@torch.no_grad()
def _plain_loss(course: Course, name: str, stage: int) -> float:
    """Return a model's mean loss over a stage's examples."""
    model, tokenizer = load_model(course.home / name, course.base), load_tokenizer(course.base)
    texts = (tokenizer(text, return_tensors="pt")["input_ids"] for text in texts_for(stage))
    return fmean(float(model(input_ids=ids, labels=ids).loss) for ids in texts)


@_promise
def resumes_to_the_same_bytes(course: Course) -> Iterator[str]:
    """Check training from the checkpoint in the middle, as after a kill."""
    record, home = course.second, course.home
    left, half = home / "resumed-checkpoints", f"checkpoint-{STEPS // 2}"
    left.mkdir()
    (home / "second-checkpoints" / half).rename(left / half)
    resumed = course.learn(2, "resumed")
    for what, kind in (("expert", ""), ("memory", "-memory")):
        files = _differing(home / f"resumed{kind}", home / f"second{kind}")
        if files:
            yield f"the {what} of training that was killed and resumed differs in {', '.join(files)}"
    if resumed["loss"] != record["loss"]:
        yield f"the loss of training that was killed and resumed is {resumed['loss']}, not {record['loss']}"


def _differing(one: Path, other: Path) -> list[str]:
    """Return the files of two folders with different bytes."""
    files = {str(p.relative_to(f)) for f in (one, other) for p in f.rglob("*") if p.is_file()}
    return sorted(name for name in files if _bytes(one / name) != _bytes(other / name))


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


CHECKS: tuple[Check, ...] = (
    says_what_it_is,
    refuses_what_it_does_not_have,
    opens_on_meta,
    needs_no_earlier_data,
    leaves_its_inputs_alone,
    keeps_names_shapes_and_finite_values,
    learns,
    resumes_to_the_same_bytes,
)
"""What any strategy must pass, in the order in which `check_strategy` asks."""
