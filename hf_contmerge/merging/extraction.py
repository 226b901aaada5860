"""Extracts a LoRA adapter from the difference of two models.

    D = fine - base,  D = U diag(s) V'       kept: the r largest s of each linear map, left = U s^1/2, right = s^1/2 V'

Linear maps and stacks of expert mixtures become low-rank. Other modules (norms, convolutions, vocabulary tables,
routers) are saved whole, or reported with the share of the update that is lost. One weight is in memory at a time. U
comes from the eigenvectors of D D' in float64, which costs a fraction of a singular value decomposition.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError, RecipeError
from hf_contmerge.merging._log import name_of
from hf_contmerge.models.config import config
from hf_contmerge.models.experts import DenseExpert, check_mergeable
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.function import check_meaning
from hf_contmerge.models.loading import refused_targets
from hf_contmerge.models.lora.matching import tied_table
from hf_contmerge.models.lora.writer import Factors, write_adapter
from hf_contmerge.models.memory import Held, InMemory, in_memory
from hf_contmerge.models.rounding import rounded
from hf_contmerge.models.tokenizer import copy_tokenizer, tokenizer_change
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.runtime.crew import Crew, Job
from hf_contmerge.runtime.files import new_folder
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.runtime.versions import versions

RECORD = "extraction.json"
_NOISE = 1e-15
"""Of the largest squared singular value, per row: what float64 leaves of a zero one."""


@dataclass(frozen=True)
class Extraction:
    """Size of an adapter: a rank, or a share of squared length."""

    rank: int | None = None
    energy: float | None = None
    save_rest: bool = True
    """Save changed modules whole that have no low-rank form."""

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.energy is None):
            raise RecipeError("Give a rank (--rank 32), or a share of the update to keep (--energy 0.9).")
        if self.rank is not None and self.rank < 1:
            raise RecipeError(f"--rank {self.rank}: an adapter's rank must be at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise RecipeError(f"--energy {self.energy}: give a share above 0, at most 1.")

    def count(self, squares: Tensor) -> int:
        """Return the number of singular values to keep (falling `squares`)."""
        if self.energy is None:
            return min(self.rank or 1, len(squares))
        shares = squares.cumsum(0) / squares.sum()
        return min(int((shares < self.energy - 1e-12).sum()) + 1, len(squares))


@dataclass
class Kept:
    """Kept parts of an update: squared lengths by name in memory."""

    update: dict[str, float] = field(default_factory=dict)
    lost: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Changed weights without any form in the adapter."""

    @property
    def energy(self) -> float:
        """The share of the whole update's squared length that is kept."""
        return 1 - math.fsum(self.lost.values()) / math.fsum(self.update.values())

    def share_of(self, names: Iterable[str]) -> float:
        """Return the share of the whole update that lies in some weights."""
        return math.fsum(self.update[name] for name in names) / math.fsum(self.update.values())

    def to_json(self) -> dict[str, Any]:
        """Return the record: totals, and each weight's rank and kept share."""
        weights = {
            name: {"rank": rank, "energy": 1 - self.lost[name] / self.update[name] if self.update[name] else 1.0}
            for name, rank in self.ranks.items()
        }
        dropped = {name: self.share_of([name]) for name in self.dropped}
        return {"energy": self.energy, "weights": weights, "saved": self.saved, "lost": dropped}


def extract_adapter(
    fine: Path, base: Path, out: str | Path, wanted: Extraction, *, names: tuple[str, str] | None = None,
    crew: Crew | None = None,
) -> Kept:  # fmt: skip
    """Write the adapter of `base` that comes closest to `fine`.

    Args:
        fine: a whole model with the base's architecture.
        base: the base's folder.
        out: a new folder.
        wanted: rank or energy.
        names: names of base and fine-tuned model in the adapter and its card: Hub ids or folders.
        crew: rank 0 does the work, on its device.

    Raises:
        ModelError: the models do not fit, are equal, or transformers does not know the architecture.
    """
    crew = crew or Crew()
    job = _Job(fine, base, Path(out), wanted, names or (str(base), str(fine)))
    return crew.ranks.first(lambda: job.run(crew))


@dataclass(frozen=True)
class _Job:
    """Which adapter to extract, and where to."""

    fine: Path
    base: Path
    out: Path
    wanted: Extraction
    names: tuple[str, str]

    def run(self, crew: Crew) -> Kept:
        """Write the adapter."""
        if is_adapter(self.fine):
            raise ModelError(f"{self.fine} is an adapter already. Give a whole model.")
        check_mergeable(self.base)
        check_meaning(self.base, self.fine)
        before = Weights(self.base)
        difference = Difference(before, DenseExpert(self.fine, before).weights, in_memory(before))
        kept, whole = Kept(), dict[str, Tensor]()
        for name in difference.others():
            whole |= difference.rest(name, kept, self.wanted)
        with new_folder(self.out, OneRank()) as scratch:
            write_adapter(
                scratch, difference.factors(self.wanted, kept, crew), base_model=name_of(self.names[0]), whole=whole,
                conv1d=difference.memory.conv1d & {*difference.matrices}, tied=difference.tied,
                levels=difference.levels(),
            )  # fmt: skip
            if tokenizer_change(self.base, self.fine):
                copy_tokenizer(self.fine, scratch)
            record = json.dumps(self._record(kept), indent=1)
            (scratch / RECORD).write_text(f"{record}\n", encoding="utf-8")
        return kept

    def _record(self, kept: Kept) -> dict[str, Any]:
        asked = {"rank": self.wanted.rank, "asked_energy": self.wanted.energy, "save_rest": self.wanted.save_rest}
        digests = {"base_sha256": weights_sha256(self.base), "fine_sha256": weights_sha256(self.fine)}
        base, fine = self.names
        return {"base": base, "fine": fine, **digests, **asked, **kept.to_json(), "versions": versions()}


@dataclass(frozen=True)
class Difference:
    """The difference of two models, tensor by tensor as held in memory."""

    base: Weights
    fine: Weights
    memory: InMemory

    def __post_init__(self) -> None:
        if not self.memory.held:
            raise ModelError(
                f"transformers does not know the architecture of {self.base.folder}, so the adapter's names are "
                "unknown. Update transformers, or give another model."
            )
        if not self.changed:
            raise ModelError(f"{self.fine.folder} has the weights of {self.base.folder}: there is nothing to extract.")

    @cached_property
    def changed(self) -> frozenset[str]:
        """Stored names of weights that differ."""
        return frozenset(n for n in self.base.floating() if bool((self.base.tensor(n) != self.fine.tensor(n)).any()))

    @cached_property
    def tied(self) -> str | None:
        """Name in memory of a table used as embedding and head."""
        stored = tied_table(self.base)
        return self.memory.name(stored) if stored else None

    @cached_property
    def matrices(self) -> list[str]:
        """Names in memory of changed linear maps."""
        linear = (self.memory.linear | self.memory.conv1d) - {self.tied}
        refused = refused_targets(str(config(self.base.folder).get("model_type")))
        linear = {n for n in linear if n.removesuffix(".weight").rpartition(".")[2] not in refused}
        return [n for n, held in self.memory.held.items() if n in linear and self._moves(held)]

    @cached_property
    def stacks(self) -> list[str]:
        """Names in memory of all stacks of changed modules."""
        stacks = [n for n in self.memory.held if n in self.memory.stacks and self.memory.held[n].parts]
        modules = {n.rpartition(".")[0] for n in stacks if self._moves(self.memory.held[n])}
        return [n for n in stacks if n.rpartition(".")[0] in modules]

    def levels(self) -> dict[str, int]:
        """Return the number of later stacks in the module of each stack."""
        modules = [name.rpartition(".")[0] for name in self.stacks]
        return {name: modules[i + 1 :].count(modules[i]) for i, name in enumerate(self.stacks)}

    def _moves(self, held: Held) -> bool:
        return not held.form and any(part.stored in self.changed for part in held.parts)

    def others(self) -> list[str]:
        """Return other changed tensors' names, and stored names without one."""
        low_rank, covered = {*self.matrices, *self.stacks}, set[str]()
        names = []
        for name, held in self.memory.held.items():
            covered |= {part.stored for part in held.parts}
            if name not in low_rank and self._moves(held):
                names.append(name)
        return [*names, *sorted(self.changed - covered)]

    def rest(self, name: str, kept: Kept, wanted: Extraction) -> dict[str, Tensor]:
        """Return a changed module's whole tensors; count saved and lost ones."""
        size = self._size(name)
        kept.update[name] = size
        module = name.rpartition(".")[0]
        own_bias = name == f"{module}.bias" and f"{module}.weight" in self.matrices
        if not wanted.save_rest or not (own_bias or self._can_save(module)):
            kept.lost[name] = size
            kept.dropped.append(name)
            return {}
        kept.lost[name] = 0.0
        kept.saved.append(name)
        names = [name] if own_bias else self.memory.parameters(module)
        return {n: self._value(self.memory.held[n]) for n in names if self.memory.held[n].parts}

    def _can_save(self, module: str) -> bool:
        """Say if peft can save a module whole."""
        names = self.memory.parameters(module)
        low_rank = {*self.matrices, *self.stacks}
        return (
            module in self.memory.leaves and not low_rank & {*names}
            and all(self.memory.held[n].parts and not self.memory.held[n].form for n in names)
        )  # fmt: skip

    def _value(self, held: Held) -> Tensor:
        """Return a fine-tuned tensor as in memory, in the base's dtype."""
        value = torch.zeros(held.shape, dtype=self.base.dtype(held.parts[0].stored))
        for part in held.parts:
            stored = rounded(self.fine.tensor(part.stored).float(), value.dtype, name=part.stored)[part.source]
            value[part.place] = stored.mT if part.swapped else stored
        return value

    def _size(self, name: str) -> float:
        held = self.memory.held.get(name)
        if held is None:
            return float((self.fine.tensor(name).double() - self.base.tensor(name).double()).square().sum())
        return float(self._change(held).square().sum())

    def _change(self, held: Held, expert: int | None = None) -> Tensor:
        """Return D of a tensor or a stack's matrix, in float64."""
        change = torch.zeros(held.shape if expert is None else held.shape[1:], dtype=torch.float64)
        for part in held.parts:
            place, first = part.place, part.place[0]
            if expert is not None and first != expert and not isinstance(first, slice):
                continue  # another expert, which need not be read
            new, old = (weights.tensor(part.stored)[part.source] for weights in (self.fine, self.base))
            if expert is not None:
                place = place[1:]
                new, old = (t[expert - first.start] if isinstance(first, slice) else t for t in (new, old))
            moved = new.double() - old.double()
            change[place] = moved.mT if part.swapped else moved
        return change

    def factors(self, wanted: Extraction, kept: Kept, crew: Crew) -> Iterator[tuple[str, Factors]]:
        """Yield each linear map's and stack's factors, float32; count what they keep."""
        jobs = {name: self._job(name) for name in (*self.matrices, *self.stacks)}
        with crew.bar([*jobs.values()], "extracting") as advance:
            for name in self.matrices:
                left, right, *sizes = truncated(self._change(self.memory.held[name]).to(crew.device), wanted)
                self._count(kept, name, left.shape[1], [sizes])
                yield name, (left, right)
                advance(jobs[name])
            for name in self.stacks:
                yield name, self._stack(name, wanted, kept, crew.device)
                advance(jobs[name])

    def _job(self, name: str) -> Job:
        """Return the work on a weight: a cube and products."""
        shape = self.memory.held[name].shape
        numel = math.prod(shape)
        return Job(name, numel * min(shape[-2:]), 8 * numel, 4 * numel)

    def _stack(self, name: str, wanted: Extraction, kept: Kept, device: torch.device) -> Factors:
        """Return a stack's factors, all of the largest needed rank."""
        held, in_out = self.memory.held[name], name.rpartition(".")[0] in self.memory.in_out
        found = []
        for expert in range(held.shape[0]):
            change = self._change(held, expert).to(device)
            found.append(truncated(change.T if in_out else change, wanted))
        rank = max(1, *(left.shape[1] for left, *_ in found))
        self._count(kept, name, rank, [sizes for _, _, *sizes in found])
        pads = [rank - left.shape[1] for left, *_ in found]
        left = [torch.nn.functional.pad(f[0], (0, pad)) for f, pad in zip(found, pads, strict=True)]
        right = [torch.nn.functional.pad(f[1], (0, 0, 0, pad)) for f, pad in zip(found, pads, strict=True)]
        return torch.stack(left), torch.stack(right)

    def _count(self, kept: Kept, name: str, rank: int, sizes: Iterable[Any]) -> None:
        updates, lost = zip(*sizes, strict=True)
        kept.update[name], kept.lost[name], kept.ranks[name] = math.fsum(updates), math.fsum(lost), rank


def truncated(change: Tensor, wanted: Extraction) -> tuple[Tensor, Tensor, float, float]:
    """Return a matrix's nearest factors, squared length and lost part."""
    tall = change.shape[0] > change.shape[1]
    wide = change.T if tall else change
    squares, vectors = torch.linalg.eigh(wide @ wide.T)
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    squares = squares[squares > squares[0] * _NOISE * len(squares)]
    rank = wanted.count(squares) if len(squares) else 0
    basis, root = vectors[:, :rank], squares[:rank].sqrt().sqrt()
    left, right = basis * root, (basis.T @ wide) / root.unsqueeze(1)
    if tall:
        left, right = right.T, left.T
    size = float(change.square().sum())
    return left.float().cpu(), right.contiguous().float().cpu(), size, max(size - float(squares[:rank].sum()), 0.0)
