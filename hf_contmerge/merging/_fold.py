"""Pass 1 of a merge: task vectors into state and model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from hf_contmerge.errors import ModelError
from hf_contmerge.merge_rules import MergeRule, Norms, Weight
from hf_contmerge.merging._factored import fold_factors, pays
from hf_contmerge.merging._pieces import Parts, Piece, pieces, state_square, updated
from hf_contmerge.merging.costs import Passage, piece_size, state_bytes, state_dtype, stream_job, weight_of
from hf_contmerge.merging.running import Running, key_of, write_factored, write_shadow
from hf_contmerge.merging.trust import Shadow, Trust, growth, shadowed
from hf_contmerge.merging.write import MergedModel, Output, model_writer, opened, write_companions
from hf_contmerge.models.experts import Expert
from hf_contmerge.models.rounding import square
from hf_contmerge.models.statistics import Statistics
from hf_contmerge.models.survival import Kept, Survival
from hf_contmerge.models.weights import Weights, WeightsWriter, fill_files
from hf_contmerge.runtime.crew import Crew, Job

STATE_SHARD = 2**30
"""Bytes per file of a state: small enough to be shared evenly among hosts."""


@dataclass(frozen=True)
class Fold:
    """Pass 1, with pass 2 in the same sweep where possible."""

    rule: MergeRule
    base: Weights
    experts: Sequence[Expert]
    before: Running | None
    stages_before: int
    crew: Crew
    statistics: Sequence[Statistics] = ()
    """Of the experts, if the rule needs them."""
    rules: Sequence[MergeRule] = ()
    """Of the experts, where they differ in fields `of_newest`."""
    thresholds: Sequence[float] = ()
    """Of the experts, if the rule has a `share_kept`."""

    def run(
        self, earlier: Sequence[float], out: Path | None, merged: Output | None, later: Output | None = None
    ) -> tuple[Norms, Survival | None, Trust | None]:
        """Fold all experts; write the state to `out`, the model to `merged`.

        `later`: the model that will be written from the state, for which there must be room.
        """
        dense, low_rank = self._forms()
        shadows = self._shadowed(sorted(dense | low_rank))
        writers = self._writers(dense, out, merged)
        stages = self.stages_before + len(self.experts)
        scale = self.rule.scale(Norms((1.0,) * stages, 1.0)) if merged else 0.0
        only = self.experts[0] if stages == 1 else None
        model = None
        if merged:
            writer = writers["merged"]
            model = MergedModel(self.rule, self.base, scale, stages, writer, merged.rounding, only, self.crew)

        def work(job: Job) -> _Squares:
            name = job.name
            if name in dense:
                shadow = Shadow(self.rule, name, self._shadow_before(name)) if name in shadows else None
                squares = self._fold_dense(name, writers, model, shadow)
                if shadow and shadow.state is not None and out:
                    write_shadow(out, name, shadow.state)
                return squares
            if name in low_rank:
                return self._fold_low_rank(name, out, model, shadow=name in shadows)
            assert model is not None
            return _Squares((0.0,) * len(self.experts), 0.0, model.write(name, None))

        names = self.base.names if merged else sorted(dense | low_rank)
        touched = len(self.experts) + len(writers)
        groups, size = self._groups(dense, writers), piece_size(self.crew.device)
        passages = {
            n: Passage(touched, groups.get(n, 0), whole=n in dense and self._in_one_go(n), piece=size) for n in names
        }
        jobs = [stream_job(self.rule, self.base, n, passage) for n, passage in passages.items()]
        with opened(self.crew, list(writers.values()), [model_writer(self.base, later, self.crew)] if later else []):
            squares = self.crew.run(jobs, work, what="merging", prefetch=lambda job: self._prefetch(job.name))
        if merged:
            write_companions(self.base, merged, self.crew)
        # fsum is exact, so the order in which the ranks' results come does not matter.
        norms = [math.sqrt(math.fsum(s.experts[i] for s in squares.values())) for i in range(len(self.experts))]
        survival = model.survival({name: s.kept for name, s in squares.items()}) if model else None
        running = math.sqrt(math.fsum(s.running for s in squares.values()))
        grown = [s.growth for s in squares.values() if s.growth is not None]
        return Norms((*earlier, *norms), running), survival, Trust(max(grown)) if grown else None

    def _forms(self) -> tuple[set[str], set[str]]:
        """Return the weights with dense states and those in factors."""
        dense, low_rank = set(), set()
        for name in self.base.floating():
            old = self.before.rank(name) if self.before else 0
            ranks = [expert.rank(name) for expert in self.experts]
            if old == 0 and not any(r != 0 for r in ranks) and not self._counts_unchanged(name):
                continue
            total = sum(r for r in (old, *ranks) if r is not None)
            factors = None not in (old, *ranks) and self._takes_factors(name, total)
            (low_rank if factors else dense).add(name)
        return dense, low_rank

    def _counts_unchanged(self, name: str) -> bool:
        """Say if the state holds more than changes: statistics count too.

        An adapter that leaves a weight alone has inputs and curvature there, which later experts are weighed against.
        """
        weight = self._weight(name)
        return bool(self.rule.needs) and list(self.rule.parts(weight).values()) != [weight.shape]

    def _shadowed(self, names: Sequence[str]) -> set[str]:
        """Return the matrices with a shadow, by state or first fold.

        Experts that changed no matrix leave the choice to the first one that does.
        """
        if not self.rule.ill_posed:
            return set()
        if self.before and (kept := self.before.shadowed()):
            return kept
        weights = [self._weight(name) for name in names]
        matrices = [w.name for w in weights if w.is_matrix and list(self.rule.parts(w)) == [""]]
        if self.before and any(self.before.holds(name) for name in matrices):
            return set()  # a state of an earlier version: how far it has grown so far is unknown
        return shadowed(matrices)

    def _shadow_before(self, name: str) -> Tensor | None:
        shadow = self.before.shadow(name) if self.before else None
        return None if shadow is None else shadow.to(self.crew.device)

    def _takes_factors(self, name: str, rank: int) -> bool:
        shape, plain = self.base.shape(name), "" in self.rule.parts(self._weight(name))
        return self.rule.basis_free and plain and not self.rule.needs and len(shape) == 2 and pays(shape, rank)

    def _weight(self, name: str, number: int = 0) -> Weight:
        """Return a weight as one of the experts meets it, without statistics."""
        return weight_of(self.base, name, self.stages_before + number + 1)

    def _writers(self, dense: set[str], out: Path | None, merged: Output | None) -> dict[str, WeightsWriter]:
        writers, leader = {}, self.crew.ranks.is_main
        if out and dense:
            weights = [self._weight(name) for name in sorted(dense)]
            files = fill_files({w.name: state_bytes(self.rule, w) for w in weights}, STATE_SHARD)
            parts = [(w.name, key_of(w.name, p), s) for w in weights for p, s in self.rule.parts(w).items()]
            kind = state_dtype(self.rule)
            plan, places = [(key, s, kind) for _, key, s in parts], {key: files[n] for n, key, _ in parts}
            writers["running"] = WeightsWriter(out, plan, files=places, leader=leader)
            if self.rule.selects:
                plan = [(w.name, w.shape, torch.uint8) for w in weights]
                writers["owners"] = WeightsWriter(out / "owners", plan, files=files, leader=leader)
        if merged:
            writers["merged"] = model_writer(self.base, merged, self.crew)
        return writers

    def _groups(self, dense: set[str], writers: Mapping[str, WeightsWriter]) -> dict[str, int]:
        """Return weight -> number of its result's file."""
        if running := writers.get("running"):
            first = {name: next(iter(self.rule.parts(self._weight(name)))) for name in dense}
            return {name: running.shard_of(key_of(name, part)) for name, part in first.items()}
        return {name: writer.shard_of(name) for writer in writers.values() for name in writer.names}

    def _fold_dense(
        self, name: str, writers: Mapping[str, WeightsWriter], model: MergedModel | None, shadow: Shadow | None
    ) -> _Squares:
        base, device = self.base.tensor(name), self.crew.device
        before = self.before.state(name, state_dtype(self.rule)) if self.before else None
        weights = [self._weight(name, i) for i in range(len(self.experts))]
        last = self._weight(name, len(self.experts) - 1)
        first = next(iter(self.rule.parts(last)))
        owners = self._owners(name, before, base) if "owners" in writers else None
        vectors = [expert.reader(name, base) for expert in self.experts]
        squares, running_square, kept = [0.0] * len(vectors), 0.0, list[Kept]()
        for piece in pieces(self.rule, last, device, whole=self._in_one_go(name)):
            part = piece.of(base.reshape(-1)).to(device)
            wide = part.to(state_dtype(self.rule))
            state = self._state_before(before, piece, last)
            for i, vector in enumerate(vectors):
                rule = self.rules[i] if self.rules else self.rule
                change = vector(piece.start, piece.stop, wide.reshape(-1)).reshape(wide.shape)
                squares[i] += square(change)
                after = updated(rule, state, change, self._with_statistics(weights[i], i))
                if shadow:
                    shadow.fold(after, change, weights[i])
                if owners is not None:
                    piece.of(owners)[(after[first] != state[first]).cpu()] = min(weights[i].stage, 255)
                state = after
            if not all(map(math.isfinite, squares)):
                self._refuse_non_finite(name)
            running_square += state_square(state)
            if "running" in writers:
                _write_state(writers["running"], last, piece, state)
            if owners is not None:
                writers["owners"].write(name, piece.of(owners), start=piece.start)
            if model:
                kept.append(model.write_piece(last, piece, part, state))
        self._require_finite(name, running_square)
        return _Squares(tuple(squares), running_square, Kept.sum(kept), shadow.growth if shadow else None)

    def _state_before(self, before: Parts | None, piece: Piece, weight: Weight) -> Parts:
        if before is None:
            return piece.zeros(self.rule, weight, self.crew.device)
        device, kind = self.crew.device, state_dtype(self.rule)
        return {name: part.to(device, kind) for name, part in piece.of_state(before, weight).items()}

    def _with_statistics(self, weight: Weight, number: int) -> Weight:
        if self.thresholds:
            weight = replace(weight, threshold=self.thresholds[number])
        if not self.rule.needs:
            return weight
        return replace(weight, statistics=self.statistics[number].of(weight.name, self.rule.needs, self.crew.device))

    def _fold_low_rank(self, name: str, out: Path | None, model: MergedModel | None, *, shadow: bool) -> _Squares:
        before = self.before.factored(name) if self.before and self.before.rank(name) else None
        factors = [expert.factors(name) for expert in self.experts]
        if not all(bool(torch.isfinite(f).all()) for pair in factors if pair for f in pair):
            self._refuse_non_finite(name)
        state, norms = fold_factors(
            self.rule, before, factors, self._weight(name), rules=self.rules, shadow=shadow and not before
        )
        self._require_finite(name, state.norm())
        if out:
            write_factored(out, name, state)
        kept = model.write(name, {"": state.dense()}) if model else Kept()
        grown = None if state.shadow is None else growth(state.shadow, state.core)
        return _Squares(tuple(n**2 for n in norms), state.norm() ** 2, kept, grown)

    def _in_one_go(self, name: str) -> bool:
        """Say if an adapter's change, B @ A, comes whole."""
        return any(expert.is_whole(name) for expert in self.experts)

    def _owners(self, name: str, before: Parts | None, base: Tensor) -> Tensor:
        owners = self.before.owners(name) if self.before and before is not None else None
        return torch.zeros(base.numel(), dtype=torch.uint8) if owners is None else owners.reshape(-1)

    def _prefetch(self, name: str) -> None:
        for source in (self.base, *self.experts, *self.statistics):
            source.prefetch(name)
        if self.before:
            self.before.prefetch(name)

    def _require_finite(self, name: str, norm: float) -> None:
        """Raise ModelError for a state beyond float32, a sum too large."""
        if not math.isfinite(norm):
            raise ModelError(
                f"{name}: the state of the rule is too large for float32 with {self.experts[-1].folder}. Leave out the "
                "expert whose weights are that large. Nothing was merged."
            )

    def _refuse_non_finite(self, name: str) -> NoReturn:
        for folder, tensor in self._sources(name):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise ModelError(
                    f"{name} in {folder} has {bad} values that are NaN or infinite. The training diverged or the file "
                    "is damaged: lower learning_rate and train that stage again, or fetch the model again. Nothing "
                    "was merged."
                )
        raise ModelError(f"{name}: a difference from {self.base.folder} is too large for float32. Nothing was merged.")

    def _sources(self, name: str) -> Iterator[tuple[Path, Tensor]]:
        base = self.base.tensor(name)
        yield self.base.folder, base
        for expert in self.experts:
            stored = expert.values(name)
            if stored is None:
                stored = expert.reader(name, base)(0, base.numel(), base.reshape(-1).float())
            yield expert.folder, stored


@dataclass(frozen=True)
class _Squares:
    """Squared norms of a weight's task vectors, new state, and stored update."""

    experts: tuple[float, ...]
    running: float
    kept: Kept
    growth: float | None = None
    """Of rounding, if the weight has a shadow."""


def _write_state(writer: WeightsWriter, weight: Weight, piece: Piece, state: Parts) -> None:
    """Write a piece of a state, a run per slot."""
    for name, part in state.items():
        whole = piece.shape == weight.shape
        runs = [part] if whole else part.reshape(-1, piece.stop - piece.start)
        for number, run in enumerate(runs):
            writer.write(key_of(weight.name, name), run, start=number * math.prod(weight.shape) + piece.start)
