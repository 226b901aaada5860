"""BM25: ranks texts by the words that they share with a question.

Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", with the usual k1 and b.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

_K1, _B = 1.2, 0.75
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
"""A word, or one sign of a script without spaces."""


class Bm25:
    """Texts, indexed by their words.

    score(question, text) = sum over the question's words w of
        idf(w) * f * (k1 + 1) / (f + k1 * (1 - b + b * length / mean length)),   f: how often w is in the text,
        idf(w) = ln(1 + (N - n + 0.5) / (n + 0.5)),                              n: how many of N texts have w
    """

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(_words(text)) for text in texts]
        lengths = np.array([sum(words.values()) for words in counts], dtype=np.float64)
        self._floor = _K1 * (1 - _B + _B * lengths / max(lengths.mean(), 1.0))
        places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for place, words in enumerate(counts):
            for word, count in words.items():
                places[word].append((place, count))
        self._places = {word: np.array(of).T for word, of in places.items()}

    def scores(self, question: str) -> np.ndarray:
        """Return each text's score."""
        scores = np.zeros(len(self._floor))
        for word, times in sorted(Counter(_words(question)).items()):  # sums do not depend on the order of words
            if word in self._places:
                texts, count = self._places[word]
                idf = math.log(1 + (len(scores) - len(texts) + 0.5) / (len(texts) + 0.5))
                scores[texts] += times * idf * count * (_K1 + 1) / (count + self._floor[texts])
        return scores

    def ranked(self, question: str) -> np.ndarray:
        """Return the texts' places, the best first; equal scores in order."""
        return np.argsort(-self.scores(question), kind="stable")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
