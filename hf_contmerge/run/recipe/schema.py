"""The recipe's fields: stages, training, merging, evaluation, guard, publishing.

    name: law-then-code                     # the run's folder is runs/<name>
    base_model: Qwen/Qwen3-0.6B             # a Hub id, a folder, a .gguf file
    stages:
      - {name: law,  dataset: law.jsonl}                          # trained on data, or
      - {name: code, expert: owner/code-model}                    # given, or
      - {name: chat, expert: owner/instruct, minus: owner/base}   # the difference of two other models
    # or a published stream: `stages: {suite: cl-standard, order: 2}` (streams.py)
    train:    {max_steps: 500, learning_rate: 1.0e-5}             # fields of TRL's SFTConfig, plus `strategy`
    merge:    [{rule: magmax, parameters: {lambda: 0.5}}, {rule: opcm}]
    evaluate: {general_tasks: [hellaswag]}
    guard:    {max_forgetting: 0.01, on: [general, stages], ladder: [shrink, keep_previous]}
    publish:  {repo_id: me/law-code, merge: opcm}

Imports neither torch nor transformers, so that a finished run answers at once. The existence of rules, strategies,
tasks and columns is checked later, before the first phase.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hf_contmerge.run.recipe.parts import (
    DatasetField,
    Evaluate,
    Guard,
    Location,
    Name,
    Part,
    Seed,
    StatisticsSettings,
    Task,
    TasksField,
)
from hf_contmerge.run.recipe.streams import with_stream
from hf_contmerge.run.recipe.trl_fields import TOKENIZER_FIELDS, read_fields
from hf_contmerge.runtime.foreign import repeated

StartFrom = Literal["base", "previous", "merged"]
Baseline = Literal["joint", "in_context"]


def _stage_fields(train: dict[str, Any]) -> dict[str, Any]:
    return read_fields(train, ours=Train.model_fields, stage=True)


class Stage(Part):
    """A stage: a dataset, a given expert, or a difference of models."""

    name: Name
    dataset: DatasetField | None = None
    expert: Location | None = None
    minus: Location | None = None
    train: Annotated[dict[str, Any], AfterValidator(_stage_fields)] = Field(default={})
    """Overrides of the run's SFTConfig fields: learning_rate, max_steps, ...; DPOConfig fields for preference pairs."""
    tasks: TasksField = ()
    """Tasks in addition to the perplexity of the stage's held-out text."""

    @property
    def heldout_task(self) -> str | None:
        """Name of the task for the stage's held-out text."""
        return f"{self.name}_heldout" if self.dataset and self.dataset.holds_out else None

    def task_names(self) -> tuple[str, ...]:
        """Return the names of all tasks of this stage."""
        own = (self.heldout_task,) if self.heldout_task else ()
        return own + tuple(t.name for t in self.tasks)

    @model_validator(mode="after")
    def _one_source(self) -> Stage:
        if (self.dataset is None) == (self.expert is None):
            raise ValueError("a stage needs either `dataset` (to train on) or `expert` (a trained model)")
        if self.minus is not None and self.expert is None:
            raise ValueError("`minus` needs `expert`: the stage's task vector is expert - minus")
        if self.train and self.dataset is None:
            raise ValueError("`train` needs `dataset`: a given expert is not trained")
        for word in ("strategy", "parameters"):
            if word in self.train:
                raise ValueError(f"train.{word} applies to the whole run; set it in `train` of the recipe")
        return self


def _as_names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _as_mapping(value: Any) -> Any:
    names = _as_names(value)
    named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return {name: {} for name in names} if named else value


class Train(BaseModel):
    """Training settings: `strategy`, its `parameters`, fields of TRL's SFTConfig."""

    model_config = ConfigDict(frozen=True, extra="allow")

    strategy: Annotated[tuple[str, ...], BeforeValidator(_as_names), Field(min_length=1)] = ("full",)
    """One name, or several to combine: [lora, replay]."""
    parameters: dict[str, Any] = {}
    """Parameters of the strategy; of several, by name: {lora: {r: 8}, replay: {examples: 100}}."""
    learn: Literal["kto", "grpo", "sdft"] | None = None
    """Another objective than the columns' own. kto: from single answers, each labelled good or bad. grpo: from rewards
    of answers that the model samples. sdft: from a teacher, the model itself, that sees a demonstration."""
    rewards: Annotated[dict[str, dict[str, Any]], BeforeValidator(_as_mapping)] = {}
    """Of `learn: grpo`: names, or names with their parameters; their sum counts, or as `reward_weights` says."""
    statistics: StatisticsSettings | None = None
    """Of each expert, for merge rules that need them: [inputs], or {examples: 64, ...}."""

    @model_validator(mode="before")
    @classmethod
    def _read_trl_fields(cls, value: Any) -> Any:
        return read_fields(value, ours=cls.model_fields) if isinstance(value, dict) else value

    def parameters_of(self) -> dict[str, dict[str, Any]]:
        """Return strategy -> its parameters."""
        if len(self.strategy) == 1 and set(self.parameters) != set(self.strategy):
            return {self.strategy[0]: self.parameters}
        return self.parameters

    @model_validator(mode="after")
    def _parameters_by_strategy(self) -> Train:
        if len(self.strategy) > 1:
            for name, value in self.parameters.items():
                if name not in self.strategy or not isinstance(value, dict):
                    raise ValueError(
                        f"parameters.{name}: with several strategies, put the parameters of each under its name, as in "
                        f"`parameters: {{{self.strategy[0]}: {{...}}}}`"
                    )
        return self

    @property
    def sft_fields(self) -> dict[str, Any]:
        """SFTConfig fields set in the recipe."""
        return dict(self.model_extra or {})

    @property
    def changes_tokenizer(self) -> bool:
        """True if experts and merges get another end, padding or chat template."""
        return any(self.sft_fields.get(field) for field in TOKENIZER_FIELDS)


class Layers(Part):
    """Factors on a merge's change, linear from first layer to last."""

    first: float | Literal["auto"] = 1.0
    """Also of embeddings. `auto`: searched after each stage on validation documents."""
    last: float = 1.0
    """Also of the head and of norms behind the layers."""


class Merge(Part):
    """A merge rule, applied after each stage.

    Several can run side by side on the same experts.
    """

    name: Name = ""
    rule: str
    parameters: dict[str, bool | int | float | str] = Field(default={})
    """By name. `auto`: searched after each stage on validation documents, for parameters of the scale only."""
    layers: Layers | None = None
    """Factors on the merged change by layer."""
    weights: dict[Name, float] = Field(default={})
    """Stage -> factor on its expert's change before it is folded, with a linear rule; other stages have 1."""
    start_from: StartFrom | None = None
    """Start of the experts' training; default: as in the rule's paper."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the merged model's weights; auto: the base model's. Float32 weights of a 16-bit base stay float32."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Of 16-bit weights. stochastic keeps the mean of updates smaller than the last bit; nearest drops them."""
    shard_size: Annotated[int, Field(ge=1)] = 5_000_000_000
    """Bytes per weight file, as in `save_pretrained(max_shard_size=...)`."""
    tokenizer_from: Name | None = None
    """Source of the merged model's tokenizer, chat template and generation config: `base`, or a stage with `expert`,
    used from that stage on. Default: the newest `expert` with a `minus`, else the base."""

    @model_validator(mode="before")
    @classmethod
    def _named_after_its_rule(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"rule": value}
        if isinstance(value, dict) and "rule" in value and not value.get("name"):
            value = {**value, "name": value["rule"]}
        return value

    def settings(self) -> dict[str, bool | int | float | str]:
        """Return the rule's parameters with the factors by layer."""
        layers = {f"{word}_layer": value for word, value in self.layers or () if value != 1.0}
        return {**self.parameters, **layers}

    @property
    def auto(self) -> tuple[str, ...]:
        """Names of the `auto` parameters."""
        return tuple(word for word, value in self.settings().items() if value == "auto")


class Publish(Part):
    """The Hub repository for the result."""

    repo_id: str
    merge: str | None = None
    """Merge entry to publish; default: the only one."""
    private: bool = True
    license: str | None = None


class Recipe(Part):
    """The recipe of a run."""

    name: Name
    base_model: Location
    continue_from: Location | None = None
    """A published merge of this base, owner/name[@revision] or a folder: its experts come before the stages."""
    output: Location | None = None
    """The run folder; default: runs/<name>."""
    seed: Seed = 0
    trust_remote_code: bool = False
    plugins: tuple[Location, ...] = ()
    """Python files with rules and strategies that the recipe needs, from its folder. `--plugin` lets their code run."""
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]
    train: Train = Train()
    merge: Annotated[tuple[Merge, ...], Field(min_length=1)]
    evaluate: Evaluate = Evaluate()
    baselines: Annotated[tuple[Baseline, ...], BeforeValidator(_as_names)] = ()
    """joint: one expert trained from the base on all stages' examples at once, for as many steps as all stages.
    in_context: the base, with `evaluate.shots` retrieved training examples of the task's stage in its prompt."""
    guard: Guard | None = None
    publish: Publish | None = None

    @model_validator(mode="before")
    @classmethod
    def _stages_of_a_stream(cls, value: Any) -> Any:
        return with_stream(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names_differ(self) -> Recipe:
        for what, names in (
            ("stages", [s.name for s in self.stages]),
            ("merge entries", [m.name for m in self.merge]),
            ("plugins", [Path(file).name for file in self.plugins]),
            ("tasks", [n for s in self.stages for n in s.task_names()] + [t.name for t in self.evaluate.general_tasks]),
        ):
            twice = sorted(repeated(names))
            if twice:
                raise ValueError(f"two {what} are named {', '.join(twice)}; give each a different `name`")
        return self

    @model_validator(mode="after")
    def _tokenizers_have_a_stage(self) -> Recipe:
        given = [s.name for s in self.stages if s.expert]
        for entry in self.merge:
            if entry.tokenizer_from not in (None, "base", *given):
                raise ValueError(
                    f"tokenizer_from of merge entry {entry.name} must be `base` or a stage with `expert` "
                    f"({', '.join(given) or 'none in this recipe'}); got {entry.tokenizer_from}"
                )
        return self

    @model_validator(mode="after")
    def _baselines_have_data(self) -> Recipe:
        given = [s.name for s in self.stages if not s.dataset]
        fields = (*(f"baselines ({name})" for name in self.baselines), *["evaluate.routed"] * self.evaluate.routed)
        if fields and given:
            raise ValueError(
                f"{fields[0]} needs the examples of every stage, and {', '.join(given)} has an `expert` without any; "
                "leave it out, or give the stage a `dataset`"
            )
        return self

    @model_validator(mode="after")
    def _in_context_has_tasks(self) -> Recipe:
        if "in_context" in self.baselines and not any(s.task_names() for s in self.stages):
            raise ValueError(
                "baselines (in_context) has nothing to measure: no stage has `heldout` text or `tasks`, and general "
                "tasks have no training examples. Give stages one of these, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _relevance_has_texts(self) -> Recipe:
        if self.evaluate.relevance and (len(self.stages) < 2 or not any(s.dataset for s in self.stages)):
            raise ValueError(
                "evaluate.relevance looks at a second stage's expert on training examples; give the recipe two stages "
                "and one of them a `dataset`, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _weights_have_a_stage(self) -> Recipe:
        names = [s.name for s in self.stages]
        for entry in self.merge:
            if strangers := [name for name in entry.weights if name not in names]:
                raise ValueError(
                    f"merge entry {entry.name} has a weight for {strangers[0]}, which is not a stage "
                    f"({', '.join(names)}); remove it, or name a stage"
                )
        return self

    @model_validator(mode="after")
    def _guard_has_tasks(self) -> Recipe:
        staged = any(s.task_names() for s in self.stages)
        watched = {"general": bool(self.evaluate.general_tasks), "stages": staged}
        if self.guard and not any(watched[what] for what in self.guard.on):
            raise ValueError(
                f"guard.on ({', '.join(self.guard.on)}) has no tasks to watch: set evaluate.general_tasks, or give "
                "stages `heldout` text or `tasks`"
            )
        if any(m.auto for m in self.merge) and not staged:
            raise ValueError("an `auto` parameter needs measured stages: give them `heldout` text or `tasks`")
        return self

    @property
    def tunes(self) -> bool:
        """True if a guard or `auto` parameter uses scores.

        Choices then see only each task's validation documents; results are reported on the others.
        """
        return self.guard is not None or any(m.auto for m in self.merge)

    def tokenizer_model(self, t: int, entry: Merge) -> str | None:
        """Return the tokenizer's model for a merge of t stages; None: base.

        Chat template and generation config come from it too.
        """
        given = [s for s in self.stages[:t] if s.expert]
        if entry.tokenizer_from:
            return next((s.expert for s in given if s.name == entry.tokenizer_from), None)
        return next((s.expert for s in reversed(given) if s.minus), None)

    def tasks(self) -> Iterator[Task]:
        """Yield the recipe's tasks, without the stages' held-out texts."""
        for stage in self.stages:
            yield from stage.tasks
        yield from self.evaluate.general_tasks

    def measured(self, stages: Iterable[int], *, general: bool = True) -> Iterator[Task]:
        """Yield the tasks of some stages (from 1), then the general ones."""
        for t in stages:
            stage = self.stages[t - 1]
            if stage.heldout_task:
                yield Task(name=stage.heldout_task)
            yield from stage.tasks
        if general:
            yield from self.evaluate.general_tasks

    def runs_models(self) -> bool:
        """Say if models are trained or measured, and not merged alone."""
        measured = self.measured(range(1, len(self.stages) + 1))
        return any(stage.dataset for stage in self.stages) or next(measured, None) is not None

    def train_of(self, stage: Stage) -> Train:
        """Return a stage's training settings: the run's with its overrides."""
        return Train.model_validate({**self.train.model_dump(), **stage.train})

    def run_folder(self) -> Path:
        """Return the run folder, unless the command line names another."""
        return Path(self.output or f"runs/{self.name}")
