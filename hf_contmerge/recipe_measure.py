"""What recipes say of measuring: a task, and what is measured after each stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from hf_contmerge.recipe_data import DatasetField, Name, Part


class Task(Part):
    """One thing to measure: a task that lm-eval knows by name, or one made from a dataset."""

    name: Name
    dataset: DatasetField | None = None
    kind: Literal["perplexity", "multiple_choice"] | None = None
    """What to make of the dataset; without it, `name` is lm-eval's."""
    question: str = "query"
    choices: str = "choices"
    answer: str = "gold"
    """The columns of a multiple_choice dataset: the prompt, the list of continuations, the index of the right one."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _dataset_with_kind(self) -> Task:
        if (self.dataset is None) != (self.kind is None):
            raise ValueError("a task needs both `dataset` and `kind` (perplexity or multiple_choice), or neither")
        if self.dataset and self.dataset.streaming and self.kind == "multiple_choice":
            raise ValueError("the dataset of a multiple_choice task is read whole; remove `streaming`")
        return self


def _as_task(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


TaskField = Annotated[Task, BeforeValidator(_as_task)]


class Evaluate(Part):
    """What is measured after each stage, for experts and merged models alike."""

    general_tasks: tuple[TaskField, ...] = ()
    """Abilities that no stage teaches: what the base could do and should still do at the end."""
    matrix: Literal["lower", "full"] = "lower"
    """lower: the stages seen so far. full: also the ones to come, which forward transfer needs."""
    include_path: str | None = None
    """A folder of lm-eval task YAML files."""
    limit: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    max_length: Annotated[int, Field(ge=2)] | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights while scoring. auto: bfloat16 on a GPU and on processors with bfloat16 units, else float32."""
