"""Pass 2 of a merge: base + scale * read_out(running)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hf_contmerge.errors import ResourceError, size
from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merging._pieces import Parts, Piece, merged_tensor, pieces, read_out
from hf_contmerge.merging.costs import Passage, piece_size, stream_job, weight_of
from hf_contmerge.merging.running import Running
from hf_contmerge.models.experts import Expert
from hf_contmerge.models.folder import copy_companions
from hf_contmerge.models.tokenizer import UNCHANGED, TokenizerChange
from hf_contmerge.models.weights import SHARD_SIZE, Plan, Weights, WeightsWriter
from hf_contmerge.runtime.crew import Crew, Job


@dataclass(frozen=True)
class Merged:
    """The norms of all experts so far, and the scale."""

    norms: Norms
    scale: float


@dataclass(frozen=True)
class Output:
    """The place of a merged model: empty folder, dtype, bytes per file."""

    folder: Path
    dtype: torch.dtype | None = None
    shard_size: int = SHARD_SIZE
    companions: Path | None = None
    """Whose config, tokenizer, chat template and generation config it gets: the base's, if not said."""
    change: TokenizerChange = UNCHANGED
    """What training changed of that tokenizer."""


def write_merged(
    rule: MergeRule,
    base: Weights,
    running: Path,
    found: Merged,
    out: Output,
    *,
    only: Expert | None = None,
    crew: Crew | None = None,
) -> None:
    """Write base + scale * read_out(running). `only`: a single expert."""
    crew, state = crew or Crew(), Running(running)
    writer = model_writer(base, out, crew)
    model = MergedModel(rule, base, found.scale, len(found.norms.experts), writer, only, crew)

    def prefetch(job: Job) -> None:
        base.prefetch(job.name)
        state.prefetch(job.name)

    with opened(crew, [writer]):
        size = piece_size(crew.device)
        jobs = [stream_job(rule, base, n, Passage(2, writer.shard_of(n), piece=size)) for n in writer.names]
        crew.run(
            jobs,
            lambda job: model.write(job.name, state.state(job.name)),
            what="writing",
            prefetch=prefetch,
        )
    write_companions(base, out, crew)


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
    only: Expert | None
    crew: Crew

    def write(self, name: str, running: Parts | None) -> None:
        """Write a tensor from its state; without one, the base's."""
        tensor = self.base.tensor(name)
        if running is None:
            dtype = self.writer.dtype(name)
            return self.writer.write(name, tensor.to(dtype) if tensor.is_floating_point() else tensor)
        weight, device = weight_of(self.base, name, self.stages), self.crew.device
        for piece in pieces(self.rule, weight, device):
            part = piece.of(tensor.reshape(-1)).to(device)
            state = {name: t.to(device) for name, t in piece.of_state(running, weight).items()}
            self.write_piece(weight, piece, part, state)
        return None

    def write_piece(self, weight: Weight, piece: Piece, base: Tensor, running: Parts) -> None:
        """Write a piece of a tensor from its state."""
        read = read_out(self.rule, running, weight)
        own = self.only.values(weight.name) if self.only and self.scale == 1.0 else None
        taken = piece.of(own.reshape(-1)).to(base.device) if own is not None else None
        merged = merged_tensor(base, read, self.scale, self.writer.dtype(weight.name), expert=taken)
        self.writer.write(weight.name, merged, start=piece.start)


def model_writer(base: Weights, out: Output, crew: Crew) -> WeightsWriter:
    """Return the writer of a merged model."""
    return WeightsWriter(out.folder, merged_plan(base, out.dtype), shard_size=out.shard_size, leader=crew.ranks.is_main)


def merged_plan(base: Weights, dtype: torch.dtype | None) -> Plan:
    """Return a merged model's tensors, the floating ones in `dtype`."""
    floating = set(base.floating())
    return [(n, base.shape(n), dtype if n in floating and dtype else base.dtype(n)) for n in base.names]


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
        yield


def check_room(writers: Sequence[WeightsWriter]) -> None:
    """Raise ResourceError if the disk cannot hold the output."""
    needed: dict[int, tuple[Path, int]] = {}
    for writer in writers:
        writer.folder.mkdir(exist_ok=True)
        device = writer.folder.stat().st_dev
        needed[device] = (writer.folder, needed.get(device, (writer.folder, 0))[1] + writer.nbytes)
    for folder, need in needed.values():
        free = shutil.disk_usage(folder).free
        if need > free:
            raise ResourceError(
                f"Merging writes {size(need)} to the disk of {folder}, which has {size(free)} free. Free some room, or "
                "name a folder on another disk. Nothing was written."
            )
