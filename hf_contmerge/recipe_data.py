"""What recipes say of data."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
"""A name that becomes a folder's or a task's name."""


class Part(BaseModel):
    """A mapping of a recipe, whose fields are these and no others."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Dataset(Part):
    """Texts or conversations, and which part of them is held out to measure forgetting."""

    path: str
    """A .json/.jsonl/.parquet/.csv/.txt/.arrow file or a folder of them, a Hub id, or quickstart:<name>."""
    config: str | None = None
    revision: str | None = None
    split: str = "train"
    text: str | None = None
    """The column with plain text, or a format string over columns such as "{question}\\n{answer}"."""
    messages: str | None = None
    """The column with conversations."""
    labels: dict[str, tuple[str, ...]] = Field(default={})
    """Columns of class numbers -> the words that stand for 0, 1, ... in `text`."""
    min_chars: Annotated[int, Field(ge=0)] | None = None
    max_chars: Annotated[int, Field(ge=1)] | None = None
    """Shorter and longer examples are left out: prompt and answer together, of a pair the longer answer."""
    max_examples: Annotated[int, Field(ge=1)] | None = None
    streaming: bool = False
    """Fetch rows only until there are `max_examples` and `heldout`, shuffled through a buffer of 10,000 of them."""
    heldout: Annotated[int, Field(ge=0)] = 32
    """How many examples are set aside, never trained on, to measure what later stages forget of this one."""
    heldout_split: str | None = None
    """Take them from this split instead (`test`, say)."""
    heldout_chars: Annotated[int, Field(ge=1)] = 4000
    """Longer held-out documents are cut here, so that a row of scores costs a known time."""

    @model_validator(mode="after")
    def _fields_agree(self) -> Dataset:
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
        if self.streaming and self.heldout_split and not self.heldout:
            raise ValueError("`heldout: 0` means all of `heldout_split`, which a stream has no end of; give a number")
        return self


def _as_dataset(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


DatasetField = Annotated[Dataset, BeforeValidator(_as_dataset)]
