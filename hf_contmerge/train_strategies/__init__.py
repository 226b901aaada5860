"""Training strategies on top of TRL's trainers; one strategy a file.

A strategy is a dataclass whose fields are its parameters, as with merge rules: `train_strategies/lora.py` with a class
`Lora` is `strategy: lora` in the recipe. One object trains one stage. Several can be combined (`strategy: [lora,
replay]`): one *carrier* says which tensors are trained (full, lora, ...; without one, full), the others add what keeps
old knowledge (replay, anchor, ...).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_contmerge.errors import RecipeError
from hf_contmerge.models.survival import Kept
from hf_contmerge.run.recipe.parts import Dataset
from hf_contmerge.runtime.fields import with_fields
from hf_contmerge.runtime.plugins import Registry
from hf_contmerge.train_strategies._weights import take_gradients, trained

Inputs = Mapping[str, Any]
"""A micro-batch as the trainer's collator makes it: input_ids, labels (-100: does not count), ..."""
Likelihoods = Callable[[int], Iterator[tuple[Tensor, int]]]
"""Gives, for a seeded sample of so many of the stage's own examples, this rank's share of them: the log likelihood of
each (a scalar with its graph, summed over the tokens that count) and the number of those tokens. Each is a forward pass
by itself, without padding."""
Gradient = Callable[[], Mapping[str, Tensor]]
"""Computes the gradient of a whole optimizer step at the current weights: name -> gradient."""


@dataclass(frozen=True)
class StageSize:
    """The size of a stage's training, for memory estimates."""

    number: int
    """Counted from 1."""
    trained: int
    """Parameters that are trained."""
    lora_a: int
    """Of these, those in the A's of a LoRA."""
    inputs: int
    """The widths of the trained linear maps' inputs, added up."""
    examples: int
    example_bytes: float
    """Of one, on average."""


@dataclass(frozen=True)
class Synthesis:
    """Documents that a stage's start model writes."""

    count: int
    tokens: int
    """The most of a document, or of a turn."""
    temperature: float


SOURCE = "mixed_from"
"""The column with each example's source, for `mix`. Training does not see it."""


@dataclass(frozen=True)
class StageTools:
    """The parts of a training that strategies use."""

    general: Any = None
    """Examples of the dataset in `general_data`, with their sources; a datasets.Dataset."""
    written: Any = None
    """The documents of `synthesis`, with their source; a datasets.Dataset."""
    batch: int = 0
    """Examples of an optimizer step, of all ranks, for a strategy that keeps the order; 0 where packing cuts them into
    blocks."""
    count_tokens: Callable[[Any], list[int]] = lambda rows: [1] * len(rows)
    """Returns each example's tokens."""


@dataclass
class TrainStrategy:
    """Base of strategies. Hooks do nothing unless overridden.

    A hook changes what its first line says and nothing else: examples, batches, statistics of tokens and the memory of
    earlier stages stay unchanged, and only `before_step`, `adjust_gradients`, `adjust_weights` and `finish` may change
    weights or gradients.
    """

    carrier: ClassVar[bool] = False
    """Whether it says which tensors are trained. A stage has exactly one such strategy."""
    bytes_per_parameter: ClassVar[int] = 0
    """Of memory while training, for each of the model's parameters: weights, gradients and Adam's two moments (of
    carriers), or what the strategy adds to them (of others)."""
    bytes_in_checkpoints: ClassVar[int] = 0
    """Of `state`, for each trained parameter."""
    carriers: ClassVar[tuple[str, ...] | None] = None
    """The carriers that it can be combined with; None: any."""
    sharded: ClassVar[bool] = True
    """Whether it is right where the weights are shared out among the ranks by FSDP2."""
    texts_only: ClassVar[bool] = False
    """Whether it needs tokens with labels, which texts have and preference pairs do not."""

    opens_on_meta: ClassVar[bool] = False
    """Whether `open` works on a model without values (PyTorch's meta device): a run then tries it before any work."""

    turn: ClassVar[int] = 0
    """When it changes gradients and weights, whatever the recipe's order. 0: it adds to them. 1: it keeps them within
    bounds, of what the others add too. 2: it reads the weights that result."""

    stage: int = field(default=1, init=False, repr=False)
    """The stage's number, from 1; set before the first hook. No parameter of a recipe."""

    base: Path | None = field(default=None, init=False, repr=False)
    """The pretrained model's folder; set before the first hook. No parameter of a recipe."""

    step: int = field(default=0, init=False, repr=False)
    """Optimizer steps taken in this stage, resumed ones too; the one of `adjust_weights` included."""

    steps: int = field(default=0, init=False, repr=False)
    """Steps of the whole stage."""

    tools: StageTools = field(default=StageTools(), init=False, repr=False)
    """Set before the first hook. No parameter of a recipe."""

    kept_by_rounding: Mapping[str, Kept] | None = field(default=None, init=False, repr=False)
    """Set by `close`: what each weight that it rounded keeps of its update. No parameter of a recipe."""

    def keeps_adapter(self) -> bool:
        """Say if the expert is saved as a peft adapter."""
        return False

    def warn_of_rate(self, rate: float) -> str | None:
        """Return a warning about a stage's learning rate, or None."""
        return None

    def general_data(self) -> Dataset | None:
        """Return a dataset to load for `mix`, or None."""
        return None

    def synthesis(self) -> Synthesis | None:
        """Return the documents that the stage's start model writes for `mix`."""
        return None

    def added_share(self, *, past: bool) -> float:
        """Return the share of the training examples that `mix` adds, for estimates.

        `past`: whether there is memory of an earlier stage.
        """
        return 0.0

    def keeps_order(self) -> bool:
        """Say if batches follow the order of `mix`, without shuffling."""
        return False

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        """Return the model to train, made from the stage's start."""
        return model

    def rate(self, name: str) -> float:
        """Return the factor on a weight's learning rate; 0 freezes the weight.

        Called for every trained weight right after `open`, once. Factors of several strategies multiply. Weight decay
        shrinks with the learning rate, as AdamW has it. A frozen weight gets no gradient and no optimizer state.

        Args:
            name: of the weight in the opened model; peft's prefixes included, those of FSDP and DDP not.
        """
        return 1.0

    def mix(self, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        """Return the examples to train on.

        Args:
            fresh: a datasets.Dataset of the stage's own examples. Its column SOURCE, if any, names each one's source;
                added examples should name theirs.
            memory: what this strategy remembered of earlier stages; None where there are none.
            seed: of whatever is drawn.
        """
        return fresh

    def before_step(self, model: nn.Module, gradient: Gradient) -> None:
        """Change the weights before an optimizer step, with its gradient on request.

        Called once per step, on all ranks, before the step's own forward passes.

        Args:
            model: what is trained.
            gradient: computes the step's gradient at the current weights, by a forward and a backward pass over all
                micro-batches. It covers the whole loss, averaged over the ranks and not clipped. It sees the dropout of
                the step itself and leaves no trace in `.grad`. Under FSDP2 the values are DTensors, laid out like
                their weights.
        """

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor | None:
        """Return an addition to a micro-batch's loss, summed over counted tokens.

        Called after the forward pass whose loss it joins.
        """
        return None

    def token_weights(self, log_probs: Tensor, entropy: Tensor, is_top1: Tensor, counts: Tensor) -> Tensor:
        """Return the weight of each token in the loss.

        The loss becomes sum(weight * -log_prob) / n, where n counts the tokens of the step on all ranks, whatever their
        weights. Weights of several strategies multiply and carry no gradient. `loss` and `review` are not weighted.

        Args:
            log_probs: of a micro-batch's labels, (rows, length - 1), on this rank, detached; so are the others.
            entropy: of the predictions, in nats, over the whole vocabulary.
            is_top1: whether the label is the likeliest token.
            counts: whether a position counts; where it does not, the others hold 0 and the weight has no effect.
        """
        return torch.ones_like(log_probs)

    def adjust_gradients(self, model: nn.Module) -> None:
        """Change the gradients (averaged over ranks, clipped) just before the optimizer's step."""

    def adjust_weights(self, model: nn.Module) -> None:
        """Change the weights just after the optimizer's step."""

    def state(self) -> Mapping[str, Tensor]:
        """Return a checkpoint's state, beyond the weights and `step`."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore a checkpoint's `state`, on the same rank."""

    def finish(self, model: nn.Module) -> None:
        """Change the weights after the last step, before saving."""

    def review(self, model: nn.Module, likelihoods: Likelihoods) -> None:
        """Review the trained model on the stage's own examples; on all ranks."""

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path) -> None:
        """Write the memory of later stages into `out`; on all ranks.

        Args:
            model: the trained model, as `open` made it.
            data: the stage's own examples, a datasets.Dataset.
            memory: what was remembered before this stage, or None.
            out: an empty folder; only the main process may write. Left empty, it is removed.
        """

    def added_bytes(self, model: nn.Module) -> int:
        """Return the bytes held in training besides the carrier's.

        `model` may lack values.
        """
        return self.bytes_per_parameter * sum(weight.numel() for weight in model.parameters())

    def memory_bytes(self, stage: StageSize) -> int:
        """Return about how many bytes `remember` will write."""
        return 0

    def close(self, model: Any) -> Any:
        """Return the model to save, with its original names and shapes."""
        return model


@dataclass
class Combined:
    """The strategies of one stage by name, carrier first."""

    parts: Mapping[str, TrainStrategy]
    _rates: dict[str, float] = field(default_factory=dict, init=False, repr=False)
    """Weight -> factor on its learning rate, of those that a strategy has rated."""

    @property
    def carrier(self) -> TrainStrategy:
        return next(iter(self.parts.values()))

    @property
    def bytes_per_parameter(self) -> int:
        return sum(part.bytes_per_parameter for part in self.parts.values())

    @property
    def bytes_in_checkpoints(self) -> int:
        return sum(part.bytes_in_checkpoints for part in self.parts.values())

    def not_sharded(self) -> list[str]:
        """Return the strategies without FSDP2 support."""
        return [name for name, part in self.parts.items() if not part.sharded]

    def texts_only(self) -> list[str]:
        """Return the strategies without support for preference pairs."""
        weighing = self.overriding("token_weights")
        return [name for name, part in self.parts.items() if part.texts_only or name in weighing]

    def overriding(self, hook: str) -> list[str]:
        """Return the strategies with their own version of a hook."""
        plain = getattr(TrainStrategy, hook)
        return [name for name, part in self.parts.items() if getattr(type(part), hook) is not plain]

    def begin(self, stage: int, base: Path | None = None, tools: StageTools = StageTools()) -> None:
        """Set the stage's number, base and tools, before any hook is called."""
        for part in self.parts.values():
            part.stage, part.base, part.tools = stage, base, tools

    def general_data(self) -> Dataset | None:
        """Return the dataset for `mix`, named by one strategy."""
        return next((spec for part in self.parts.values() if (spec := part.general_data())), None)

    def synthesis(self) -> Synthesis | None:
        """Return the documents to write for `mix`, of one strategy."""
        return next((wanted for part in self.parts.values() if (wanted := part.synthesis())), None)

    def added_share(self, *, past: bool) -> float:
        """Return the share of examples beside the stage's own."""
        return 1 - math.prod(1 - part.added_share(past=past) for part in self.parts.values())

    def keeping_order(self) -> list[str]:
        """Return the strategies with an order of examples."""
        return [name for name, part in self.parts.items() if part.keeps_order()]

    def mix(self, fresh: Any, memory: Path | None, *, seed: int) -> Any:
        for name, part in self.parts.items():
            fresh = part.mix(fresh, _own(memory, name), seed=seed)
        return fresh

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        """Open the carrier, then parts with rates, then the others."""
        rated = self.overriding("rate")
        opened: Any = model
        for name in dict.fromkeys([next(iter(self.parts)), *rated, *self.parts]):
            opened = self.parts[name].open(opened, _own(memory, name))
            if name in rated:
                self._apply_rates(opened, name)
        return opened

    def try_open(self, model: PreTrainedModel) -> None:
        """Open a model on the meta device with the parts that can.

        Raises ValueError for parameters that do not fit the model.
        """
        opening = self.overriding("open")
        able = {name: part for name, part in self.parts.items() if part.opens_on_meta or name not in opening}
        if next(iter(self.parts)) in able:  # the others look at what the carrier has made
            Combined(able).open(model, None)

    def _apply_rates(self, model: nn.Module, part: str) -> None:
        """Keep a part's factors; freeze weights of factor 0. Raises ValueError."""
        for name, weight in trained(model):
            factor = self.parts[part].rate(name)
            if not (math.isfinite(factor) and factor >= 0):
                raise ValueError(f"{part} gives {name} the rate {factor}; a rate must be finite and not negative")
            weight.requires_grad_(factor > 0)
            self._rates[name] = self._rates.get(name, 1.0) * factor
        if next(trained(model), None) is None:
            raise ValueError(f"{part} gives every weight the rate 0, so that nothing would be trained")

    def rates(self, model: nn.Module) -> dict[Tensor, float]:
        """Return the factor on the learning rate of each trained weight.

        Raises RecipeError under FSDP's first version, which flattens the weights.
        """
        names = dict(trained(model))
        strange = next((name for name in names if name not in self._rates), None)
        if strange:
            raise RecipeError(
                f"train.strategy: {' and '.join(self.overriding('rate'))} sets learning rates by weight, and {strange} "
                "is none of the model's weights. Use FSDP2 (`fsdp_version: 2`) or DDP."
            )
        return {weight: self._rates[name] for name, weight in names.items()}

    def before_step(self, model: nn.Module, accumulate: Callable[[], None]) -> None:
        """Call the hook of all parts. `accumulate` leaves the gradient in `.grad`."""

        def gradient() -> Mapping[str, Tensor]:
            accumulate()
            return take_gradients(model)

        for part in self.parts.values():
            part.before_step(model, gradient)

    def token_weights(self, *tokens: Tensor) -> Tensor:
        """Return the product of all parts' weights. `tokens`: the hook's arguments."""
        weights = torch.ones_like(tokens[0])
        for name in self.overriding("token_weights"):
            weights = weights * self.parts[name].token_weights(*tokens)
        return weights

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor | None:
        added = [loss for part in self.parts.values() if (loss := part.loss(model, inputs)) is not None]
        return sum(added[1:], added[0]) if added else None

    def _in_turn(self) -> list[TrainStrategy]:
        return sorted(self.parts.values(), key=lambda part: part.turn)

    def adjust_gradients(self, model: nn.Module) -> None:
        for part in self._in_turn():
            part.adjust_gradients(model)

    def adjust_weights(self, model: nn.Module) -> None:
        for part in self._in_turn():
            part.adjust_weights(model)

    def at_step(self, step: int, steps: int) -> None:
        """Set the number of steps taken, and of all."""
        for part in self.parts.values():
            part.step, part.steps = step, steps

    def state(self) -> dict[str, Tensor]:
        """Return all parts' states, by part and name."""
        return {f"{part}/{name}": t for part, of in self.parts.items() for name, t in of.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Give each part its own state."""
        for part, strategy in self.parts.items():
            own = {name.removeprefix(f"{part}/"): t for name, t in state.items() if name.startswith(f"{part}/")}
            if own:
                strategy.restore(own)

    @torch.no_grad()
    def finish(self, model: nn.Module) -> None:
        for part in self._in_turn():
            part.finish(model)

    def review(self, model: nn.Module, likelihoods: Likelihoods) -> None:
        for part in self.parts.values():
            part.review(model, likelihoods)

    def remember(self, model: nn.Module, data: Any, memory: Path | None, out: Path, *, main: bool) -> None:
        """Let each part write its memory below `out`; remove empty folders."""
        for name, part in self.parts.items():
            folder = out / name
            if main:
                folder.mkdir(parents=True)
            part.remember(model, data, _own(memory, name), folder)
            if main and not any(folder.iterdir()):
                folder.rmdir()
        if main and not any(out.iterdir()):
            out.rmdir()

    def memory_bytes(self, stage: StageSize) -> int:
        return sum(part.memory_bytes(stage) for part in self.parts.values())

    def close(self, model: Any) -> Any:
        for part in reversed(list(self.parts.values())):
            model = part.close(model)
        return model


def _own(memory: Path | None, name: str) -> Path | None:
    return memory / name if memory and (memory / name).is_dir() else None


_STRATEGIES: Registry[TrainStrategy] = Registry("strategy", __name__, TrainStrategy)


def strategy_names() -> tuple[str, ...]:
    """Return the names of all strategies: ours, of packages, of plugin files."""
    return _STRATEGIES.names()


def strategy_class(name: str) -> type[TrainStrategy]:
    """Return the class of a strategy.

    Raises:
        KeyError: no such strategy.
        RecipeError: two packages or files define it, or its own cannot be loaded.
    """
    return _STRATEGIES.find(name)


def named_strategy(name: str, *, where: str = "") -> type[TrainStrategy]:
    """Return a strategy's class. `where`: the place in the recipe, for errors."""
    return _STRATEGIES.named(name, where=where)


def get_strategy(name: str, /, **parameters: Any) -> TrainStrategy:
    """Make a strategy from its name and parameters.

    Raises:
        KeyError: no such strategy.
        TypeError: a parameter that it does not have.
        ValueError: a value that it cannot have.
    """
    return with_fields(strategy_class(name), name, parameters)


def combine(names: Sequence[str], parameters: Mapping[str, Mapping[str, Any]]) -> Combined:
    """Make the strategies of a stage from names and parameters.

    Raises as `get_strategy`, and ValueError for strategies that cannot be combined.
    """
    if len(set(names)) < len(names):
        raise ValueError(f"the same strategy twice: {', '.join(names)}")
    return combined({name: get_strategy(name, **parameters.get(name, {})) for name in names})


def combined(parts: Mapping[str, TrainStrategy]) -> Combined:
    """Return one stage's strategies, with a carrier; ValueError for conflicts."""
    carriers = [name for name, part in parts.items() if part.carrier]
    if len(carriers) > 1:
        raise ValueError(f"{' and '.join(carriers)} cannot be combined: each says which tensors are trained; keep one")
    carrier = carriers[0] if carriers else "full"
    parts = {carrier: parts[carrier] if carriers else get_strategy(carrier), **parts}
    for name, part in _others(parts, carrier):
        if part.carriers is not None and carrier not in part.carriers:
            raise ValueError(f"{name} works with {' or '.join(part.carriers)}, not with {carrier}")
    return Combined(parts)


def _others(parts: Mapping[str, TrainStrategy], carrier: str) -> Iterator[tuple[str, TrainStrategy]]:
    return ((name, part) for name, part in parts.items() if name != carrier)
