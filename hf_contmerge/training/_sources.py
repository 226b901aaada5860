"""The loss of each source of a mix, token by token."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

from hf_contmerge.train_strategies import SOURCE

LOSS = "loss_"
"""What the names of the losses begin with."""
_IGNORED = -100


class SourceLosses(Trainer):
    """Logs the mean loss of each source's tokens; for SFTTrainer.

    Every token that counts carries its source through truncation and packing. The numbers cover the steps since the
    last log, on all ranks, without the weights that strategies give to tokens.
    """

    sources: Sequence[str]
    """Their names; set by `with_sources`."""
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.sums: Tensor | None = None  # (source, [loss, tokens])
        super().__init__(*args, **kwargs)
        self.data_collator = _Collator(self.data_collator)

    def _prepare_dataset(self: Any, dataset: Any, tokenizer: Any, args: Any, *others: Any) -> Any:
        """Prepare examples as TRL does, with the sources of their tokens."""
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        prepare = super()._prepare_dataset  # pyright: ignore[reportAttributeAccessIssue]
        tokens = prepare(dataset, tokenizer, whole, False, *others[1:])
        number = {name: i for i, name in enumerate(self.sources)}

        def marked(example: Mapping[str, Any]) -> dict[str, Any]:
            source = number[example[SOURCE]]
            return {"labels": [label if label == _IGNORED else source for label in example["labels"]]}

        marks = tokens.map(marked).select_columns(["input_ids", "labels"])
        rows = prepare(tokens.remove_columns(SOURCE), tokenizer, args, *others)
        marks = prepare(marks, tokenizer, args, *others).select_columns("labels").rename_column("labels", SOURCE)
        return datasets.concatenate_datasets([rows, marks], axis=1)

    def _set_signature_columns_if_needed(self: Any) -> None:
        super()._set_signature_columns_if_needed()
        if SOURCE not in self._signature_columns:
            self._signature_columns.append(SOURCE)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        marks = inputs.pop(SOURCE)

        def watched(**inputs: Any) -> Any:
            output = model(**inputs)
            if inputs.get("fused_lm_head"):  # smoothed labels take logits first
                self._add(output, marks[:, 1:])
            return output

        called: Any = watched if self.model.training else model
        return super().compute_loss(called, inputs, *args, **kwargs)

    @torch.no_grad()
    def _add(self, output: Any, marks: Tensor) -> None:
        log_probs = getattr(output, "unweighted", output.log_probs)
        losses, counts = -log_probs.detach().double(), output.label_mask
        here = [(marks == i) & counts for i in range(len(self.sources))]
        sums = torch.stack([torch.stack([losses[of].sum(), of.sum().double()]) for of in here])
        self.sums = sums if self.sums is None else self.sums + sums

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.sums is not None and "loss" in logs:
            sums = self.accelerator.reduce(self.sums, "sum").tolist()
            means = {name: loss / count for name, (loss, count) in zip(self.sources, sums, strict=True) if count}
            logs.update({f"{LOSS}{name}": mean for name, mean in means.items()})
            self.sums = None
        super().log(logs, start_time)


class _Collator:
    """A trainer's collator, with the sources of the tokens."""

    def __init__(self, plain: Any) -> None:
        self._plain = plain

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        marks = [torch.tensor(example[SOURCE]) for example in examples]
        batch = self._plain([{k: v for k, v in example.items() if k != SOURCE} for example in examples])
        shape = batch["labels"].shape
        flat = torch.cat(marks)[None] if len(shape) and shape[0] < len(marks) else pad_sequence(marks, True, _IGNORED)
        batch[SOURCE] = torch.nn.functional.pad(flat, (0, shape[1] - flat.shape[1]), value=_IGNORED)
        return batch


def with_sources(plain: type, names: Sequence[str]) -> type:
    """Return TRL's trainer class with logs of these sources' losses."""
    return type(plain.__name__, (SourceLosses, plain), {"sources": tuple(names)})
