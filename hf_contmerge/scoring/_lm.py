"""An lm-eval model with length-sorted batches shared among ranks.

HFLM takes the local rank for the rank, ignores ranks on CPUs and drops them for a model in memory. Here every rank
sees all requests, forms the same batches, computes its share and gathers all answers. The answers are bit-identical
to a single process, for any number of documents and ranks.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from accelerate.utils import find_executable_batch_size
from lm_eval.models.huggingface import HFLM
from torch.distributed.tensor import DTensor

from hf_contmerge.errors import DataError, ResourceError
from hf_contmerge.models.loading import plain_model
from hf_contmerge.runtime.progress import batch_progress
from hf_contmerge.runtime.ranks import Ranks
from hf_contmerge.scoring._texts import TextTokens
from hf_contmerge.scoring.setup import AUTO_BATCH_SIZE

T = TypeVar("T")
Tokens = tuple[int, ...]

_LARGEST_BATCH = 128  # upper limit of `auto` on a GPU
_CPU_PIECE, _GPU_PIECE = 2**19, 2**26
"""Logits converted to float32 at a time; the CPU figure fits its cache, twice as fast as all at once."""
_Parent: Any = HFLM  # its registration hides its type


class SharedLM(TextTokens, _Parent):
    """HFLM with batches shared among ranks; lm-eval sees one process each."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        ranks: Ranks,
        *,
        batch_size: int | str = "auto",
        max_length: int | None = None,
    ) -> None:
        """Wrap a loaded model.

        Log-softmax runs in float32: bfloat16 log-likelihoods would be rounded to two digits before they are summed.

        Args:
            model: a transformers model, or peft's around one.
            tokenizer: its tokenizer.
            ranks: the processes sharing the work.
            batch_size: a number, or "auto".
            max_length: tokens per forward pass; default: the model's.
        """
        shared_out = any(isinstance(p, DTensor) for p in model.parameters())
        # Ranks that compute together would wait forever for one that ran out of memory.
        fixed = model.device.type == "cpu" or shared_out
        batch = AUTO_BATCH_SIZE if batch_size == "auto" and fixed else batch_size
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", softmax_dtype="float32", batch_size=batch,
            max_length=max_length,
        )  # fmt: skip
        self._ranks = ranks
        self._takes = inspect.signature(plain_model(model).forward).parameters.keys()
        # A forward pass of sharded weights involves all ranks.
        self._in_step = ranks.size > 1 and shared_out

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Generate a continuation of each prompt.

        Raises:
            ResourceError: the model's weights are sharded over the ranks.
        """
        if self._in_step:
            raise ResourceError(
                "A model with weights sharded over the ranks cannot generate text here, because texts end at different "
                "times. Score it without generation tasks, or score its saved folder."
            )
        requests = self.with_examples(requests)
        lengths = [len(self.tok_encode(r.args[0])) for r in requests]
        settings = [json.dumps(r.args[1], sort_keys=True, default=str) for r in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], -lengths[i], requests[i].args[0]))
        rows, configured = self._rows(max(lengths) + self.max_gen_toks), self.batch_size_per_gpu
        batches: list[list[int]] = []
        for i in order:  # one batch has one set of generation settings
            if not batches or len(batches[-1]) == rows or settings[batches[-1][-1]] != settings[i]:
                batches.append([])
            batches[-1].append(i)
        write, self.batch_size_per_gpu = super().generate_until, rows
        costs = [len(batch) * (lengths[batch[0]] + self.max_gen_toks) for batch in batches]
        texts = self._shared(batches, costs, lambda batch: write([requests[i] for i in batch], disable_tqdm=True))
        self.batch_size_per_gpu = configured
        answers = dict(zip((i for batch in batches for i in batch), (t for part in texts for t in part), strict=True))
        return [answers[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None  # noqa: ARG002
    ) -> list[tuple[float, bool]]:  # fmt: skip
        """Return (log-likelihood, greedy) of tokenised requests.

        Each request is (name, context, continuation). Requests with the same input tokens share a forward pass, e.g.
        single-token answers to one question.
        """
        readers: dict[Tokens, list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"An answer has {len(continuation)} tokens; expected 1 to {self.max_length} (max_length). "
                    "Shorten the answers, remove empty ones, or raise max_length."
                )
            # Truncated on the left; the last token is only predicted.
            readers.setdefault(tuple((context + continuation)[-self.max_length - 1 : -1]), []).append(i)
        if not readers:
            return []
        order = sorted(readers, key=lambda tokens: (-len(tokens), tokens))
        rows = self._rows(len(order[0]))
        batches = [order[i : i + rows] for i in range(0, len(order), rows)]

        def read(batch: Sequence[Tokens]) -> list[list[tuple[float, bool]]]:
            return self._read(batch, [[requests[i][2] for i in readers[tokens]] for tokens in batch])

        answers: dict[int, tuple[float, bool]] = {}
        costs = [len(batch) * len(batch[0]) for batch in batches]
        for batch, batch_answers in zip(batches, self._shared(batches, costs, read), strict=True):
            for tokens, row in zip(batch, batch_answers, strict=True):
                answers |= dict(zip(readers[tokens], row, strict=True))
        return [answers[i] for i in range(len(requests))]

    @torch.no_grad()
    def _read(self, batch: Sequence[Tokens], wanted: Sequence[Sequence[list[int]]]) -> list[list[tuple[float, bool]]]:
        """Score a batch of token rows.

        Returns:
            For each row, one answer per wanted continuation; the row ends with the continuation minus its last token.
        """
        length = len(batch[0])
        tokens = torch.zeros((len(batch), length), dtype=torch.long)
        for row, words in enumerate(batch):
            tokens[row, : len(words)] = torch.tensor(words)
        longest = [max(map(len, w)) for w in wanted]
        # Logits over a whole vocabulary are large: compute none before the first continuation.
        keep = max(length - len(words) + n for words, n in zip(batch, longest, strict=True))
        logits = self._logits(tokens.to(self.device), keep)
        skipped = length - logits.shape[1]
        answers = []
        for row, (words, n, continuations) in enumerate(zip(batch, longest, wanted, strict=True)):
            end = len(words) - skipped
            answers.append(_likelihoods(logits[row, end - n : end], continuations))
        return answers

    def _logits(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        """Return logits [rows, positions, vocabulary] of tokens [rows, length].

        Positions are the last `keep`, or all for models without this option.
        """
        options = {"use_cache": False, "logits_to_keep": keep}
        logits = self.model(tokens, **{k: v for k, v in options.items() if k in self._takes}).logits
        return logits.full_tensor() if isinstance(logits, DTensor) else logits

    def _rows(self, length: int) -> int:
        """Return the batch size for a sequence length, equal on all ranks."""
        if self.batch_size_per_gpu != "auto":
            return self.batch_size_per_gpu

        words = [0] * min(length, self.max_length)

        @find_executable_batch_size(starting_batch_size=_LARGEST_BATCH)
        def largest(batch_size: int) -> int:
            self._read([tuple(words)] * batch_size, [[words]] * batch_size)
            return batch_size

        own: int = largest()  # pyright: ignore[reportCallIssue]
        return min(self._ranks.gather(own))

    def _shared(self, batches: Sequence[T], costs: Sequence[int], work: Callable[[T], Any]) -> list[Any]:
        """Apply `work` to all batches, shared evenly by cost.

        All ranks get all results.
        """
        shares = self._shares(costs)
        own = shares[self._ranks.rank]
        results = []
        with batch_progress([costs[i] for i in own], shown=self._ranks.rank == 0) as advance:
            for i in own:
                results.append(work(batches[i]))
                advance(costs[i])
        if self._in_step and len(results) < len(shares[0]):
            work(batches[0])  # joins the others' last forward pass
        every = self._ranks.gather(results)
        pairs = (pair for share, part in zip(shares, every, strict=True) for pair in zip(share, part, strict=True))
        answers = dict(pairs)
        return [answers[i] for i in range(len(batches))]

    def _shares(self, costs: Sequence[int]) -> list[list[int]]:
        """Assign batches to ranks: the next one to the least loaded rank."""
        size = self._ranks.size
        if self._in_step:  # ranks wait for each other in every batch, so similar lengths go together
            return [list(range(rank, len(costs), size)) for rank in range(size)]
        shares, loads = [list[int]() for _ in range(size)], [0] * size
        for i, cost in enumerate(costs):
            least = loads.index(min(loads))
            shares[least].append(i)
            loads[least] += cost
        return shares


def _likelihoods(logits: torch.Tensor, continuations: Sequence[list[int]]) -> list[tuple[float, bool]]:
    """Return (log-likelihood, greedy) of each continuation.

    Each one ends at the last position of the logits [positions, vocabulary].
    """
    positions = max(1, (_CPU_PIECE if logits.device.type == "cpu" else _GPU_PIECE) // logits.shape[1])
    totals, best = [], []
    for piece in logits.split(positions):
        exact = piece.float()
        totals.append(exact.logsumexp(-1))
        best.append(exact.argmax(-1))
    total, likeliest = torch.cat(totals), torch.cat(best)
    answers = []
    for continuation in continuations:
        n, words = len(continuation), torch.tensor(continuation, device=logits.device)
        likelihood = logits[-n:].gather(1, words[:, None])[:, 0].float() - total[-n:]
        answers.append((likelihood.sum().item(), bool((likeliest[-n:] == words).all())))
    return answers
