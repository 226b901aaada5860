"""Ollama's Modelfile: weights, chat template, ends of answers.

Ollama has a template language of its own. A chat template is translated if fixed texts stand between the turns; the
translation is compared with the template on a conversation. Others are left to Ollama, which knows some by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from hf_contmerge.models.config import chat_template
from hf_contmerge.models.loading import load_tokenizer

_SYSTEM, _ASKED, _ANSWERED, _NEXT, _LAST = (f"{chr(0xE000 + i)}Ab" for i in range(5))
"""Words that no template contains, in upper and lower case: a template may change it."""


@dataclass(frozen=True)
class Frames:
    """The fixed texts between the words of a conversation."""

    default: str
    """In front of the first question, if there is no system prompt."""
    system: tuple[str, str]
    """Before and after a system prompt."""
    question: str
    """Before a question."""
    answer: str
    """Between a question and its answer."""
    end: str
    """After an answer that is followed by a question."""

    def render(self, system: str, turns: list[str]) -> str:
        """Return a conversation that a question ends."""
        text = self.system[0] + system + self.system[1] if system else self.default
        for i, turn in enumerate(turns):
            text += self.answer + turn + self.end if i % 2 else self.question + turn
        return text + self.answer

    def ollama(self) -> str:
        """Return Ollama's template."""
        before, after = self.system
        system = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{self.default}{{{{ end }}}}"
        asked = f'{{{{ if eq .Role "user" }}}}{self.question}{{{{ .Content }}}}'
        told = f'{{{{ else if eq .Role "assistant" }}}}{self.answer}{{{{ .Content }}}}{self.end}{{{{ end }}}}'
        return f"{system}{{{{ range .Messages }}}}{asked}{told}{{{{ end }}}}{self.answer}"


def modelfile(model: Path, file: str) -> str:
    """Return the Modelfile of a GGUF file made from a model."""
    lines = [f"FROM ./{file}"]
    if not chat_template(model):
        return f"{lines[0]}\n# The model has no chat template: it completes texts.\nTEMPLATE {{{{ .Prompt }}}}\n"
    tokenizer = load_tokenizer(model)
    frames = find_frames(tokenizer)
    if frames and '"""' not in frames.ollama():
        lines.append(f'TEMPLATE """{frames.ollama()}"""')
    else:
        lines.append("# The chat template is in the GGUF file; it is too involved to be written in Ollama's language.")
    end = tokenizer.eos_token
    return "\n".join([*lines, *([f'PARAMETER stop "{end}"'] if end and '"' not in end else [])]) + "\n"


def find_frames(tokenizer: Any) -> Frames | None:
    """Return a chat template's frames; None for other templates."""
    try:
        frames = _frames(tokenizer)
        conversation = [_ASKED, _ANSWERED, _NEXT, _ANSWERED, _LAST]
        same = all(frames.render(s, conversation) == _rendered(tokenizer, s, conversation) for s in (_SYSTEM, ""))
    except Exception:  # a template is a program of others: it may raise anything, for instance at a system prompt
        return None
    return frames if same else None


def _frames(tokenizer: Any) -> Frames:
    """Return the texts between marks. Raises ValueError where one is missing."""
    before, rest = _cut(_rendered(tokenizer, _SYSTEM, [_ASKED, _ANSWERED, _NEXT]), _SYSTEM)
    after, rest = _cut(rest, _ASKED)
    answer, rest = _cut(rest, _ANSWERED)
    again, _ = _cut(rest, _NEXT)
    start, _ = _cut(_rendered(tokenizer, "", [_ASKED]), _ASKED)
    question = _common_end(_common_end(after, again), start)
    default, after, end = (text[: len(text) - len(question)] for text in (start, after, again))
    return Frames(default, (before, after), question, answer, end)


def _cut(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise ValueError(f"the template does not show {mark!r}")
    return before, after


def _common_end(one: str, other: str) -> str:
    """Return the longest text with which both end."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    size = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return one[len(one) - size :]


def _rendered(tokenizer: Any, system: str, turns: list[str]) -> str:
    """Return a conversation's text, without the BOS that the tokenizer adds."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if bos and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] else text
