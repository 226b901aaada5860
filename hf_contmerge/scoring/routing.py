"""Scores of separate experts with a router, without training.

A router picks the expert that answers a document by the document's prompt. Its features are the base model's last
hidden states, averaged over the tokens. It picks the nearest mean of the stages' training prompts, on standardised
features with a diagonal covariance. It never sees an answer.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_contmerge.errors import RunError
from hf_contmerge.models.loading import load_model, load_tokenizer
from hf_contmerge.run.scores import Sample, TaskScore
from hf_contmerge.runtime.device import cpu_only
from hf_contmerge.scoring.forgetting.paired import same_documents

PROMPTS = 256
"""Training prompts of a stage."""
CHARS = 300
"""Of a prompt, and of a text without one: scores keep no more."""
BASE = -1
"""The pick of the base model."""
_TOKENS, _BATCH = 128, 16
_FLOOR = 1e-2  # smallest variance of a standardised feature
_FAR = 0.99  # share of training prompts that are nearer than a prompt for the base


@dataclass(frozen=True)
class Router:
    """Means of the stages' prompts on standardised features."""

    centre: Tensor
    spread: Tensor
    means: Tensor
    variance: Tensor
    reach: Tensor
    """By stage, the distance of its far training prompts."""

    @classmethod
    def fit(cls, features: Sequence[Tensor]) -> Router:
        """Fit to the features [prompts, size] of each stage."""
        every = torch.cat(list(features))
        centre, spread = every.mean(0), every.std(0, correction=0).clamp_min(1e-12)
        own = [(x - centre) / spread for x in features]
        means = torch.stack([x.mean(0) for x in own])
        within = torch.cat([x - mean for x, mean in zip(own, means, strict=True)])
        router = cls(centre, spread, means, within.square().mean(0).clamp_min(_FLOOR), torch.zeros(len(own)))
        reach = [router._distances(x)[:, k].quantile(_FAR) for k, x in enumerate(features)]
        return replace(router, reach=torch.stack(reach))

    def pick(self, features: Tensor, *, or_base: bool = False) -> list[int]:
        """Return each row's stage, from 0.

        `or_base`: BASE for rows further away than nearly all training prompts.
        """
        distances = self._distances(features)
        nearest = distances.argmin(1)
        far = distances.gather(1, nearest[:, None])[:, 0] > self.reach[nearest]
        return [BASE if or_base and out else int(k) for k, out in zip(nearest.tolist(), far.tolist(), strict=True)]

    def _distances(self, features: Tensor) -> Tensor:
        own = (features - self.centre) / self.spread
        return ((own[:, None] - self.means).square() / self.variance).sum(-1)


def prompt_features(folder: Path, texts: Sequence[str], *, trust_remote_code: bool = False) -> Tensor:
    """Return the mean last hidden state of each text, in float64."""
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    model = load_model(folder, folder, dtype=torch.float32, trust_remote_code=trust_remote_code).eval()
    model = model if cpu_only() else model.cuda()
    end = tokenizer.eos_token_id or 0  # an empty prompt has one token, too
    rows = [torch.tensor((tokenizer.encode(text) or [end])[:_TOKENS], dtype=torch.long) for text in texts]
    features = []
    for i in range(0, len(rows), _BATCH):
        batch = rows[i : i + _BATCH]
        tokens, mask = (
            pad_sequence(values, batch_first=True).to(model.device)
            for values in (batch, [torch.ones_like(row) for row in batch])
        )
        with torch.no_grad():
            states = model(tokens, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states[-1]
        weights = mask[..., None].double()
        features.append(((states.double() * weights).sum(1) / weights.sum(1)).cpu())
    return torch.cat(features)


def features_sha256(features: Tensor) -> str:
    """Return the digest of features, for records."""
    return hashlib.sha256(features.float().numpy().tobytes()).hexdigest()


def routed_score(choices: Mapping[int, TaskScore], picks: Sequence[int]) -> TaskScore:
    """Return a task's score with each document answered by its pick.

    Raises RunError unless all models were scored on the same documents.
    """
    first = next(iter(choices.values()))
    if any(not same_documents(score, first) for score in choices.values()) or len(picks) != len(first.gains):
        raise RunError(
            "Experts were scored on other documents than each other, so no router can choose among their answers. "
            "Score them again with `contmerge redo RUN score`."
        )
    gains = tuple(choices[pick].gains[i] for i, pick in enumerate(picks))
    answers = tuple(choices[pick].answers[i] for i, pick in enumerate(picks)) if first.answers else ()
    sample = Sample(gains, first.weights)
    value = math.exp(-sample.utility) if first.block == "perplexity" else sample.utility
    details = {k: v for k, v in first.details.items() if k not in ("key", "metrics")}  # of one model
    return replace(
        first, value=value, utility=sample.utility, stderr=sample.stderr(), gains=gains, answers=answers,
        texts=(), details=details,
    )  # fmt: skip


def confusion(stages: Sequence[str], asked: Mapping[str, Sequence[int]]) -> dict[str, dict[str, int]]:
    """Return counts of documents by source and chosen model.

    `asked`: source -> picks.
    """
    names = {BASE: "base", **dict(enumerate(stages))}
    return {
        source: {name: sum(pick == k for pick in picks) for k, name in names.items()} for source, picks in asked.items()
    }
