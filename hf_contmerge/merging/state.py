"""A merge that grows: a folder with a rule's state, to which experts are added one after another.

    STATE/
      state.json      the base, the rule, the experts in order with their digests and norms, which running folder counts
      running-<n>/    the state after all of them (running.py)

Adding an expert reads the base, the state and that expert: neither time nor memory depends on how many came before,
and an expert that has been added may be deleted. A change builds a new running folder and then replaces state.json, so
whatever a crash leaves, the state is the old one or the new one.

    state = MergeState.create("state", base="owner/base", rule="opcm", alpha=0.5)
    state.add("owner/law").add("path/to/medicine")
    state.export("merged", dtype="bfloat16")
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError, RunError, unknown
from hf_contmerge.merge_rules import MergeRule, Norms
from hf_contmerge.merging._log import (
    FoldedExpert,
    Log,
    is_as_it_was,
    name_of,
    read_log,
    refuse_twins,
    require_kept,
    require_new,
    stage_names,
    write_log,
)
from hf_contmerge.merging.rules import dtype_named, make_rule
from hf_contmerge.merging.stream import merge_experts
from hf_contmerge.merging.write import Merged, Output, write_merged
from hf_contmerge.models.experts import Expert, check_mergeable, expert_sha256, open_expert
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.weights import SHARD_SIZE, Weights, weights_sha256
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.files import FolderLock, new_folder, remove, sync_files, sync_folder
from hf_contmerge.runtime.versions import versions


@dataclass(frozen=True)
class MergeState:
    """A state folder."""

    folder: Path

    @classmethod
    def create(
        cls, folder: str | Path, *, base: str | Path, rule: str, crew: Crew | None = None, **parameters: Any
    ) -> MergeState:
        """Start a merge with no expert yet.

        Raises:
            RecipeError: an unknown rule or parameter.
            RunError: the folder holds something else.
            ModelError: the base cannot be merged.
        """
        state = cls(Path(folder))

        def make() -> None:
            checked, found = make_rule(rule, parameters), resolve_model(str(base))
            check_mergeable(found)
            require_new(state.folder)
            state.folder.mkdir(parents=True, exist_ok=True)
            log = Log(
                rule, checked.parameters(), name_of(base), str(found.resolve()), weights_sha256(found),
                Weights(found).stamp(), versions=versions(),
            )  # fmt: skip
            write_log(state.folder, log)

        (crew or Crew()).ranks.first(make)
        return state

    @classmethod
    def load(cls, folder: str | Path) -> MergeState:
        """Return the state in a folder. Raises RunError if there is none."""
        state = cls(Path(folder))
        state.log()
        return state

    def log(self) -> Log:
        """Return what has been merged so far."""
        return read_log(self.folder)

    def rule(self) -> MergeRule:
        """Return the rule with the parameters that the state was started with."""
        log = self.log()
        return make_rule(log.rule, log.parameters)

    def running(self, log: Log | None = None) -> Path | None:
        """Return the folder of the running state; None before the first expert. Raises RunError if it is gone."""
        log = log or self.log()
        running = self.folder / log.running if log.running else None
        if running and log.running_norm and not any(running.rglob("*.safetensors")):  # it would pass for zeros
            raise RunError(f"{running}, which holds the state, is gone. Restore it, or start the state anew.")
        return running

    def scale(self) -> float:
        """Return the factor on the running state, as of now."""
        return self.rule().scale(self.log().norms())

    def add(
        self,
        *models: str | Path,
        stages: Sequence[str] = (),
        force: bool = False,
        crew: Crew | None = None,
    ) -> MergeState:
        """Fold experts into the state, in this order: full models or peft adapters; folders or Hub ids.

        Args:
            stages: what the experts are called in the log; by default the last words of their names.
            force: accept an adapter that was trained on another base.

        Raises:
            ModelError: an expert does not fit, is damaged, or has been folded before. The state is as it was.
        """
        crew = crew or Crew()
        with self._changing(crew) as log:
            folders = crew.ranks.local_main_first(lambda: [resolve_model(str(m), adapters=True) for m in models])
            base, experts = crew.ranks.all(self._open, log, folders, force=force)

            def admit() -> tuple[list[str], list[str]]:
                names = stage_names([e.stage for e in log.experts], models, stages)
                digests = [expert_sha256(f) for f in folders]
                refuse_twins(log, models, digests)
                return names, digests

            names, digests = crew.ranks.first(admit)
            start = time.monotonic()
            out = self._next_running(log, crew)
            found = merge_experts(
                make_rule(log.rule, log.parameters), base, experts, running=self.running(),
                earlier=log.norms().experts, running_out=out, crew=crew,
            )  # fmt: skip
            seconds = round((time.monotonic() - start) / len(models), 3)
            norms = found.norms.experts[len(log.experts) :]
            kinds = [expert.kind for expert in experts]
            new = [
                FoldedExpert(stage, name_of(model), str(folder.resolve()), digest, norm, kind, seconds, _now())
                for stage, model, folder, digest, norm, kind in zip(
                    names, models, folders, digests, norms, kinds, strict=True
                )
            ]
            self._publish(log, out, (*log.experts, *new), found.norms.running, crew)
        return self

    def drop(self, stage: str, *, crew: Crew | None = None) -> MergeState:
        """Rebuild the state without a stage, from the other experts.

        Raises ModelError if one of them is gone or has changed: it says which, and what to do.
        """
        crew = crew or Crew()
        with self._changing(crew) as log:
            kept = [e for e in log.experts if e.stage != stage]

            def check() -> None:
                if len(kept) == len(log.experts):
                    raise RecipeError(unknown("stage", stage, [e.stage for e in log.experts], where=str(self.folder)))
                require_kept(kept, stage)

            crew.ranks.first(check)
            folders = [Path(e.folder) for e in kept]
            base, experts = crew.ranks.all(self._open, log, folders, force=True)
            if not kept:
                self._publish(log, None, (), 0.0, crew)
                return self
            out = self._next_running(log, crew)
            rule = make_rule(log.rule, log.parameters)
            found = merge_experts(rule, base, experts, running_out=out, crew=crew)
            refolded = tuple(replace(e, norm=n) for e, n in zip(kept, found.norms.experts, strict=True))
            self._publish(log, out, refolded, found.norms.running, crew)
        return self

    def export(
        self,
        out: str | Path,
        *,
        dtype: str | None = None,
        shard_size: int = SHARD_SIZE,
        tokenizer_from: str | None = None,
        crew: Crew | None = None,
    ) -> Path:
        """Write the merged model as `save_pretrained` would: sharded, with config, tokenizer and chat template.

        Args:
            out: a new folder.
            dtype: of the floating weights; the base's own by default.
            tokenizer_from: the model whose tokenizer, chat template and generation config it gets; the base by default.
        """
        crew, out = crew or Crew(), Path(out)
        log = crew.ranks.first(self.log)
        running, base, kind = crew.ranks.all(lambda: (self.require_running(log), self.base(), dtype_named(dtype)))
        companions = crew.ranks.local_main_first(resolve_model, tokenizer_from) if tokenizer_from else None
        only = self._only(log, base, crew)
        with new_folder(out, crew.ranks) as scratch:
            output = Output(scratch, kind, shard_size, companions)
            rule = make_rule(log.rule, log.parameters)
            found = Merged(log.norms(), rule.scale(log.norms()))
            write_merged(rule, base, running, found, output, only=only, crew=crew)
            crew.ranks.first(self._write_lineage, log, scratch)
        return out

    def require_running(self, log: Log | None = None) -> Path:
        """Return the folder of the running state. Raises RunError before the first expert, or if it is gone."""
        running = self.running(log)
        if not running:
            raise RunError(f"{self.folder} holds no expert yet. Add one: contmerge merge add {self.folder} EXPERT")
        return running

    def _write_lineage(self, log: Log, out: Path) -> None:
        found = {**asdict(log), "scale": self.scale()}
        (out / "merge.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def _only(self, log: Log, base: Weights, crew: Crew) -> Expert | None:
        """Return the expert, if there is but one and it is still there as it was: a scale of 1 then gives its bits."""
        if len(log.experts) != 1 or self.scale() != 1.0:
            return None
        first = log.experts[0]
        if not crew.ranks.first(is_as_it_was, first):
            return None
        return crew.ranks.all(lambda: open_expert(Path(first.folder), base, force=True))

    def _open(self, log: Log, folders: Sequence[Path], *, force: bool) -> tuple[Weights, list[Expert]]:
        base, names = self.base(), {log.base, log.base_folder}
        return base, [open_expert(folder, base, base_names=names, force=force) for folder in folders]

    def base(self) -> Weights:
        """Open the base. Raises ModelError if it is not the one that the state was started with."""
        log = self.log()
        folder = Path(log.base_folder)
        base = Weights(folder if folder.is_dir() else resolve_model(log.base))
        if base.stamp() != log.base_stamp and weights_sha256(base.folder) != log.base_sha256:
            raise ModelError(
                f"The base at {base.folder} is not the one that {self.folder} was started with: its weights have "
                "changed. Restore it, or start a new state with `contmerge merge init`."
            )
        return base

    @contextmanager
    def _changing(self, crew: Crew) -> Iterator[Log]:
        """Keep others out while the state changes, and clear away what a crash has left, or an error in here leaves."""
        with ExitStack() as stack:

            def begin() -> Log:
                self.rule()  # neither a folder without a state is locked, nor one with a rule that is not here
                stack.enter_context(FolderLock(self.folder))
                log = self.log()  # what another process has added since
                self._clear_all_but({log.running})
                return log

            log = crew.ranks.first(begin)
            try:
                yield log
            except (ContmergeError, OSError, ValueError):
                if crew.ranks.is_main:
                    self._clear_all_but({self.log().running})
                raise

    def _clear_all_but(self, keep: set[str | None]) -> None:
        for path in self.folder.glob("running-*"):
            if path.name not in keep:
                remove(path)

    def _next_running(self, log: Log, crew: Crew) -> Path:
        number = int(log.running.removeprefix("running-")) + 1 if log.running else 1
        out = self.folder / f"running-{number}"
        crew.ranks.first(out.mkdir)
        return out

    def _publish(
        self, log: Log, out: Path | None, experts: tuple[FoldedExpert, ...], running_norm: float, crew: Crew
    ) -> None:
        name = out.name if out else None
        after = replace(log, experts=experts, running=name, running_norm=running_norm, versions=versions())

        def write() -> None:
            sync_folder(self.folder)
            write_log(self.folder, after)
            self._clear_all_but({name})

        if out:
            crew.ranks.all(sync_files, out)
        crew.ranks.first(write)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Source:
    """An expert that a merge holds."""

    stage: int
    sha256: str
    model: Path
    replayed: bool = False
    """Whether it is the one that the guard had trained again."""


@dataclass(frozen=True)
class Folded:
    """Experts in a rule's state."""

    rule_name: str
    rule: MergeRule
    sources: tuple[Source, ...]
    norms: Norms
    factor: float = 1.0
    """What the rule's own scale is multiplied by, where no parameter of the rule says so."""

    @property
    def scale(self) -> float:
        return self.rule.scale(self.norms) * self.factor if self.sources else 0.0

    def scaled(self, factor: float) -> Folded:
        """Return the same with a scale that is `factor` times this one."""
        if self.rule.tunable:  # the scale is proportional to it
            field = self.rule.tunable[0]
            return self.tuned(field, getattr(self.rule, field) * factor)
        return dataclasses.replace(self, factor=self.factor * factor)

    def tuned(self, field: str, value: float) -> Folded:
        """Return the same state read out with another value of a tunable field."""
        return dataclasses.replace(self, rule=dataclasses.replace(self.rule, **{field: value}))
