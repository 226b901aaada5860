"""Export of a merge as one peft adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging._factored import Factored
from hf_contmerge.merging._log import Log
from hf_contmerge.merging._pieces import Stored, factor_of, merged_piece, read_out
from hf_contmerge.merging.costs import weight_of
from hf_contmerge.merging.lineage import finished_lineage, write_lineage
from hf_contmerge.merging.running import Running
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.config import optional_json
from hf_contmerge.models.lora.matching import tied_table
from hf_contmerge.models.lora.writer import Factors, write_adapter
from hf_contmerge.models.memory import in_memory
from hf_contmerge.models.survival import Kept, Survival
from hf_contmerge.models.weights import Weights
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import new_folder
from hf_contmerge.runtime.ranks import OneRank

_ERRORS = "reconstruction.json"
_ROUNDING = "stochastic"  # peft loads the whole tensors of an adapter in the base's dtype


def export_adapter(
    state: MergeState, out: str | Path, *, rank: int | None = None, crew: Crew | None = None
) -> dict[str, float]:
    """Write the merged model as an adapter, unless an equal call did.

    Errors go to reconstruction.json.

    Args:
        state: the state to export.
        out: a new folder.
        rank: maximum rank of each module. None: the exact rank, which needs a state made from adapters only.
        crew: rank 0 does the work.

    Returns:
        |S - left @ right| / |S| for each low-rank module, with S its running change.

    Raises:
        RecipeError: no `rank` for a weight stored without low-rank factors.
    """
    return (crew or Crew()).ranks.first(lambda: _export(state, Path(out), rank))


def _export(state: MergeState, out: Path, rank: int | None) -> dict[str, float]:
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank}: an adapter's rank must be at least 1.")
    log = state.log()
    merge, running = state.merge(log), Running(state.require_running())
    base, rule, scale = Weights(merge.base), merge.rule, merge.scale
    tied = tied_table(base)
    low_rank = [n for n in sorted(running.names()) if n != tied and _is_low_rank(base, running, n)]
    dense = [n for n in low_rank if running.rank(n) is None]
    if dense and rank is None:
        raise RecipeError(_why_dense(log, rule, dense))
    stages, errors, model = len(log.experts), dict[str, float](), in_memory(base)

    def factors() -> Iterator[tuple[str, Factors]]:
        for name in low_rank:
            left, right, errors[name] = _approximation(rule, base, running, name, stages, rank)
            yield model.name(name), (_finite(left * scale, name), right)

    lineage = {**log.lineage(), "scale": scale, "rank": rank, "asked": {"adapter": True, "rank": rank}}
    if finished_lineage(out, lineage):
        return optional_json(out / _ERRORS)
    whole, kept = _whole(rule, base, running, set(low_rank), scale, stages)
    with new_folder(out, OneRank()) as scratch:
        write_adapter(
            scratch, factors(), base_model=log.base, whole={model.name(n): t for n, t in whole.items()},
            embeddings=model.tables, conv1d=model.conv1d & {model.name(n) for n in low_rank},
            tied=model.name(tied) if tied else None,
        )  # fmt: skip
        (scratch / _ERRORS).write_text(json.dumps(errors, indent=1) + "\n", encoding="utf-8")
        if kept:
            nbytes = sum(whole[name].nbytes for name in kept)
            survival = Survival.of(kept, base.main_dtype, _ROUNDING, nbytes)
            survival.write(scratch)
            survival.warn(f"{out}, its modules_to_save")
        write_lineage(scratch, lineage)
    return errors


def _finite(factor: Tensor, name: str) -> Tensor:
    """Return a factor. Raises ModelError on overflow."""
    if not bool(torch.isfinite(factor).all()):
        raise ModelError(f"{name}: the scaled factor does not fit float32. Use a smaller scale. Nothing was written.")
    return factor


def _why_dense(log: Log, rule: MergeRule, dense: list[str]) -> str:
    """Return the error message for full-rank weights."""
    which = f"{dense[0]} and {len(dense) - 1} more are" if len(dense) > 1 else f"{dense[0]} is"
    model = next((e.stage for e in log.experts if e.kind == "model"), None)
    if not rule.basis_free:
        why = f"the rule {log.rule} does not work on factors"
    elif model:
        why = f"{model} is a full model"
    else:
        why = "the adapters' ranks add up too high for factors to be smaller"
    return (
        f"{which} stored as full tensors, not as low-rank factors: {why}. Set --rank to write the nearest adapter of "
        "that rank, with its errors in reconstruction.json; or export a model, without --as-adapter."
    )


def _is_low_rank(base: Weights, running: Running, name: str) -> bool:
    """Check for a change exported as factors."""
    if running.rank(name) is not None:
        return True
    return len(base.shape(name)) == 2 and weight_of(base, name, 1).is_matrix


def _approximation(
    rule: MergeRule, base: Weights, running: Running, name: str, stages: int, rank: int | None
) -> tuple[Tensor, Tensor, float]:
    weight = weight_of(base, name, stages)
    if running.rank(name) is not None:
        left, right, error = running.factored(name).truncated(rank)
        return left * factor_of(rule, weight), right, error
    state = running.state(name)
    assert state is not None
    change = read_out(rule, state, weight).double()
    u, s, vh = torch.linalg.svd(change, full_matrices=False)
    return Factored(u.float(), s.diag(), vh.T.contiguous().float()).truncated(rank)


def _whole(
    rule: MergeRule, base: Weights, running: Running, low_rank: set[str], scale: float, stages: int
) -> tuple[dict[str, Tensor], dict[str, Kept]]:
    """Return the modules exported as full tensors, and the updates kept."""
    changed = running.names() - low_rank
    modules = {n.rpartition(".")[0] for n in changed if n.rpartition(".")[0] + ".weight" not in low_rank}
    tensors = {n: base.tensor(n) for n in base.names if n.rpartition(".")[0] in modules}
    kept: dict[str, Kept] = {}
    for name in sorted(changed):
        before, state = base.tensor(name), running.state(name)
        assert state is not None
        read = read_out(rule, state, weight_of(base, name, stages))
        tensors[name], kept[name] = merged_piece(before, read, scale, Stored(name, before.dtype, _ROUNDING))
    return tensors, kept
