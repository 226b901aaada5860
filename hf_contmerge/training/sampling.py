"""Trainers on sampled answers, GRPO and SDFT, resumable to the byte.

TRL samples for several steps at once and keeps the answers in memory. A checkpoint between has them, and what a teacher
learnt, in a file for each rank. The order of the prompts is a function of the seed and the epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import Trainer, TrainerState

from hf_contmerge.errors import ContmergeError, RecipeError
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.files import make_folder
from hf_contmerge.training._forms import Form
from hf_contmerge.training._learn import make_rewards
from hf_contmerge.training.rewards import Answers, Reward, checked_scores

_GIVEN = "given_"
"""What the columns of rewards begin with: TRL passes them by name, among its own words."""
_STEP, _TEACHER = "step", "teacher/"
_ROUNDING = 1e-6
"""Of an epoch's last step."""
_LOADER = "create_model_from_path"


class SampledAnswers(Trainer):
    """Keeps sampled answers and a moving teacher in checkpoints."""

    _step: int
    _buffered_inputs: list[dict[str, Any]] | None

    def _get_train_sampler(self: Any, dataset: Any = None) -> Any:
        plain = super()._get_train_sampler(dataset)  # pyright: ignore[reportAttributeAccessIssue]
        return _Epochs(plain, self.state)

    def _save_rng_state(self, output_dir: str) -> None:
        make_folder(Path(output_dir))  # rank 0 may not have come so far
        save_file(self._sampled(), self._sampled_file(output_dir))
        super()._save_rng_state(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = self._sampled_file(resume_from_checkpoint)
        if file.exists():
            self._restore(load_file(file))

    def _sampled_file(self, checkpoint: str) -> Path:
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        return Path(checkpoint) / f"sampled-{rank + 1}-of-{count}.safetensors"

    def _sampled(self) -> dict[str, Tensor]:
        """Return the answers in use, their passes, and teacher's weights."""
        kept = {_STEP: torch.tensor(self._step)}
        for number, batch in enumerate(self._buffered_inputs or []):
            kept |= {f"{number}/{name}": value.contiguous() for name, value in batch.items() if value is not None}
        if teacher := self._moving_teacher():
            kept |= {f"{_TEACHER}{name}": weight.detach().clone() for name, weight in teacher.named_parameters()}
        return {name: tensor.cpu().clone() for name, tensor in kept.items()}

    @torch.no_grad()
    def _restore(self, kept: dict[str, Tensor]) -> None:
        self._step = int(kept.pop(_STEP))
        if teacher := self._moving_teacher():
            for name, weight in teacher.named_parameters():
                weight.copy_(kept.pop(f"{_TEACHER}{name}"))
        batches: dict[int, dict[str, Any]] = {}
        for key, tensor in kept.items():
            number, _, name = key.partition("/")
            batches.setdefault(int(number), {})[name] = tensor.to(self.accelerator.device)
        self._buffered_inputs = [batches[number] for number in sorted(batches)] or None

    def _moving_teacher(self: Any) -> Any:
        """Return SDFT's averaged teacher, if there is one."""
        moves = getattr(self.args, "teacher_model_kind", None) == "ema"
        return self.accelerator.unwrap_model(self.teacher_model) if moves else None


class _Epochs(Sampler[int]):
    """TRL's sampler, with an order per epoch for resumed trainings."""

    def __init__(self, plain: Any, state: TrainerState) -> None:
        self._plain, self._state = plain, state

    def __iter__(self) -> Iterator[int]:
        if self._plain.shuffle:
            self._plain.generator.manual_seed((self._plain.seed or 0) + int((self._state.epoch or 0) + _ROUNDING))
        return iter(self._plain)

    def __len__(self) -> int:
        return len(self._plain)


def with_sampling(plain: type) -> type:
    """Return a trainer class of TRL's whose checkpoints have the sampled answers."""
    return type(plain.__name__, (SampledAnswers, plain), {})


@contextmanager
def loading_by(trainer: type, load: Callable[[], Any]) -> Iterator[None]:
    """Have a trainer load its reference or teacher by our own loader.

    TRL loads it from the name in the model's config: the base, where a stage starts from an adapter.
    """
    homes = [sys.modules[cls.__module__] for cls in trainer.__mro__ if cls.__module__.startswith("trl.")]
    homes = [home for home in homes if hasattr(home, _LOADER)]
    before = [getattr(home, _LOADER) for home in homes]
    for home in homes:
        setattr(home, _LOADER, lambda *_, **__: load())
    try:
        yield
    finally:
        for home, plain in zip(homes, before, strict=True):
            setattr(home, _LOADER, plain)


# Rows and rewards


def sampled_rows(rows: datasets.Dataset, form: Form) -> datasets.Dataset:
    """Return examples with TRL's names of their columns."""
    if form == "demonstrations":
        return rows.rename_column("completion", "privileged_context")
    return rows.rename_columns({name: _GIVEN + name for name in rows.column_names if name != "prompt"})


def reward_functions(train: Train) -> list[Callable[..., list[float | None]]]:
    """Return a stage's rewards as TRL calls them."""
    return [_function(name, reward) for name, reward in make_rewards(train).items()]


def _function(name: str, reward: Reward) -> Callable[..., list[float | None]]:
    def score(*, prompts: Any, completions: Any, completion_ids: Any, **given: Any) -> list[float | None]:
        texts = [text if isinstance(text, str) else text[0]["content"] or "" for text in completions]
        columns = {column: given[_GIVEN + column] for column in reward.columns()}
        try:
            return checked_scores(name, reward, Answers(prompts, texts, completion_ids, columns))
        except ContmergeError:
            raise
        except Exception as error:  # code of others may fail in any way
            raise RecipeError(f"The reward {name} failed: {type(error).__name__}: {error}.") from error

    score.__name__ = name
    return score
