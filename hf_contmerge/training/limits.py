"""Limits of a stage's trainer: chat template and `max_length`.

TRL drops examples without a token that counts, and says nothing. They are found here, before any training, by TRL's own
rules. An example with fewer bytes than `max_length` is not tokenized: no token is shorter than a byte.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.training._extras import template_arguments
from hf_contmerge.training._forms import COLUMNS, LABEL, SAMPLED, Form, Row, rows_of
from hf_contmerge.training._learn import make_rewards
from hf_contmerge.training.data import require_chat_template
from hf_contmerge.training.settings import loss_fields
from hf_contmerge.training.tokenizer import stage_tokenizer

_LEARNT: dict[str, Form] = {"kto": "unpaired", "grpo": "prompts", "sdft": "demonstrations"}
_BATCH = 1000
_SPECIAL = 8
"""Tokens that a tokenizer may add to a text."""
_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Roles that chat templates know; any other must show in the text."""


def trainer_limits(train: Train, base: Path, *, trust_remote_code: bool) -> TrainerLimits:
    """Return the limits of a stage's training."""
    load = functools.partial(stage_tokenizer, base, train, trust_remote_code=trust_remote_code)
    return TrainerLimits(train, load)


@dataclass(frozen=True, eq=False)
class TrainerLimits:
    """A stage's settings and tokenizer."""

    train: Train
    load_tokenizer: Callable[[], Any]

    @functools.cached_property
    def tokenizer(self) -> Any:
        return self.load_tokenizer()

    @property
    def form(self) -> Form | None:
        """The form required by `learn`."""
        return _LEARNT[self.train.learn] if self.train.learn else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns for rewards."""
        rewards = make_rewards(self.train) if self.train.learn == "grpo" else {}
        return tuple(name for reward in rewards.values() for name in reward.columns())

    # Conversations

    def check(self, example: Row, form: Form) -> str | None:
        """Return why an example cannot be learnt from, or None.

        Raises DataError for a conversation that the chat template refuses.
        """
        if form in SAMPLED and not example["prompt"]:
            return "have an empty prompt"
        if form == "demonstrations" and isinstance(example["prompt"], list) and example["prompt"][-1]["role"] != "user":
            return "have a prompt that does not end with the user's turn"
        for turns, prompt in _conversations(example, form):
            text = self._render(turns, example, prompt=prompt)
            hidden = next((t for t in turns if t["role"] not in _ROLES and not _shows(t, text)), None)
            if hidden:
                raise DataError(
                    f"the chat template leaves out the turns of the role {hidden['role']!r}. Name the roles as the "
                    "template does, such as user and assistant."
                )
        if form == "messages" and self._fields(form)["assistant_only_loss"]:
            return None if any(t["role"] == "assistant" for t in example["messages"]) else "have no assistant turn"
        return None

    def _render(self, turns: list[Row], example: Row, *, prompt: bool = False) -> str:
        require_chat_template(self.tokenizer)
        arguments = template_arguments(example)
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **arguments)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program
            raise DataError(
                f"the chat template refuses the conversation ({type(error).__name__}: {error}). Correct the "
                "conversation, or remove it."
            ) from error

    # Length

    def too_long(self, form: Form) -> str:
        """Return why examples are left out by `learnable`."""
        return f"have no token to learn from within `max_length` ({self._fields(form).get('max_length')})"

    def learnable(self, data: datasets.Dataset, form: Form, *, at_most: int | None) -> list[int]:
        """Return the places of the first `at_most` examples with a target token."""
        fields = self._fields(form) if form != "text" else {}
        if form == "text" or not _cuts(fields, form):
            return list(range(len(data)))
        keep: list[int] = []
        for start in range(0, len(data), _BATCH):
            part = list(rows_of(data.select(range(start, min(start + _BATCH, len(data))))))
            keep += [start + i for i, learns in enumerate(self._learns(part, form, fields)) if learns]
            if at_most is not None and len(keep) >= at_most:
                break
        return keep[:at_most]

    def _learns(self, part: list[Row], form: Form, fields: dict[str, Any]) -> list[bool]:
        if form == "messages":
            return [self._shows_answer(example, fields) for example in part]
        longest = fields["max_length"]
        texts = [e["prompt"] for e in part if isinstance(e["prompt"], str) and _may_exceed(e["prompt"], longest)]
        long = {text for text, ids in zip(texts, self._ids(texts), strict=True) if len(ids) >= longest}
        return [
            (isinstance(e["prompt"], str) and e["prompt"] not in long) or self._prompt_length(e, form) < longest
            for e in part
        ]

    def _prompt_length(self, example: Row, form: Form) -> int:
        """Return the common tokens of a prompt, and prompt and answer."""
        prompt, arguments = example["prompt"], template_arguments(example)
        start = self._ids(prompt, prompt=True, **arguments)
        answers = (example[name] for name in _answers(form))
        return min(_common(start, self._ids(prompt + answer, **arguments)) for answer in answers)

    def _shows_answer(self, example: Row, fields: dict[str, Any]) -> bool:
        """Say if a token of an assistant's turn is kept."""
        if not fields["assistant_only_loss"]:
            return True
        turns = example["messages"]
        if not _may_exceed(self._render(turns, example), fields["max_length"]):
            return True
        found = self.tokenizer.apply_chat_template(
            turns,
            chat_template=self._marking_template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **template_arguments(example),
        )
        mask, longest = found["assistant_masks"], fields["max_length"]
        return 1 in (mask[:longest] if fields["truncation_mode"] == "keep_start" else mask[-longest:])

    @functools.cached_property
    def _marking_template(self) -> str | None:
        """TRL's template with marked assistant turns; None if not needed."""
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        marked = has_generation_markers(self.tokenizer.chat_template)
        return None if marked else get_training_chat_template(self.tokenizer)

    def _ids(self, value: Any, *, prompt: bool = False, **arguments: Any) -> list[Any]:
        """Return the tokens of a text, of several texts, or of turns."""
        if not value:
            return []
        if isinstance(value, str) or isinstance(value[0], str):
            return self.tokenizer(value, verbose=False)["input_ids"]
        return self.tokenizer.apply_chat_template(
            value,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=prompt,
            tokenizer_kwargs={"verbose": False},
            **arguments,
        )["input_ids"]

    @functools.cache  # noqa: B019  (one object a stage)
    def _fields(self, form: Form) -> dict[str, Any]:
        return loss_fields(self.train, form, lambda: self.tokenizer)


def _may_exceed(text: str, longest: int) -> bool:
    """Say if a text's bytes may make a number of tokens."""
    return len(text.encode()) + _SPECIAL >= longest


def _cuts(fields: dict[str, Any], form: Form) -> bool:
    """Say if TRL's cut of a form can leave no answer."""
    if fields.get("max_length") is None or fields.get("packing"):
        return False
    if form == "messages":
        return True
    return (
        fields.get("truncation_mode", "keep_start") == "keep_start" and fields.get("completion_only_loss") is not False
    )


def _conversations(example: Row, form: Form) -> Iterable[tuple[list[Row], bool]]:
    """Yield an example's conversations, and if an answer is to follow."""
    if form == "messages":
        yield example["messages"], False
    elif form != "text" and isinstance(example["prompt"], list):
        yield example["prompt"], True
        for name in _answers(form):
            yield [*example["prompt"], *example[name]], False


def _answers(form: Form) -> tuple[str, ...]:
    return tuple(name for name in COLUMNS[form] if name not in ("prompt", LABEL))


def _shows(turn: Row, text: str) -> bool:
    return not isinstance(turn.get("content"), str) or turn["content"].strip() in text


def _common(ids: list[int], others: list[int]) -> int:
    """Return how many first tokens are equal."""
    pairs = zip(ids, others, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(ids), len(others)))
