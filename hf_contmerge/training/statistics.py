"""Statistics of experts: second moments of the linear maps' inputs.

    X'X / n     X: a linear map's input for each of n tokens, uncentred (RegMean, arXiv 2212.09849)

The tokens are those of the stage's examples, prompts and answers alike. Examples of one length make a batch, so that
nothing is padding, in expert mixtures either. The expert is read from its folder, adapters merged into their base.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merge_rules import MergeRule, inputs_shape
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.loading import load_model, load_tokenizer
from hf_contmerge.models.lora.matching import StoredNames
from hf_contmerge.models.statistics import FOLDER, write_statistics
from hf_contmerge.models.tokenizer import tokenizer_folder
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import StatisticsSettings
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.device import bf16_pays
from hf_contmerge.training.data import StageData, documents, require_chat_template
from hf_contmerge.training.job import rows_sha256

LOG = logging.getLogger(__name__)

_CHARS = 32  # per token at most, before an example is tokenized


class Inputs(NamedTuple):
    """Second moments by weight, and the number of tokens."""

    moments: dict[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class Measured:
    """An expert to measure."""

    expert: Path
    base: Path
    data: StageData
    settings: StatisticsSettings
    trust_remote_code: bool = False


def measure_expert(of: Measured, out: Path | None = None) -> Inputs:
    """Write an expert's statistics to `out`; all ranks call this.

    Raises:
        ModelError: no weight of the model has such statistics.
    """
    ranks, base, settings = PartialState(), Weights(of.base), of.settings
    rows = of.data.train.select(range(min(settings.examples, len(of.data.train))))
    batches = _batches(_tokenized(of, rows), settings.batch_size)
    dtype = torch.bfloat16 if bf16_pays(base.numel()) else torch.float32
    model = load_model(of.expert, of.base, dtype=dtype, trust_remote_code=of.trust_remote_code)
    mine = batches[ranks.process_index :: ranks.num_processes]
    found = collect_inputs(model.to(ranks.device), mine, base)
    if ranks.is_main_process:
        about = {
            "examples": len(rows), "tokens": found.tokens, "max_length": settings.max_length,
            "data_sha256": rows_sha256(rows),
        }  # fmt: skip
        write_statistics(
            out or of.expert / FOLDER, "inputs", found.moments, about, expert_sha256=expert_sha256(of.expert)
        )
    ranks.wait_for_everyone()
    return found


def collect_inputs(model: Any, batches: Iterable[Tensor], base: Weights) -> Inputs:
    """Run a model; return its inputs' second moments over all ranks.

    Args:
        model: of the base's architecture, in its plain form.
        batches: input_ids (sequences, tokens), without padding.
        base: by whose names the moments go.
    """
    maps = _linear_maps(model, base)
    sums = {name: torch.zeros(inputs_shape(m.in_features), device=m.weight.device) for name, m in maps.items()}
    tokens = torch.zeros((), dtype=torch.int64, device=model.device)
    with torch.no_grad(), _Watching(maps, sums):
        for batch in batches:
            model.eval().base_model(input_ids=batch.to(model.device), use_cache=False)
            tokens += batch.numel()
    if dist.is_available() and dist.is_initialized():
        for tensor in (*sums.values(), tokens):
            dist.all_reduce(tensor)
    return Inputs({name: total.div_(tokens.clamp(min=1)) for name, total in sums.items()}, int(tokens))


class _Watching:
    """Sums the inputs of linear maps while entered."""

    def __init__(self, maps: Mapping[str, nn.Linear], sums: Mapping[str, Tensor]) -> None:
        self._maps, self._sums = maps, sums
        self._latest: tuple[Tensor, Tensor] | None = None

    def __enter__(self) -> None:
        self._hooks = [m.register_forward_pre_hook(partial(self._add, name)) for name, m in self._maps.items()]

    def __exit__(self, *_: object) -> None:
        self._latest = None
        for hook in self._hooks:
            hook.remove()

    def _add(self, name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._latest is None or self._latest[0] is not args[0]:  # q, k and v read the same tensor
            self._latest = (args[0], _moment(args[0]))
        self._sums[name].add_(self._latest[1])


def _moment(inputs: Tensor) -> Tensor:
    """Return X'X, or its diagonal for wide maps."""
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows.T @ rows if len(inputs_shape(rows.shape[1])) == 2 else rows.square().sum(0)


def _linear_maps(model: nn.Module, base: Weights) -> dict[str, nn.Linear]:
    """Return stored name -> module of the mergeable linear maps.

    Raises ModelError if there are none.
    """
    names, wanted = StoredNames(base), {n for n in base.floating() if is_matrix(n, base.shape(n), base.vocabulary)}
    linear = ((f"{path}.weight", module) for path, module in model.named_modules() if isinstance(module, nn.Linear))
    maps = {stored: module for name, module in linear if (stored := names.find(name)) in wanted and stored}
    without = sorted(wanted - maps.keys())
    if not maps:
        raise ModelError(
            f"{base.folder} has no linear map whose inputs can be watched: in memory, none of its weights belongs to a "
            "torch.nn.Linear. Use a merge rule that needs no statistics."
        )
    if without:
        LOG.warning(
            "%s and %d more weights of %s get no statistics: in memory they belong to no torch.nn.Linear. Rules fold "
            "them without.", without[0], len(without) - 1, base.folder,
        )  # fmt: skip
    return maps


def _tokenized(of: Measured, rows: Any) -> list[list[int]]:
    tokenizer = load_tokenizer(tokenizer_folder(of.base, of.expert), trust_remote_code=of.trust_remote_code)
    longest = min(of.settings.max_length, tokenizer.model_max_length)

    def render(messages: list[dict[str, Any]], **arguments: Any) -> str:
        require_chat_template(tokenizer)
        return tokenizer.apply_chat_template(messages, tokenize=False, **arguments)

    texts = documents(rows, of.data.form, chars=_CHARS * longest, render=render)
    bos = tokenizer.bos_token or "\0"  # a chat template may have put it there
    return [
        tokenizer(text, add_special_tokens=not text.startswith(bos), truncation=True, max_length=longest)["input_ids"]
        for text in texts
    ]


def _batches(sequences: Sequence[list[int]], size: int) -> list[Tensor]:
    """Return batches of sequences of one length."""
    by_length = sorted((s for s in sequences if s), key=len)
    return [
        torch.tensor(alike[start : start + size])
        for _, group in itertools.groupby(by_length, key=len)
        for alike in [list(group)]
        for start in range(0, len(alike), size)
    ]


def check_asked(rules: Mapping[str, MergeRule], train: Train) -> None:
    """Raise RecipeError for a merge entry without its statistics in `train`.

    `rules`: of the merge entries, by name.
    """
    asked = train.statistics.kinds if train.statistics else ()
    for entry, rule in rules.items():
        for kind in rule.needs:
            if kind not in asked:
                raise RecipeError(
                    f"merge entry {entry} needs the statistics {kind!r} of each expert. Add `statistics: [{kind}]` to "
                    "`train`, so that training writes them."
                )
