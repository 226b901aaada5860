"""Training examples in the prompt: what a base model does without training.

Each question of a stage's tasks gets the stage's most similar training examples (BM25) in front of it, the most similar
one last. Examples are the texts that training sees. An example that begins with the question, or with the document to
score, is never shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_contmerge.run.recipe.schema import Recipe, Stage
from hf_contmerge.scoring._bm25 import Bm25
from hf_contmerge.scoring.cache import digest
from hf_contmerge.scoring.files import stage_documents
from hf_contmerge.training.data import StageData, prompts
from hf_contmerge.training.tokenizer import stage_tokenizer

_VERSION = 1  # raise it when the same examples make other prompts
_MOST = 20_000  # examples of a stage that are looked at: of the 200,000 of a large one, the index alone takes minutes


@dataclass(frozen=True)
class _StageExamples:
    """A stage's training examples, as texts."""

    stage: Stage
    data: StageData
    base: Path
    recipe: Recipe

    @cached_property
    def texts(self) -> list[str]:
        """The examples, without the token that begins a text."""
        rows = self.data.train.select(range(min(len(self.data.train), _MOST)))
        return [self._without_begin(text).strip("\n") for text in self._documents(rows)]

    @cached_property
    def index(self) -> Bm25:
        return Bm25(self.texts)

    @cached_property
    def prompts(self) -> Mapping[str, str]:
        """Held-out document -> its prompt; empty for plain texts."""
        if self.data.form == "text":
            return {}
        return dict(zip(self._documents(self.data.heldout), prompts(self.data.heldout, self.data.form), strict=True))

    def nearest(self, question: str, count: int) -> list[str]:
        """Return the most similar examples, the best last."""
        places = self.index.ranked(self.prompts.get(question, question))
        asked = _plain(self._without_begin(question))
        others = (self.texts[place] for place in places if not asked or not _plain(self.texts[place]).startswith(asked))
        best = [text for text, _ in zip(others, range(count), strict=False)]
        return best[::-1]

    def _documents(self, rows: Any) -> list[str]:
        assert self.stage.dataset
        chars = self.stage.dataset.heldout_chars
        return stage_documents(self.data, rows, chars=chars, load_tokenizer=lambda: self._tokenizer)

    def _without_begin(self, text: str) -> str:
        return text.removeprefix(self._tokenizer.bos_token or "")

    @cached_property
    def _tokenizer(self) -> Any:
        train, remote = self.recipe.train_of(self.stage), self.recipe.trust_remote_code
        return stage_tokenizer(self.base, train, trust_remote_code=remote)


class InContext:
    """Retrieved training examples for a recipe's tasks."""

    def __init__(self, recipe: Recipe, data: Mapping[str, StageData], base: Path) -> None:
        self.shots = recipe.evaluate.shots
        stages = [_StageExamples(stage, data[stage.name], base, recipe) for stage in recipe.stages]
        self._of = {task: examples for examples in stages for task in examples.stage.task_names()}
        self._leaves: Mapping[str, str] = {}
        self._before: dict[tuple[str, int], str] = {}
        self._cut: dict[str, set[tuple[str, int]]] = {}

    def digest(self, task: str) -> str:
        """Return a digest of a task's possible examples."""
        return digest([_VERSION, self.shots, self._of[task].texts])

    def begin(self, leaves: Mapping[str, str]) -> None:
        """Start a round of scoring. `leaves`: lm-eval's task -> the recipe's."""
        self._leaves, self._before = leaves, {}

    def before(self, request: Any) -> str:
        """Return the text in front of a request of lm-eval.

        All requests of a document get the same.
        """
        key = (request.task_name, request.doc_id)
        if key not in self._before:
            document = request.doc if isinstance(request.doc, dict) else {}
            question = str(document.get("query", request.args[0]))  # of our own tasks, without few-shot examples
            texts = self._of[self._leaves[request.task_name]].nearest(question, self.shots)
            self._before[key] = "".join(f"{text}\n\n" for text in texts)
        return self._before[key]

    def count_cut(self, request: Any) -> None:
        """Count a document whose examples do not fit as a whole."""
        task = self._leaves[request.task_name]
        self._cut.setdefault(task, set()).add((request.task_name, request.doc_id))

    def facts(self, task: str) -> dict[str, Any]:
        """Return a task's counts: shots, candidates, cut documents."""
        return {"shots": self.shots, "examples": len(self._of[task].texts), "cut": len(self._cut.get(task, ()))}


def _plain(text: str) -> str:
    return " ".join(text.split())
