"""Statistics of experts: moments of inputs, Fisher information, Adam's moments.

    inputs   X'X / n     X: a linear map's input for each of n tokens, uncentred (RegMean, arXiv 2212.09849)
    fisher   sum g^2 / n     g: the gradient of an example's log likelihood (Fisher merging, arXiv 2111.09832)
    adam     v           at the end of the training, which alone has it (OTA, arXiv 2509.11167)

The tokens are those of the stage's examples, prompts and answers alike. Examples of one length make a batch, so that
nothing is padding, in expert mixtures either. The expert is read from its folder, adapters merged into their base.
"""

from __future__ import annotations

import itertools
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from hf_contmerge.errors import DataError, ModelError, RecipeError
from hf_contmerge.merge_rules import MergeRule, inputs_shape
from hf_contmerge.models.config import is_matrix
from hf_contmerge.models.experts import expert_sha256
from hf_contmerge.models.loading import load_model, load_tokenizer
from hf_contmerge.models.lora.matching import StoredNames
from hf_contmerge.models.memory import Part, in_memory, whole_place
from hf_contmerge.models.statistics import FOLDER, write_statistics
from hf_contmerge.models.tokenizer import tokenizer_folder
from hf_contmerge.models.weights import Weights
from hf_contmerge.run.recipe.parts import StatisticsSettings
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.runtime.device import bf16_pays
from hf_contmerge.train_strategies.full import Full
from hf_contmerge.training.data import StageData, documents, require_chat_template
from hf_contmerge.training.job import rows_sha256
from hf_contmerge.training.settings import make_strategies, positions_of

LOG = logging.getLogger(__name__)

_ONE_OF_MANY = re.compile(r"experts?\.\d+\.")
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

    Returns:
        The statistics of the last kind; those of Adam are not measured here.

    Raises:
        ModelError: no weight of the model has such statistics.
        DataError: no example has a token to predict.
    """
    ranks, base, settings = PartialState(), Weights(of.base), of.settings
    rows = of.data.train.select(range(min(settings.examples, len(of.data.train))))
    batches, found = _batches(tokenized(of, rows), settings.batch_size), Inputs({}, 0)
    if "fisher" in settings.kinds and not any(batch.shape[1] > 1 for batch in batches):
        raise DataError(
            f"None of the {len(rows)} examples has two tokens within max_length ({settings.max_length}): there is "
            "nothing to predict, so no Fisher information. Give longer examples."
        )
    mine = batches[ranks.process_index :: ranks.num_processes]
    for kind in (kind for kind in settings.kinds if kind != "adam"):
        exact = kind == "fisher" or not bf16_pays(base.numel())  # squares of gradients need float32
        dtype = torch.float32 if exact else torch.bfloat16
        model = load_model(of.expert, of.base, dtype=dtype, trust_remote_code=of.trust_remote_code).to(ranks.device)
        found = (collect_inputs if kind == "inputs" else collect_fisher)(model, mine, base)
        if ranks.is_main_process:
            about = {
                "examples": len(rows), "tokens": found.tokens, "max_length": settings.max_length,
                "data_sha256": rows_sha256(rows),
            }  # fmt: skip
            write_statistics(
                out or of.expert / FOLDER, kind, found.moments, about, expert_sha256=expert_sha256(of.expert)
            )
        ranks.wait_for_everyone()
    return found


def collect_fisher(model: Any, batches: Iterable[Tensor], base: Weights) -> Inputs:
    """Return the empirical Fisher information's diagonal over all ranks.

    Each example's log likelihood has its own backward pass: its gradient is squared, and the sum divided by all tokens.
    The likelihood comes from the logits, because a mixture's loss may have that of its router in it.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    tokens = torch.zeros((), dtype=torch.int64, device=model.device)
    for example in (row for batch in batches for row in batch if len(row) > 1):
        ids = example[None].to(model.device)
        logits = model.eval()(input_ids=ids, use_cache=False).logits[0, :-1].float()
        likelihood = -F.cross_entropy(logits, ids[0, 1:], reduction="sum")
        gradients = torch.autograd.grad(likelihood, list(weights.values()), materialize_grads=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total.addcmul_(gradient, gradient)
        tokens += ids.numel() - 1
    means, count = _averaged(sums, tokens)
    return Inputs(_as_stored(model, {weights[name]: mean for name, mean in means.items()}, base), count)


def second_moments(trainer: Any) -> dict[Tensor, Tensor]:
    """Return Adam's second moment of each weight after a step.

    Raises:
        RecipeError: the optimizer has none, or only some (Adafactor's are of vectors).
    """
    state = getattr(trainer.optimizer, "optimizer", trainer.optimizer).state
    found = {weight: moments["exp_avg_sq"] for weight, moments in state.items() if "exp_avg_sq" in moments}
    if not found or len(found) < len(state):
        raise RecipeError(
            f"train.statistics: the optimizer {trainer.args.optim.value} has no second moments of all weights. Use "
            "`optim: adamw_torch`, or leave `adam` out."
        )
    return found


def write_adam(trainer: Any, model: nn.Module, expert: Path, base: Weights) -> None:
    """Write Adam's second moments next to the expert; all ranks call.

    Raises:
        RecipeError: the optimizer has none.
    """
    found = {weight: _whole(moment).float().cpu() for weight, moment in second_moments(trainer).items()}
    moments = _as_stored(model, found, base)
    if PartialState().is_main_process:
        about = {"steps": trainer.state.global_step}
        write_statistics(expert / FOLDER, "adam", moments, about, expert_sha256=expert_sha256(expert))
    PartialState().wait_for_everyone()


def _whole(tensor: Any) -> Tensor:
    """Return a tensor in one piece, also where FSDP2 shares it out."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _as_stored(model: nn.Module, values: Mapping[Tensor, Tensor], base: Weights) -> dict[str, Tensor]:
    """Return stored name -> values of a weight, from those in memory.

    transformers stacks the experts of mixtures and splits fused maps. Warns of trained weights without values.
    """
    parts_of, wanted = _parts(base), set(base.floating())
    found, filled = dict[str, Tensor](), Counter[str]()
    for name, weight in model.named_parameters(remove_duplicate=False):
        for part in parts_of(name, tuple(weight.shape)):
            if not weight.requires_grad:
                wanted.discard(part.stored)
            elif weight in values and part.stored in wanted:
                piece, shape = values[weight][part.place], base.shape(part.stored)
                whole = found.setdefault(part.stored, piece.new_empty(shape))
                whole[part.source] = piece.mT if part.swapped else piece
                filled[part.stored] += piece.numel()
    complete = {name: whole for name, whole in found.items() if filled[name] == whole.numel()}
    _warn_of(wanted - complete.keys(), base, "have another form")
    return complete


def _parts(base: Weights) -> Callable[[str, tuple[int, ...]], tuple[Part, ...]]:
    """Return a function: name and shape in memory -> its stored parts."""
    held, names = in_memory(base).held, StoredNames(base)

    def parts(name: str, shape: tuple[int, ...]) -> tuple[Part, ...]:
        if name in held:
            return held[name].parts if held[name].shape == shape else ()
        stored = names.find(name)
        here = whole_place(shape)
        return (Part(stored, here, here),) if stored and base.shape(stored) == shape else ()

    return parts


def _warn_of(without: Set[str], base: Weights, why: str) -> None:
    """Warn of weights without statistics; `why`: what they do in memory."""
    if without:
        LOG.warning(
            "%s and %d more weights of %s get no statistics: in memory they %s. Rules fold them without.",
            min(without), len(without) - 1, base.folder, why,
        )  # fmt: skip


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
    with torch.no_grad(), _Watching(maps, sums) as calls:
        for batch in batches:
            model.eval().base_model(input_ids=batch.to(model.device), use_cache=False)
            tokens += batch.numel()
    # One of many experts may have had no tokens, which is a moment of 0. Any other map that was not called is used by
    # its weight alone, as Mamba's dt_proj is.
    heard = _over_ranks(torch.tensor([calls[name] for name in maps], device=model.device)).tolist()
    unheard = {name for name, count in zip(maps, heard, strict=True) if not count and not _ONE_OF_MANY.search(name)}
    _warn_of(unheard, base, "are used without a call of their torch.nn.Linear")
    return _averaged({name: total for name, total in sums.items() if name not in unheard}, tokens)


def _averaged(sums: Mapping[str, Tensor], tokens: Tensor) -> Inputs:
    """Return sums over all ranks, divided by their tokens."""
    for tensor in (*sums.values(), tokens):
        _over_ranks(tensor)
    return Inputs({name: total.div_(tokens.clamp(min=1)) for name, total in sums.items()}, int(tokens))


def _over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


class _Watching:
    """Sums the inputs of linear maps while entered."""

    def __init__(self, maps: Mapping[str, nn.Linear], sums: Mapping[str, Tensor]) -> None:
        self._maps, self._sums = maps, sums
        self._latest: tuple[Tensor, Tensor] | None = None
        self._calls = Counter[str]()

    def __enter__(self) -> Counter[str]:
        """Return weight -> number of calls, which grows."""
        self._hooks = [m.register_forward_pre_hook(partial(self._add, name)) for name, m in self._maps.items()]
        return self._calls

    def __exit__(self, *_: object) -> None:
        self._latest = None
        for hook in self._hooks:
            hook.remove()

    def _add(self, name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._latest is None or self._latest[0] is not args[0]:  # q, k and v read the same tensor
            self._latest = (args[0], _moment(args[0]))
        self._sums[name].add_(self._latest[1])
        self._calls[name] += 1


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
    if not maps:
        raise ModelError(
            f"{base.folder} has no linear map whose inputs can be watched: in memory, none of its weights belongs to a "
            "torch.nn.Linear. Use a merge rule that needs no statistics."
        )
    _warn_of(wanted - maps.keys(), base, "belong to no torch.nn.Linear")
    return maps


def tokenized(of: Measured, rows: Any) -> list[list[int]]:
    """Return the tokens of examples, cut at `max_length` and where positions end."""
    tokenizer = load_tokenizer(tokenizer_folder(of.base, of.expert), trust_remote_code=of.trust_remote_code)
    longest = min(of.settings.max_length, tokenizer.model_max_length, positions_of(of.base) or sys.maxsize)

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
    """Raise RecipeError for rules without their statistics in `train`.

    Also for Adam's statistics of adapters and of osf's factors.

    `rules`: by their places in the recipe, such as "merge entry strong".
    """
    asked = train.statistics.kinds if train.statistics else ()
    for place, rule in rules.items():
        for kind in rule.needs:
            if kind not in asked:
                raise RecipeError(
                    f"{place} needs the statistics {kind!r} of each expert. Add `statistics: [{kind}]` to "
                    "`train`, so that training writes them."
                )
    strategies = make_strategies(train)
    if "adam" in asked and not isinstance(strategies.carrier, Full):
        raise RecipeError(
            "train.statistics: `adam` needs an optimizer of whole weights, and the strategy "
            f"{type(strategies.carrier).__name__.lower()} trains others. Use `strategy: full`, or `fisher`."
        )
