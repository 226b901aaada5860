"""Pass 2 of a merge: base + scale * read_out(running)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.errors import FullDiskError, in_place_of, size
from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merging._pieces import Parts, Piece, Stored, check_scale, merged_piece, pieces, read_out, unchanged
from hf_contmerge.merging.costs import Passage, piece_size, stream_job, weight_of
from hf_contmerge.merging.running import Running
from hf_contmerge.models.experts import Expert
from hf_contmerge.models.folder import copy_companions
from hf_contmerge.models.rounding import Rounding
from hf_contmerge.models.survival import Kept, Survival
from hf_contmerge.models.tokenizer import UNCHANGED, TokenizerChange
from hf_contmerge.models.weights import SHARD_SIZE, Plan, Weights, WeightsWriter, kept_dtype, main_dtype
from hf_contmerge.runtime.crew import Crew, Job
from hf_contmerge.runtime.refusals import FULL, explain, free_bytes


@dataclass(frozen=True)
class Merged:
    """All experts' norms, the scale, and the survival of the update."""

    norms: Norms
    scale: float
    survival: Survival | None = field(default=None, compare=False)
    """None where no model was written."""


@dataclass(frozen=True)
class Output:
    """A merged model's place: empty folder, dtype, rounding, bytes per file."""

    folder: Path
    dtype: torch.dtype | None = None
    shard_size: int = SHARD_SIZE
    companions: Path | None = None
    """Whose config, tokenizer, chat template and generation config it gets: the base's, if not said."""
    change: TokenizerChange = UNCHANGED
    """What training changed of that tokenizer."""
    rounding: Rounding = "stochastic"
    """Of weights with 16 bits."""


def write_merged(
    rule: MergeRule,
    base: Weights,
    running: Path,
    found: Merged,
    out: Output,
    *,
    only: Expert | None = None,
    crew: Crew | None = None,
) -> Survival:
    """Write base + scale * read_out(running); return its survival."""
    crew, state = crew or Crew(), Running(running)
    writer = model_writer(base, out, crew)
    model = MergedModel(rule, base, found.scale, len(found.norms.experts), writer, out.rounding, only, crew)

    def prefetch(job: Job) -> None:
        base.prefetch(job.name)
        state.prefetch(job.name)

    with opened(crew, [writer]):
        size = piece_size(crew.device)
        jobs = [stream_job(rule, base, n, Passage(2, writer.shard_of(n), piece=size)) for n in writer.names]
        kept = crew.run(
            jobs,
            lambda job: model.write(job.name, state.state(job.name)),
            what="writing",
            prefetch=prefetch,
        )
    write_companions(base, out, crew)
    return model.survival(kept)


def write_companions(base: Weights, out: Output, crew: Crew) -> None:
    """Put config, tokenizer, chat template and generation config beside a model's weights."""

    def write() -> None:
        copy_companions(base.folder, out.folder, dtype=out.dtype, tokenizer_from=out.companions)
        out.change.write(out.folder)

    crew.ranks.first(write)


@dataclass(frozen=True)
class MergedModel:
    """A merged model in the making."""

    rule: MergeRule
    base: Weights
    scale: float
    stages: int
    writer: WeightsWriter
    rounding: Rounding
    only: Expert | None
    crew: Crew

    def __post_init__(self) -> None:
        check_scale(self.scale)

    def write(self, name: str, running: Parts | None) -> Kept:
        """Write a tensor from its state; without one, the base's."""
        tensor = self.base.tensor(name)
        weight, device = weight_of(self.base, name, self.stages), self.crew.device
        if running is None:
            return self._write_unchanged(weight, tensor)
        parts = []
        for piece in pieces(self.rule, weight, device):
            part = piece.of(tensor.reshape(-1)).to(device)
            state = {name: t.to(device) for name, t in piece.of_state(running, weight).items()}
            parts.append(self.write_piece(weight, piece, part, state))
        return Kept.sum(parts)

    def write_piece(self, weight: Weight, piece: Piece, base: Tensor, running: Parts) -> Kept:
        """Write a piece of a tensor from its state."""
        read = read_out(self.rule, running, weight)
        own = self.only.values(weight.name) if self.only and self.scale == 1.0 else None
        taken = piece.of(own.reshape(-1)).to(base.device) if own is not None else None
        merged, kept = merged_piece(base, read, self.scale, self._stored(weight.name, piece.start), expert=taken)
        self.writer.write(weight.name, merged, start=piece.start)
        return kept

    def _write_unchanged(self, weight: Weight, tensor: Tensor) -> Kept:
        if not tensor.is_floating_point() or tensor.dtype == self.writer.dtype(weight.name):
            self.writer.write(weight.name, tensor)
            return Kept()
        parts = []
        for piece in pieces(self.rule, weight, torch.device("cpu")):
            values, kept = unchanged(piece.of(tensor.reshape(-1)), self._stored(weight.name, piece.start))
            self.writer.write(weight.name, values, start=piece.start)
            parts.append(kept)
        return Kept.sum(parts)

    def _stored(self, name: str, start: int) -> Stored:
        return Stored(name, self.writer.dtype(name), self.rounding, start)

    def survival(self, kept: Mapping[str, Kept]) -> Survival:
        """Sum up the tensors' survival."""
        return Survival.of(kept, main_dtype(self.writer.plan()), self.rounding, self.writer.nbytes)


def model_writer(base: Weights, out: Output, crew: Crew) -> WeightsWriter:
    """Return the writer of a merged model."""
    return WeightsWriter(out.folder, merged_plan(base, out.dtype), shard_size=out.shard_size, leader=crew.ranks.is_main)


def merged_plan(base: Weights, dtype: torch.dtype | None) -> Plan:
    """Return a merged model's tensors, the floating ones in `dtype`.

    What a model of 16 bits holds in float32 (router biases, norms) stays float32.
    """
    plan = [(n, base.shape(n), base.dtype(n)) for n in base.names]
    if dtype is None:
        return plan
    return [(n, s, kept_dtype(own, base.main_dtype, dtype) if own.is_floating_point else own) for n, s, own in plan]


@contextmanager
def opened(crew: Crew, writers: Sequence[WeightsWriter], later: Sequence[WeightsWriter] = ()) -> Iterator[None]:
    """Open the output files, once there is room for them.

    `later`: what is to be written after that, for which there must be room too.
    """
    with ExitStack() as stack:

        def create() -> None:
            check_room([*writers, *later])
            for writer in writers:
                stack.enter_context(writer)

        def enter() -> None:
            for writer in writers:
                stack.enter_context(writer)

        crew.ranks.first(create)
        crew.ranks.all(enter if not crew.ranks.is_main else lambda: None)
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise in_place_of(error, _no_room(error, [*writers, *later])) from error
            raise


def _no_room(error: OSError, writers: Sequence[WeightsWriter]) -> FullDiskError:
    """Return the error of a full disk."""
    need = ", ".join(f"{size(writer.nbytes)} to {writer.folder}" for writer in writers)
    return FullDiskError(f"{explain(error)}, then rerun the command. Merging writes {need}.")


def check_room(writers: Sequence[WeightsWriter]) -> None:
    """Raise FullDiskError if the disk cannot hold the output."""
    needed: dict[int, tuple[Path, int]] = {}
    for writer in writers:
        writer.folder.mkdir(exist_ok=True)
        device = writer.folder.stat().st_dev
        needed[device] = (writer.folder, needed.get(device, (writer.folder, 0))[1] + writer.nbytes)
    for folder, need in needed.values():
        free = free_bytes(folder)
        if need > free:
            raise FullDiskError(
                f"Merging writes {size(need)} to the disk of {folder}, which has {size(free)} free. Free some space or "
                "name a folder on another disk, then rerun the command. Nothing was written."
            )
