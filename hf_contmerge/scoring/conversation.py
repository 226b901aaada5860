"""A conversation with a model, by its template and generation settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import TextStreamer

from hf_contmerge.models.config import foreign_errors
from hf_contmerge.models.layout import check_loads, check_tokenizer
from hf_contmerge.models.loading import load_model, load_tokenizer
from hf_contmerge.models.tokenizer import tokenizer_folder
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.device import bf16_pays, cpu_only
from hf_contmerge.scoring.cache import ScoreCache
from hf_contmerge.scoring.locate import fetched_folders

Turn = dict[str, str]
Show = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled."""

    max_new_tokens: int = 512
    temperature: float | None = None
    """None: as the model's generation config has it; 0: the most likely token."""

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `generate`."""
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if self.temperature == 0:
            return how | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return how if self.temperature is None else how | {"do_sample": True, "temperature": self.temperature}


@dataclass
class Conversation:
    """A loaded model and its turns; without a template, one prompt."""

    model: Any
    tokenizer: Any
    sampling: Sampling = Sampling()
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    @classmethod
    def open(
        cls, name: str, sampling: Sampling, *, system: str | None = None, trust_remote_code: bool = False
    ) -> Conversation:
        """Load a model or an adapter by its name. Raises as `resolve_model`."""
        found = fetched_folders(name, None, ScoreCache.open(use=True).store)
        check_tokenizer(found.whole)
        check_loads(found.whole, trusted=trust_remote_code)
        tokenizer = load_tokenizer(tokenizer_folder(found.whole, found.folder), trust_remote_code=trust_remote_code)
        dtype = torch.bfloat16 if bf16_pays(Weights(found.whole).numel()) else torch.float32
        model = load_model(found.folder, found.whole, dtype=dtype, trust_remote_code=trust_remote_code)
        return cls(model.to(PartialState(cpu=cpu_only()).device).eval(), tokenizer, sampling, system)

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def clear(self) -> None:
        """Forget the turns."""
        self.turns.clear()

    def answer(self, prompt: str, show: Show) -> str:
        """Generate the answer to a prompt, and keep both as turns.

        Args:
            prompt: the user's words.
            show: gets the answer piece by piece. An interrupt in it ends the answer, and the turn is not kept.

        Raises:
            ModelError: the chat template fails.
        """
        asked = [*self.turns, {"role": "user", "content": prompt}]
        pieces: list[str] = []

        def shown(text: str) -> None:
            pieces.append(text)
            show(text)

        self._generate(self._fitting(asked), shown)
        text = "".join(pieces).strip()
        self.turns = [*asked, {"role": "assistant", "content": text}] if self.has_template else []
        return text

    def _fitting(self, turns: Sequence[Turn]) -> Any:
        """Return the prompt's tokens, without the oldest turns if too long."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        while True:
            encoded = self._encoded(turns)
            if encoded["input_ids"].shape[1] + self.sampling.max_new_tokens <= limit or len(turns) < 3:
                return encoded
            turns = turns[2:]

    def _encoded(self, turns: Sequence[Turn]) -> Any:
        if not self.has_template:
            return self.tokenizer(turns[-1]["content"], return_tensors="pt", return_token_type_ids=False)
        system = [{"role": "system", "content": self.system}] if self.system else []
        with foreign_errors(Path(self.tokenizer.name_or_path), "The chat template"):
            return self.tokenizer.apply_chat_template(
                [*system, *turns], add_generation_prompt=True, return_tensors="pt", return_dict=True
            )

    @torch.no_grad()
    def _generate(self, encoded: Any, show: Show) -> None:
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        self.model.generate(
            **encoded.to(self.model.device), **self.sampling.settings(), pad_token_id=pad,
            streamer=_Pieces(self.tokenizer, show),
        )  # fmt: skip


class _Pieces(TextStreamer):
    """Hands the generated text to a function, as words become complete."""

    def __init__(self, tokenizer: Any, show: Show) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        if text:
            self._show(text)
