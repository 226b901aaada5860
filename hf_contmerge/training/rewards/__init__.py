"""Rewards for sampled answers (`learn: grpo`); one reward a file.

A reward is a dataclass whose fields are its parameters, as with training strategies: `rewards/exact_match.py` with a
class `ExactMatch` is `rewards: [exact_match]` in the recipe. Rewards of others are code: they come from installed
packages (entry points of the group `hf_contmerge.training.rewards`) or from files named with `--plugin`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_contmerge.errors import DataError
from hf_contmerge.runtime.fields import with_fields
from hf_contmerge.runtime.plugins import Registry


@dataclass(frozen=True)
class Answers:
    """Sampled answers; all sequences have one item for each."""

    prompts: Sequence[Any]
    """Texts, or conversations as lists of turns."""
    texts: Sequence[str]
    """The answers, without special tokens."""
    tokens: Sequence[Sequence[int]]
    columns: Mapping[str, Sequence[str]]
    """The dataset's columns that the reward names, as text."""


@dataclass
class Reward:
    """Base of rewards."""

    def columns(self) -> tuple[str, ...]:
        """Return the names of the columns that it reads, besides `prompt`."""
        return ()

    def require(self) -> None:
        """Raise ValueError if a package is missing."""

    def score(self, answers: Answers) -> Sequence[float | None]:
        """Return a number per answer; None where the reward is silent."""
        raise NotImplementedError


_REWARDS: Registry[Reward] = Registry("reward", __name__, Reward)


def reward_names() -> tuple[str, ...]:
    """Return the names of all rewards: ours, of packages, of plugin files."""
    return _REWARDS.names()


def get_reward(name: str, /, **parameters: Any) -> Reward:
    """Make a reward from its name and parameters.

    Raises:
        RecipeError: no such reward.
        TypeError: a parameter that it does not have.
        ValueError: a value that it cannot have.
    """
    return with_fields(_REWARDS.named(name, where="rewards"), name, parameters)


def checked_scores(name: str, reward: Reward, answers: Answers) -> list[float | None]:
    """Return a reward's numbers. Raises DataError for anything else."""
    found = list(reward.score(answers))
    if len(found) != len(answers.texts):
        raise DataError(f"The reward {name} gives {len(found)} numbers for {len(answers.texts)} answers; one each.")
    for score in found:
        if score is not None and not (isinstance(score, int | float) and math.isfinite(score)):
            raise DataError(f"The reward {name} gives {score!r:.60}; a finite number or None was expected.")
    return [None if score is None else float(score) for score in found]
