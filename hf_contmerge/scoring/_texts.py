"""Tokens of scored texts: begun once, as in training.

Training shows a document with the tokens that the tokenizer puts in front of it, such as one BOS, and ends it with EOS.
Scores are likelihoods of the text after that beginning. lm-eval puts a BOS in front of the tokenizer's own and counts
the second one, and an EOS added by the tokenizer, as tokens of the text.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from hf_contmerge.errors import ModelError

if TYPE_CHECKING:
    from hf_contmerge.scoring.in_context import InContext

_SAMPLE = "a"
_Parent: Any = object  # lm-eval's model class comes next to this one


class TextTokens(_Parent):
    """Encodes texts for an lm-eval model; the first parent of its class."""

    unused: int = 0
    """Positions that rolling windows leave free."""
    shown: InContext | None = None
    """Examples in front of the questions, not scored."""

    @functools.cached_property
    def beginning(self) -> list[int]:
        """Tokens put in front of a text by the tokenizer."""
        whole, plain = (self.tokenizer.encode(_SAMPLE, add_special_tokens=special) for special in (True, False))
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[: next(starts, 0)]

    def tok_encode(
        self, string: Any, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> Any:
        """Return the tokens of a text, or of each text.

        Args:
            string: the text or texts.
            add_special_tokens: False leaves the beginning out.
            left_truncate_len: number of last tokens to keep; None for all.
        """
        if not isinstance(string, str):
            return [self.tok_encode(text, add_special_tokens, left_truncate_len) for text in string]
        tokens, begin = self.tokenizer.encode(string, add_special_tokens=False), self.beginning
        if add_special_tokens is not False and tokens[: len(begin)] != begin:
            tokens = begin + tokens
        return tokens[-(left_truncate_len or 0) :]

    def tok_batch_encode(
        self, strings: Sequence[str], padding_side: Any = "left", left_truncate_len: int | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return padded tokens of prompts, and their mask."""
        rows = [torch.tensor(self.tok_encode(text, None, left_truncate_len), dtype=torch.long) for text in strings]
        tokens, mask = (
            pad_sequence(values, batch_first=True, padding_side=padding_side)
            for values in (rows, [torch.ones_like(row) for row in rows])
        )
        return tokens, mask

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002
        """Return (log-likelihood in nats, is greedy) of each continuation."""
        pairs = [(r.args, *self._pair(*r.args)) for r in self.with_examples(requests)]
        return self._loglikelihood_tokens(pairs, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Return each text's log-likelihood in nats.

        It is summed over the text's windows; the windows of all texts are sorted together.
        """
        windows, owners = [], []
        for i, request in enumerate(requests):
            for context, continuation in self._windows_after(request) if self.shown else self._windows(request.args[0]):
                windows.append((None, context, continuation))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (likelihood, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=True), strict=True):
            sums[i] += likelihood
        return sums

    def with_examples(self, requests: Sequence[Any]) -> Sequence[Any]:
        """Return requests with the examples in front of their prompts."""
        return [self._with_examples(request, self.shown) for request in requests] if self.shown else requests

    def _with_examples(self, request: Any, shown: InContext) -> Any:
        prompt, answer = request.args[:2]
        prompt = shown.before(request) + prompt.removeprefix(self.tokenizer.bos_token or "")
        generates = isinstance(answer, dict)
        after = answer.get("max_gen_toks", self.max_gen_toks) if generates else len(self.tok_encode(answer, False)) - 1
        if len(self.tok_encode(prompt)) + after > self.max_length:
            shown.count_cut(request)
        return replace(request, arguments=(prompt, *request.args[1:]))

    def _windows_after(self, request: Any) -> Iterator[tuple[list[int], list[int]]]:
        """Yield windows as `_windows` does, each behind the text's examples.

        Examples of more than half a window lose their beginning where a text needs the room.
        """
        assert self.shown
        begin, tokens = self._begun(request.args[0])
        examples = self.tok_encode(self.shown.before(request), False)
        room = self.max_length + 1 - self.unused - len(begin)
        kept = max((room - 1) // 2, room - len(tokens), 0)
        if kept < len(examples):
            self.shown.count_cut(request)
            examples = examples[len(examples) - kept :]
        start = 0
        while start < len(tokens):
            context = [*begin, *examples, *tokens[max(0, start - 1) : start]]
            end = start + max(1, room + len(begin) - len(context))
            yield context, tokens[start:end]
            start = end

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context.strip():
            return self._encode_pair(context, continuation)
        return self._begun(context + continuation)

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (context, continuation) windows; continuations share no token.

        The first window starts with the beginning. The next ones start inside the text, as blocks of packed texts do.
        """
        begin, tokens = self._begun(text)
        if not tokens:
            return
        extra = len(begin) - 1  # lm-eval knows a prefix of one token
        rolling = get_rolling_token_windows(
            [*begin[1:], *tokens], begin[0], max_seq_len=self.max_length - self.unused, context_len=1
        )
        for context, continuation in map(make_disjoint_window, rolling):
            yield context + continuation[:extra], continuation[extra:]
            extra = 0

    def _begun(self, text: str) -> tuple[list[int], list[int]]:
        """Return a text's beginning and tokens.

        A tokenizer without a beginning predicts the first token from BOS, or from EOS without a BOS, as lm-eval does. A
        beginning written in the text, by a chat template, is not repeated.

        Raises:
            ModelError: the tokenizer has none of these tokens.
        """
        begin = self.beginning or [self.prefix_token_id]
        if begin == [None]:
            raise ModelError(
                f"The tokenizer of {self.tokenizer.name_or_path} has no BOS and no EOS token; the first token of a "
                "text is predicted from one of them. Add one to its tokenizer_config.json."
            )
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        return begin, tokens[len(begin) :] if tokens[: len(begin)] == begin else tokens
