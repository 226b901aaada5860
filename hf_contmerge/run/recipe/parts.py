"""Parts of a recipe: data, tasks, measuring, guards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hf_contmerge.run.recipe.phases import use_of
from hf_contmerge.run.recipe.suites import expand_suites
from hf_contmerge.runtime.fields import LARGEST_SEED

LONGEST_NAME = 80
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=LONGEST_NAME)]
"""A name that becomes a folder's or a task's name."""

Location = Annotated[str, Field(min_length=1)]
"""A path or a Hub id. An empty one would mean the current folder."""

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
"""Of NumPy's generators, which take no other numbers."""


class Part(BaseModel):
    """A mapping of a recipe, whose fields are these and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSource(Part):
    """Rows of one dataset, and the choice of examples."""

    path: Location
    """A .json/.jsonl/.parquet/.csv/.tsv/.txt/.arrow file or a folder of them, a Hub id, or quickstart:<name>."""
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    text: str | None = None
    """The column with plain text, or a format string over columns such as "{question}\n{answer}"."""
    messages: str | None = None
    """The column with conversations."""
    labels: dict[str, tuple[str, ...]] = Field(default={})
    """Columns of class numbers -> the words that stand for 0, 1, ... in `text`."""
    min_chars: Annotated[int, Field(ge=0)] | None = None
    max_chars: Annotated[int, Field(ge=1)] | None = None
    """Shorter and longer examples are left out: prompt and answer together, of a pair the longer answer."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    """The most examples to train on."""
    streaming: bool = False
    """Fetch rows only until there are `max_examples` and `heldout`, shuffled through a buffer of 10,000 of them."""
    heldout_split: str | None = None
    """Take the held-out examples from this split (`test`, say), not from those to train on."""
    license: str | None = None
    """The rows' licence, for the model card. Default: the one in the dataset's README."""

    @model_validator(mode="after")
    def _fields_agree(self) -> DataSource:
        if self.text is not None and self.messages is not None:
            raise ValueError("`text` and `messages` name two forms of one dataset; keep one of them")
        if self.max_chars is not None and self.max_chars < (self.min_chars or 0):
            raise ValueError(f"no example has at least {self.min_chars} and at most {self.max_chars} characters")
        if self.streaming and not self.max_examples:
            raise ValueError("`streaming` needs `max_examples`: where to stop")
        if self.streaming and self.path.startswith("quickstart:"):
            raise ValueError(f"{self.path} lies on the disk already; remove `streaming`")
        sliced = [split for split in (self.split, self.heldout_split or "") if "[" in split]
        if self.streaming and sliced:
            raise ValueError(f"a stream has no slices such as {sliced[0]}; remove `streaming`, or use `max_examples`")
        return self


class MixedSource(DataSource):
    """One dataset of a mix."""

    share: Annotated[float, Field(gt=0, le=1)]
    """Of the mix's examples, held-out ones too."""


class Dataset(DataSource):
    """Texts or conversations, and the examples held out."""

    path: str = ""
    mix: tuple[MixedSource, ...] = ()
    """Several datasets in the place of one. No example comes twice: the mix is as large as the dataset allows that is
    used up first at its share, or has `max_examples`."""
    heldout: Annotated[int, Field(ge=0)] = 32
    """How many examples are set aside, never trained on, to measure what later stages forget of this one."""
    heldout_chars: Annotated[int, Field(ge=1)] = 4000
    """Longer held-out documents are cut here, so that a row of scores costs a known time."""

    def sources(self) -> tuple[DataSource, ...]:
        """Return the datasets of the examples: this one, or the mix."""
        return self.mix or (self,)

    def shares(self) -> tuple[float, ...]:
        """Return each source's share of the examples."""
        return tuple(source.share for source in self.mix) or (1.0,)

    @property
    def holds_out(self) -> bool:
        """True if any example is held out."""
        return bool(self.heldout or any(source.heldout_split for source in self.sources()))

    @model_validator(mode="after")
    def _one_or_a_mix(self) -> Dataset:
        if bool(self.path) == bool(self.mix):
            raise ValueError("a dataset needs either `path` or `mix` (a list of datasets with their shares)")
        shared = ("max_examples", *Dataset.__annotations__)
        fields = type(self).model_fields
        each = [n for n in fields if self.mix and n not in shared and getattr(self, n) != fields[n].default]
        if each:
            raise ValueError(f"`{each[0]}` belongs to each dataset of the mix; write it there")
        if abs(sum(self.shares()) - 1) > 1e-6:
            added = " + ".join(f"{share:g}" for share in self.shares())
            raise ValueError(f"the shares of a mix must sum to 1; {added} = {sum(self.shares()):g}")
        return self

    @model_validator(mode="after")
    def _streams_end(self) -> Dataset:
        if not self.heldout and any(source.streaming and source.heldout_split for source in self.sources()):
            raise ValueError("`heldout: 0` means all of `heldout_split`, which a stream has no end of; give a number")
        return self


def _as_dataset(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


DatasetField = Annotated[Dataset, BeforeValidator(_as_dataset)]


class StatisticsSettings(Part):
    """Measurements of a trained expert, for merge rules."""

    kinds: Annotated[tuple[Literal["inputs", "fisher", "adam"], ...], Field(min_length=1)] = ("inputs",)
    """inputs: the second moments of the inputs of linear maps. fisher: the diagonal of the empirical Fisher
    information. adam: the optimizer's second moments at the end of the training; needs the strategy full."""
    examples: Annotated[int, Field(ge=1)] = 256
    """How many of the stage's examples are read."""
    max_length: Annotated[int, Field(ge=1)] = 2048
    """Tokens at which an example is cut."""
    batch_size: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"kinds": value} if isinstance(value, list | tuple) else value


_KINDS = "perplexity, multiple_choice or exact_match"


def _as_words(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


class Task(Part):
    """A task: one of lm-eval's, or made from a dataset."""

    name: Name
    dataset: DatasetField | None = None
    """Its `split` is scored: name another than the one that stages are trained on."""
    kind: Literal["perplexity", "multiple_choice", "exact_match"] | None = None
    """What to make of the dataset; without it, `name` is lm-eval's."""
    question: str = "query"
    """The column with the prompt of a multiple_choice or exact_match dataset, or a format over columns such as
    "{title}\\n{text}\\nTopic:"."""
    choices: Annotated[str | tuple[str, ...], BeforeValidator(_as_words)] = "choices"
    """The column with the lists of continuations of a multiple_choice dataset, or the list that all rows share."""
    answer: str = "gold"
    """The column with the right choice or its index, or with the text that exact_match expects."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """The most that a model may write for exact_match."""
    stop: tuple[str, ...] = ("\n",)
    """Where its answer ends, if any of these comes first."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    suite: str | None = None
    """The suite that brought the task in."""

    @model_validator(mode="after")
    def _dataset_with_kind(self) -> Task:
        if (self.dataset is None) != (self.kind is None):
            raise ValueError(f"a task needs both `dataset` and `kind` ({_KINDS}), or neither")
        if self.dataset and self.dataset.streaming and self.kind != "perplexity":
            raise ValueError(f"the dataset of a {self.kind} task is read whole; remove `streaming`")
        if self.dataset and self.dataset.mix:
            raise ValueError("a task scores one dataset; make a task of each part of the mix")
        if self.dataset and self.dataset.heldout_split:
            raise ValueError("a task scores the `split` of its dataset; write `split`, not `heldout_split`")
        return self


def _as_task(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


TaskField = Annotated[Task, BeforeValidator(_as_task)]


TasksField = Annotated[tuple[TaskField, ...], BeforeValidator(expand_suites)]
"""Tasks, and names of suites, which become the tasks in them."""


class SameWithin(Part):
    """The smallest relevant differences; smaller ones are "the same", however certain."""

    accuracy: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """A share of right answers."""
    perplexity: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """Nats of -ln(perplexity)."""


class Evaluate(Part):
    """The measurements after each stage, for experts and merges alike."""

    general_tasks: TasksField = ()
    """Abilities that no stage teaches: what the base could do and should still do at the end."""
    matrix: Literal["lower", "full"] = "lower"
    """lower: the stages seen so far. full: also the ones to come, which forward transfer needs."""
    routed: bool = False
    """Also score separate experts behind a router: each expert is measured on all stages then."""
    shots: Annotated[int, Field(ge=1)] = 4
    """Of the baseline in_context: training examples in front of each question."""
    relevance: Annotated[int, Field(ge=2)] | None = None
    """Training examples of each stage so far, on which the effect of a new expert is predicted and measured before its
    merge; the report explains merges with it."""
    include_path: Location | None = None
    """A folder of lm-eval task YAML files."""
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """auto: as many as a GPU's memory holds, found by trying; 8 on processors, and where ranks share the weights."""
    max_length: Annotated[int, Field(ge=2)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights while scoring. auto: bfloat16 on a GPU and on processors with bfloat16 units, else float32."""
    cache: bool = True
    """Whether scores of earlier runs on this machine may be taken, and kept for later ones (scoring/cache.py)."""
    chat_template: bool = False
    """Put prompts into the tokenizer's chat template, few-shot examples as turns of their own."""
    same_within: SameWithin = SameWithin()
    """What the report takes for no difference."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """The share of each task's documents that a guard and `auto` parameters see; the others alone are reported then."""
    parallel: Literal["data", "layers", "tensor"] = "data"
    """How ranks share a model: each has it whole and reads other documents; its layers are spread over the GPUs of a
    machine, on which one process runs; or each matrix is spread over the ranks (the model's own `tp_plan`)."""
    backend: Literal["hf", "vllm"] = "hf"
    """What runs the model: transformers, or vLLM in one process."""

    def task_folders(self, own: Path) -> list[Path]:
        """Return where task files lie, `own` among them; the last counts first."""
        return [own, *([Path(self.include_path)] if self.include_path else [])]

    @property
    def general_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.general_tasks)

    def measured_by(self) -> dict[str, Any]:
        """Return the fields behind a score; others may differ in comparisons."""
        return {
            word: value for word, value in self.model_dump(mode="json").items() if use_of(f"evaluate.{word}").compares
        }


class Rung(Part):
    """A reaction to forgetting: `shrink`, `replay`, `earlier`, ..., `{rule: name}`."""

    do: Literal["shrink", "rule", "replay", "earlier", "keep_previous"]
    """shrink: a smaller scale. rule: all experts so far, folded by another rule. replay: the stage trained again with
    examples of the earlier ones among its own. earlier: the stage's expert as it was at an earlier step, the latest
    that holds. keep_previous: the merge of the stage before, without this expert; where
    stages start from each other (`start_from: previous`), later experts still descend from it."""
    rule: str | None = None
    parameters: dict[str, bool | int | float | str] = Field(default={})
    """Of the rule, or of the replay strategy; of `earlier`, `checkpoints` (3): how many are kept, evenly spread."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"do": value}
        if isinstance(value, dict) and value.get("rule") and "do" not in value:
            return {**value, "do": "rule"}
        return value

    @model_validator(mode="after")
    def _parameters_have_a_use(self) -> Rung:
        if (self.do == "rule") != (self.rule is not None):
            raise ValueError("a rung with another rule is `{rule: name}`; the others have no `rule`")
        if self.do == "earlier":
            others, count = {*self.parameters} - {"checkpoints"}, self.checkpoints
            if others or isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError("the parameter of `earlier` is `checkpoints`, a number from 1")
        elif self.parameters and self.do not in ("rule", "replay"):
            raise ValueError(f"`{self.do}` has no parameters")
        return self

    @property
    def checkpoints(self) -> Any:
        """Checkpoints kept by `earlier`."""
        return self.parameters.get("checkpoints", 3)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Guard(Part):
    """A forgetting budget, and the reactions to a broken one."""

    max_forgetting: Annotated[float, Field(ge=0)] = 0.01
    """The drop that is tolerated, in each block of tasks: a share of accuracy, nats of -ln(perplexity)."""
    measure: Literal["mean", "lost"] = "mean"
    """mean: the drop of the mean utility. lost: of accuracies, the share of documents that went from right to wrong,
    beyond guessing; others that went right make up for none of it. Other tasks keep the mean."""
    on: Annotated[tuple[Literal["general", "stages"], ...], BeforeValidator(_as_list), Field(min_length=1)] = (
        "general", "stages",
    )  # fmt: skip
    """general: the general tasks, against the base. stages: earlier stages, each against the merge that learnt it."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """How sure a drop beyond `max_forgetting` must be to break the budget: noise does so in 1 - confidence of cases."""
    ladder: tuple[Rung, ...] = (Rung(do="shrink"), Rung(do="keep_previous"))
    """What is tried, in this order, until one holds. If none does, the run stops with exit code 3."""

    @property
    def checkpoints(self) -> int:
        """Earlier checkpoints to keep of each stage; 0 without the rung `earlier`."""
        return max((rung.checkpoints for rung in self.ladder if rung.do == "earlier"), default=0)

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_word(cls, value: Any) -> Any:
        if isinstance(value, dict) and True in value:  # YAML 1.1 takes the key `on` for a truth value
            return {("on" if key is True else key): item for key, item in value.items()}
        return value
