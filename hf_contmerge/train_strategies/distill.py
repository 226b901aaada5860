"""Distill: stay near the predictions of earlier models.

Li and Hoiem, "Learning without Forgetting", ECCV 2016, arXiv 1606.09282; the factor T^2, which keeps the gradient's
size, as in Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531. Two teachers,
the pretrained model and the previous one: MulKI, "Multi-Stage Knowledge Integration of Vision-Language Models".
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_contmerge.models.loading import load_model, plain_model, runs_own_code
from hf_contmerge.train_strategies import Inputs, TrainStrategy

Teacher = Literal["start", "base", "both"]

_LOGITS = 2**25  # in one chunk: 128 MiB in float32
_BEYOND_THE_HEAD = (
    "final_logit_softcapping", "logit_scale", "logit_softcap", "logits_scaling", "logits_soft_cap",
    "lm_head_multiplier", "output_logit_soft_cap", "output_multiplier", "softcap",
)  # fmt: skip
"""Fields of transformers' configurations that change logits; 1 or nothing leaves them."""


@dataclass
class Distill(TrainStrategy):
    """loss + strength * T^2 * KL(teacher || student), mean over the tokens that count; logits are divided by T first.

    The teacher is the model as the stage starts (the previous expert; in the first stage, the base itself), the base,
    or both, with the mean of their divergences. It reads the stage's own examples, so that no earlier ones are needed.
    The last hidden states of the student are caught on their way to the loss; logits exist only for the tokens that
    count, a chunk at a time.
    """

    bytes_per_parameter = 4  # a teacher's own weights; with adapters the start shares the frozen ones
    sharded = False  # a teacher is whole on each rank
    texts_only = True
    opens_on_meta = True

    strength: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    teacher: Teacher = "start"
    _teachers: list[Any] = field(default_factory=list, init=False, repr=False)
    _hidden: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.teacher == "both":
            self.bytes_per_parameter = 8  # pyright: ignore[reportAttributeAccessIssue]

    def open(self, model: PreTrainedModel, memory: Path | None) -> Any:
        _refuse_known_scales(model)
        if model.device.type == "meta":  # tried before a run, with nothing to predict
            return model
        self._teachers = [teacher.eval().requires_grad_(False) for teacher in self._made(model)]
        _require_plain_head(self._teachers[0])
        plain_model(model).base_model.register_forward_hook(self._catch)
        return model

    def _made(self, model: PreTrainedModel) -> Iterator[Any]:
        """Yield the teachers, in the model's dtype."""
        if self.teacher != "base":
            shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
            yield plain_model(copy.deepcopy(model, shared))
        if self.teacher != "start":
            assert self.base
            yield load_model(self.base, self.base, dtype=model.dtype, trust_remote_code=runs_own_code(model))

    def loss(self, model: nn.Module, inputs: Inputs) -> Tensor | None:
        assert self._hidden is not None
        counts = inputs["labels"][:, 1:] != -100
        learnt, self._hidden = self._hidden[:, :-1][counts], None
        taught = [self._taught(teacher.to(counts.device), inputs, counts) for teacher in self._teachers]
        head = plain_model(model).get_output_embeddings()
        size = max(1, _LOGITS // self._teachers[0].config.get_text_config().vocab_size)
        gaps = [
            checkpoint(self._gap, head, *parts, use_reentrant=False, preserve_rng_state=False)
            for parts in zip(learnt.split(size), *(hidden.split(size) for hidden in taught), strict=True)
        ]
        return self.strength * torch.stack(gaps).sum()

    @torch.no_grad()
    def _taught(self, teacher: Any, inputs: Inputs, counts: Tensor) -> Tensor:
        """Return a teacher's last hidden states (token, width)."""
        output = teacher.base_model(**{k: v for k, v in inputs.items() if k != "labels"})
        return output.last_hidden_state[:, :-1][counts]

    def _gap(self, head: nn.Module, learnt: Tensor, *taught: Tensor) -> Tensor:
        """Return T^2 * KL summed over tokens, averaged over teachers."""
        found = F.log_softmax(head(learnt).float() / self.temperature, -1)
        gaps = []
        for teacher, hidden in zip(self._teachers, taught, strict=True):
            with torch.no_grad():
                wanted = F.log_softmax(teacher.get_output_embeddings()(hidden).float() / self.temperature, -1)
            gaps.append(F.kl_div(found, wanted, reduction="sum", log_target=True))
        return self.temperature**2 * sum(gaps[1:], gaps[0]) / len(gaps)

    def _catch(self, _: nn.Module, __: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._hidden = output.last_hidden_state


def _refuse_known_scales(model: Any) -> None:
    """Raise ValueError for a configuration that caps or scales logits."""
    text = model.config.get_text_config()
    if any(getattr(text, field, None) not in (None, 0, 1) for field in _BEYOND_THE_HEAD):
        raise _cannot_work(model)


def _require_plain_head(model: Any) -> None:
    """Raise ValueError for logits beyond the head's output (caps, scales)."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        found = model.get_output_embeddings()(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(logits, found, rtol=1e-3, atol=1e-3 * float(logits.abs().max())):
        raise _cannot_work(model)


def _cannot_work(model: Any) -> ValueError:
    return ValueError(f"distill cannot work with {type(model).__name__}, which caps or scales its logits")
