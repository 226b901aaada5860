"""One stage of merging, as a stream: each tensor is read once and written once per pass.

    pass 1, per tensor:  base.w, expert.w -> task_vector -> rule.update(old running.w) -> new running.w     + norms
    between:             norms -> rule.scale() -> one number
    pass 2, per tensor:  base.w + scale * running.w -> cast -> merged.w

Memory holds the tensors in flight and a few floats, whatever the size of the model and the number of experts before.
Arithmetic is float32, OPCM's projections float64; norms are summed in float64.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import MergeRule, Norms
from hf_contmerge.model_folder import check_same_layout, copy_companions, vocab_size
from hf_contmerge.tensor_files import Weights, WeightsWriter, config

LOG = logging.getLogger(__name__)

SHARD_SIZE = 5_000_000_000
_NOT_A_LINEAR_MAP = re.compile(
    r"(^|\.)(\w*embed\w*|wte|wpe|lm_head|shared|router|gate|\w*_router|\w*expert_gate)(\.|$)"
)


@dataclass(frozen=True)
class Merged:
    """What one stage of merging found: the norms over all experts so far, and the scale that they gave."""

    norms: Norms
    scale: float


def merge_stage(
    rule: MergeRule,
    *,
    base: Path,
    expert: Path,
    running: Path | None,
    earlier: Sequence[float],
    running_out: Path,
    merged_out: Path,
    dtype: torch.dtype | None = None,
    shard_size: int = SHARD_SIZE,
) -> Merged:
    """Fold one expert into a rule's state and write the merged model.

    Args:
        base: the pretrained model's folder, against which all task vectors are taken.
        expert: the folder of the model after this stage.
        running: the state that the stage before wrote; None in the first stage. It is read, never changed.
        earlier: the norms of the experts before, in stage order.
        running_out: an empty folder for the new state (float32).
        merged_out: an empty folder for the merged model, with the base's config and tokenizer.
        dtype: of the merged weights; the base's own by default.
        shard_size: bytes per file of weights.

    Raises:
        ModelError: names, shapes or vocabularies differ, a file is damaged, or a weight is not finite.
    """
    expert_norm, running_norm = fold_expert(
        rule, base=base, expert=expert, running=running, out=running_out, shard_size=shard_size
    )
    norms = Norms((*earlier, expert_norm), running_norm)
    scale = rule.scale(norms)
    if running_norm == 0:
        LOG.warning("%s does not differ from the base %s in any weight: the merged model is the base", expert, base)
    first = expert if running is None else None
    write_merged(base, running_out, scale, merged_out, dtype=dtype, expert=first, shard_size=shard_size)
    return Merged(norms, scale)


def fold_expert(
    rule: MergeRule, *, base: Path, expert: Path, running: Path | None, out: Path, shard_size: int = SHARD_SIZE
) -> tuple[float, float]:
    """Do pass 1: write the new running tensors into `out`; return (|task vector|, |running|) over the whole model."""
    check_same_layout(base, expert)
    base_weights, expert_weights = Weights(base), Weights(expert)
    old = Weights(running) if running else None
    vocabulary = vocab_size(base)
    _require_equal_buffers(base_weights, expert_weights)
    plan = [(n, base_weights.shape(n), torch.float32) for n in base_weights.floating()]
    expert_square = running_square = 0.0
    with WeightsWriter(out, plan, shard_size=shard_size) as writer:
        for name in writer.names:
            task_vector = expert_weights.tensor(name).float() - base_weights.tensor(name).float()
            _require_finite(task_vector, name, base_weights, expert_weights)
            before = old.tensor(name) if old else torch.zeros_like(task_vector)
            after = rule.update(before, task_vector, is_matrix=is_matrix(name, task_vector.shape, vocabulary))
            expert_square += _square(task_vector)
            running_square += _square(after)
            writer.write(name, after)
    return math.sqrt(expert_square), math.sqrt(running_square)


def write_merged(
    base: Path,
    running: Path,
    scale: float,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    expert: Path | None = None,
    shard_size: int = SHARD_SIZE,
) -> None:
    """Do pass 2: write base + scale * running as a model folder. `expert`: the only expert so far, if it is alone."""
    base_weights, state = Weights(base), Weights(running)
    only = Weights(expert) if expert and scale == 1.0 else None
    floating = set(base_weights.floating())
    out_dtypes = {n: (dtype if n in floating and dtype else base_weights.dtype(n)) for n in base_weights.names}
    plan = [(n, base_weights.shape(n), out_dtypes[n]) for n in base_weights.names]
    with WeightsWriter(out, plan, shard_size=shard_size) as writer:
        for name in writer.names:
            tensor = base_weights.tensor(name)
            if name in floating:
                whole = only.tensor(name) if only else None
                tensor = merged_tensor(tensor, state.tensor(name), scale, out_dtypes[name], expert=whole)
            writer.write(name, tensor)
    copy_companions(base, out, dtype=dtype)


def write_sum(base: Path, expert: Path, minus: Path, out: Path) -> None:
    """Write base + (expert - minus) in float32: the model whose task vector is the difference of two others.

    So an instruction vector (instruct - its base) becomes a stage like any other (arXiv 2310.04799, 2409.19854).
    """
    weights, plus, less = Weights(base), Weights(expert), Weights(minus)
    floating = set(weights.floating())
    plan = [(n, weights.shape(n), torch.float32 if n in floating else weights.dtype(n)) for n in weights.names]
    with WeightsWriter(out, plan) as writer:
        for name in writer.names:
            tensor = weights.tensor(name)
            if name in floating:
                tensor = tensor.float() + (plus.tensor(name).float() - less.tensor(name).float())
                _require_finite(tensor, name, weights, plus)
            writer.write(name, tensor)
    copy_companions(base, out, dtype=torch.float32)


def merged_tensor(
    base: Tensor, running: Tensor, scale: float, dtype: torch.dtype, *, expert: Tensor | None = None
) -> Tensor:
    """Return base + scale * running in float32, cast to dtype.

    With `expert`, the only one so far and taken whole (scale 1), its own values are returned where running is its task
    vector: base + (expert - base) may round to a neighbour.
    """
    wide = base.float()
    merged = torch.add(wide, running, alpha=scale)
    if expert is not None:
        whole = expert.float()
        merged = torch.where(running == whole - wide, whole, merged)
    return merged.to(dtype)


def is_matrix(name: str, shape: Sequence[int], vocabulary: int | None) -> bool:
    """Say whether a weight is a linear map, or a 3-D stack of them, which projection rules project.

    Vocabulary tables (embeddings, output heads; by name or by their size) and routers of expert mixtures are not.
    """
    if len(shape) not in (2, 3) or _NOT_A_LINEAR_MAP.search(name):
        return False
    return shape[0] != vocabulary


def base_dtype(base: Path) -> torch.dtype:
    """Return the dtype of most of a model's weights."""
    weights = Weights(base)
    counts: dict[torch.dtype, int] = {}
    for name in weights.floating():
        counts[weights.dtype(name)] = counts.get(weights.dtype(name), 0) + torch.Size(weights.shape(name)).numel()
    return max(counts, key=lambda d: counts[d])


def mergekit_yaml(
    rule_name: str, rule: MergeRule, *, base: Path, experts: Sequence[Path], dtype: torch.dtype | None
) -> str:
    """Return the recipe with which the stock `mergekit-yaml` makes the same merge from the experts."""
    parameters = rule.parameters()
    if rule_name == "task_arithmetic":  # mergekit's own method of that name weighs each model, with no default
        parameters["weight"] = 1.0
    recipe = {
        "merge_method": rule_name,
        "base_model": str(base),
        "models": [{"model": str(e)} for e in experts],
        **({"parameters": parameters} if parameters else {}),
        "dtype": "float32",
        "out_dtype": str(dtype or base_dtype(base)).removeprefix("torch."),
    }
    return yaml.safe_dump(recipe, sort_keys=False)


def check_mergeable(folder: Path) -> None:
    """Raise ModelError if a folder's weights are quantised. Reads headers only."""
    if "quantization_config" in config(folder):
        method = config(folder)["quantization_config"].get("quant_method", "quantised")
        raise ModelError(f"{folder} is quantised ({method}). Dequantise it and save it as bfloat16 before merging.")
    weights = Weights(folder)
    for name in weights.names:
        weights.dtype(name)


def _square(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2


def _require_finite(task_vector: Tensor, name: str, base: Weights, expert: Weights) -> None:
    if bool(torch.isfinite(task_vector).all()):
        return
    where = base if not bool(torch.isfinite(base.tensor(name)).all()) else expert
    bad = int((~torch.isfinite(where.tensor(name))).sum())
    raise ModelError(
        f"{name} in {where.folder} has {bad} values that are NaN or infinite. The training diverged or the file is "
        "damaged: lower learning_rate and train that stage again, or fetch the model again. Nothing was merged."
    )


def _require_equal_buffers(base: Weights, expert: Weights) -> None:
    for name in set(base.names) - set(base.floating()):
        if not torch.equal(base.tensor(name), expert.tensor(name)):
            raise ModelError(
                f"The integer tensor {name} differs between {base.folder} and {expert.folder}; only floating weights "
                "can be merged. Use experts whose buffers are the base's."
            )
