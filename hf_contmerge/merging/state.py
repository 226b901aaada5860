"""The folder of a growing merge.

    STATE/
      state.json      base, rule, experts in order with digests and norms, the current running folder and its digests
      running-<n>/    state after all experts (running.py)
      exports.jsonl   the models that were written, with the share of the update that their dtype keeps

Adding an expert reads the base, the state and that expert. Time and memory do not depend on the number of earlier
experts, and added experts may be deleted. A change builds a new running folder and then replaces state.json, so a crash
leaves either the old or the new state.

    state = MergeState.create("state", base="owner/base", rule="opcm", alpha=0.5)
    state.add("owner/law").add("path/to/medicine")
    state.export("merged", dtype="bfloat16")
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_contmerge.errors import ModelError, RecipeError, RunError, shell_word, unknown
from hf_contmerge.merge_rules import MergeRule, yaml_word
from hf_contmerge.merging._log import (
    Entry,
    Log,
    expert_weights,
    log_export,
    name_of,
    read_exports,
    read_log,
    require_kept,
    require_new,
    require_whole,
    stage_names,
    write_log,
)
from hf_contmerge.merging.lineage import finished_lineage, write_lineage
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge, require_linear
from hf_contmerge.merging.rules import dtype_named, make_rule, recorded_rule, rounding_named
from hf_contmerge.merging.write import Output
from hf_contmerge.models.experts import Expert, check_mergeable, expert_sha256, open_expert
from hf_contmerge.models.folder import resolve_model
from hf_contmerge.models.identity import Identity, model_files
from hf_contmerge.models.survival import Survival
from hf_contmerge.models.tokenizer import UNCHANGED, TokenizerChange, tokenizer_change
from hf_contmerge.models.weights import SHARD_SIZE, Weights
from hf_contmerge.runtime.crew import Crew
from hf_contmerge.runtime.digests import Digests, digests_of, files_below
from hf_contmerge.runtime.files import FolderLock, alone, new_folder, remove, sync_files, sync_folder
from hf_contmerge.runtime.notebook import html_table
from hf_contmerge.runtime.plugins import require_same
from hf_contmerge.runtime.refusals import refusals
from hf_contmerge.runtime.versions import versions


@dataclass(frozen=True)
class MergeState:
    """A folder with a growing merge."""

    folder: Path

    @classmethod
    def create(
        cls, folder: str | Path, *, base: str | Path, rule: str, crew: Crew | None = None, **parameters: Any
    ) -> MergeState:
        """Start a merge without experts.

        Parameters are those of recipes; `lambda` may be written `lambda_`.

        Raises:
            RecipeError: an unknown rule or parameter.
            RunError: the folder is not empty.
            ModelError: the base cannot be merged.
        """
        state = cls(Path(folder))

        def make() -> None:
            words = {yaml_word(word): value for word, value in parameters.items()}
            checked, base_folder = make_rule(rule, words), resolve_model(str(base))
            check_mergeable(base_folder)
            known = Identity.of(base_folder)
            log = Log(
                rule, checked.parameters(), name_of(base), str(base_folder.resolve()), known.sha256, known.stamp,
                known.files, versions=versions([rule]),
            )  # fmt: skip
            with alone(state.folder.absolute()):
                if (state.folder / "state.json").is_file() and read_log(state.folder) == log:
                    return  # the same command was cut off after its last write
                require_new(state.folder)
                write_log(state.folder, log)

        (crew or Crew()).ranks.first(make)
        return state

    @classmethod
    def load(cls, folder: str | Path) -> MergeState:
        """Open the state in a folder.

        Raises:
            RunError: the folder holds no state.
        """
        state = cls(Path(folder))
        state.log()
        return state

    def log(self) -> Log:
        """Return the contents of state.json."""
        return read_log(self.folder)

    def _repr_html_(self) -> str:
        """Return the experts as a table, for notebooks."""
        log = self.log()
        rows = [(e.stage, e.model, e.kind, e.norm, e.weight, e.sha256[:12]) for e in log.experts]
        caption = f"{self.folder}: {log.rule} on {log.base}, |S| = {log.running_norm:.4g}"
        return html_table(caption, ("stage", "expert", "kind", "norm", "weight", "SHA-256"), rows)

    def merge(self, log: Log | None = None) -> RunningMerge:
        """Return the merge as a value.

        Raises:
            RunError: the running state is damaged.
            ModelError: the base has changed.
        """
        log = log or self.log()
        require_whole(self.folder, log)
        return self._merge(log)

    def rule(self) -> MergeRule:
        """Return the rule with the state's parameters."""
        return self._rule(self.log())

    def scale(self) -> float:
        """Return the current factor on the running state."""
        log = self.log()
        return self._rule(log).scale(log.norms())

    def base(self) -> Weights:
        """Open the base.

        Raises:
            ModelError: its weights have changed.
        """
        return Weights(self._base(self.log()))

    def running(self) -> Path | None:
        """Return the running state's folder; None without experts.

        Raises:
            RunError: it is damaged.
        """
        log = self.log()
        require_whole(self.folder, log)
        return self._running(log)

    def require_running(self) -> Path:
        """Return the running state's folder.

        Raises:
            RunError: no expert was added, or the state is damaged.
        """
        return self._require(self.running())

    def add(
        self,
        *models: str | Path,
        stages: Sequence[str] = (),
        weights: Sequence[float] = (),
        force: bool = False,
        crew: Crew | None = None,
    ) -> MergeState:
        """Fold experts into the state, in this order.

        Args:
            models: folders or Hub ids of full models or peft adapters.
            stages: the experts' names in the log (default: the last parts of their paths or Hub ids).
            weights: factors on the experts' task vectors, with a linear rule (default: 1).
            force: accept an adapter that was trained on another base.
            crew: threads and ranks that share the work.

        Raises:
            ModelError: an expert does not fit, is damaged, or has been folded before. The state is unchanged.
        """
        crew = crew or Crew()
        crew.ranks.all(lambda: require_linear(self.log().rule, self.rule(), weights))
        with self._changing(crew) as log:
            folders = crew.ranks.local_main_first(lambda: [resolve_model(str(m), adapters=True) for m in models])
            merge, opened = crew.ranks.all(self._open, log, folders, force=force)
            # Adapters are folded without a look at the base.
            dense = any(expert.kind == "model" for expert in opened)
            crew.ranks.first(self._check if dense else partial(require_whole, self.folder), log)

            def name_experts() -> list[FoldedExpert]:
                names = stage_names([e.stage for e in log.experts], models, stages)
                factors = expert_weights(weights, names)
                return [
                    FoldedExpert(stage, folder.resolve(), expert_sha256(folder), name=str(model), weight=weight)
                    for stage, folder, model, weight in zip(names, folders, models, factors, strict=True)
                ]

            new = crew.ranks.first(name_experts)
            start = time.monotonic()
            after = merge.fold(new, self._next_running(log, crew), opened=opened, crew=crew)
            seconds = round((time.monotonic() - start) / len(models), 3)
            added = [
                Entry(
                    e.stage,
                    name_of(model),
                    str(e.folder),
                    e.sha256,
                    e.norm,
                    expert.kind,
                    seconds,
                    _now(),
                    crew.ranks.first(self._own_files, e.folder),
                    e.weight,
                )
                for e, model, expert in zip(after.experts[len(log.experts) :], models, opened, strict=True)
            ]
            log = replace(log, tokenizer_change=crew.ranks.first(self._change, log, merge.base, folders))
            self._publish(log, after, (*log.experts, *added), crew)
        return self

    def finish_add(
        self, models: Sequence[str | Path], stages: Sequence[str] = (), weights: Sequence[float] = ()
    ) -> bool:
        """Complete an addition cut off at its end.

        Returns:
            Whether these experts are the newest ones in the state.
        """
        log = self.log()
        newest = log.experts[-len(models) :] if models else ()
        if [e.model for e in newest] != [name_of(m) for m in models] or (
            stages and [e.stage for e in newest] != list(stages)
        ):
            return False
        if [e.weight for e in newest] != expert_weights(weights, [e.stage for e in newest]):
            return False
        folders = [resolve_model(str(m), adapters=True) for m in models]
        if [e.sha256 for e in newest] != [expert_sha256(folder) for folder in folders]:
            return False
        self._clear_leftovers()
        return True

    def finish_drop(self, stage: str) -> bool:
        """Complete a removal cut off at its end.

        Returns:
            Whether the stage was in the state, and is no more.
        """
        log = self.log()
        if stage not in log.dropped or stage in [e.stage for e in log.experts]:
            return False
        self._clear_leftovers()
        return True

    def drop(self, stage: str, *, crew: Crew | None = None) -> MergeState:
        """Rebuild the state without a stage.

        Raises:
            RecipeError: an unknown stage.
            ModelError: another expert is missing or has changed.
        """
        crew = crew or Crew()
        with self._changing(crew) as log:
            kept = [e for e in log.experts if e.stage != stage]

            def check() -> None:
                if len(kept) == len(log.experts):
                    raise RecipeError(unknown("stage", stage, [e.stage for e in log.experts], where=str(self.folder)))
                require_kept(kept, stage)

            crew.ranks.first(check)
            crew.ranks.first(self._check_base, log)
            after = crew.ranks.all(self._merge, log).restarted()
            if kept:
                after = after.fold([e.expert() for e in kept], self._next_running(log, crew), crew=crew)
            refolded = tuple(replace(e, norm=x.norm) for e, x in zip(kept, after.experts, strict=True))
            self._publish(replace(log, dropped=(*log.dropped, stage)), after, refolded, crew)
        return self

    def export(
        self,
        out: str | Path,
        *,
        dtype: str | None = None,
        rounding: str | None = None,
        shard_size: int = SHARD_SIZE,
        tokenizer_from: str | None = None,
        crew: Crew | None = None,
    ) -> Path:
        """Write the merged model as `save_pretrained` does, unless an equal call did.

        Args:
            out: a new folder.
            dtype: dtype of the floating weights (default: the base's).
            rounding: stochastic (default) or nearest, for weights of 16 bits.
            shard_size: maximum bytes of a weight file.
            tokenizer_from: source of tokenizer, chat template and generation config (default: the base, with the chat
                template, end and padding of the newest expert that was trained here with others).
            crew: threads and ranks that share the work.
        """
        crew, out = crew or Crew(), Path(out)
        log = crew.ranks.first(self.log)

        def open_merge() -> tuple[RunningMerge, Any]:
            merge, kind = self._merge(log), (dtype_named(dtype), rounding_named(rounding))
            self._require(merge.running)
            return merge, kind

        crew.ranks.first(self._check, log)
        merge, (kind, by) = crew.ranks.all(open_merge)
        asked = {"dtype": dtype, "rounding": by, "shard_size": shard_size, "tokenizer_from": tokenizer_from}
        lineage = {**log.lineage(), "scale": merge.scale, "factor": merge.factor, "asked": asked}
        if stored := crew.ranks.first(finished_lineage, out, lineage):
            crew.ranks.first(log_export, self.folder, out, len(log.experts), Survival.read(stored["stored"]))
            return out
        companions = crew.ranks.local_main_first(resolve_model, tokenizer_from) if tokenizer_from else None
        change = UNCHANGED if companions else TokenizerChange.read(log.tokenizer_change)
        with new_folder(out, crew.ranks) as scratch:
            output = Output(scratch, kind, shard_size, companions, change, by)
            survival = merge.export(output, crew=crew)
            written = {"dtype": _word(kind), "rounding": by, "stored": survival.to_json()}
            crew.ranks.first(write_lineage, scratch, {**lineage, **written})
        crew.ranks.first(log_export, self.folder, out, len(log.experts), survival)
        if crew.ranks.is_main:
            survival.warn(out)
        return out

    def _clear_leftovers(self) -> None:
        with FolderLock(self.folder):
            self._clear_all_but({self.log().running})

    def exports(self) -> list[dict[str, Any]]:
        """Return the written models with the survival of their updates."""
        return read_exports(self.folder)

    def _rule(self, log: Log) -> MergeRule:
        require_same(log.versions, self.folder, cure=", or start the state anew")
        return recorded_rule(log.rule, log.parameters)

    def _merge(self, log: Log) -> RunningMerge:
        """Return the merge, its files unread."""
        experts = tuple(entry.expert() for entry in log.experts)
        rule = self._rule(log)
        running, trust = self._running(log), log.trust()
        return RunningMerge(self._base(log), log.rule, rule, experts, running, log.running_norm, trust=trust)

    def _base(self, log: Log) -> Path:
        """Find the base, unchanged by its files' times or bytes."""
        folder = Path(log.base_folder)
        folder = folder if folder.is_dir() else resolve_model(log.base)
        self._refuse(folder, log.base_identity().changed(folder, whole=False))
        return folder

    def _check_base(self, log: Log) -> None:
        """Raise ModelError for a base with other bytes than at the start."""
        base = self._base(log)
        self._refuse(base, log.base_identity().changed(base, whole=True))

    def _refuse(self, base: Path, changed: list[str]) -> None:
        if changed:
            raise ModelError(
                f"The base at {base} has other weights than at the start of {self.folder}: {changed[0]} differs. "
                "Restore it, or start a new state with `contmerge merge init`."
            )

    def _check(self, log: Log) -> None:
        """Read base and running state; raise an error for changes."""
        self._check_base(log)
        require_whole(self.folder, log)

    def _running(self, log: Log) -> Path | None:
        return self.folder / log.running if log.running else None

    def _require(self, running: Path | None) -> Path:
        if not running:
            command = f"contmerge merge add {shell_word(self.folder)} EXPERT"
            raise RunError(f"{self.folder} holds no expert yet. Add one: {command}")
        return running

    def _open(self, log: Log, folders: Sequence[Path], *, force: bool) -> tuple[RunningMerge, list[Expert]]:
        merge, names = self._merge(log), {log.base, log.base_folder}
        base = Weights(merge.base)
        return merge, [open_expert(folder, base, base_names=names, force=force) for folder in folders]

    @contextmanager
    def _changing(self, crew: Crew) -> Iterator[Log]:
        """Lock the state during a change; remove leftovers."""
        with ExitStack() as stack:

            def begin() -> Log:
                self.rule()  # raises before locking a folder without a state or with an unknown rule
                stack.enter_context(FolderLock(self.folder))
                log = self.log()  # read again: another process may have added experts
                self._clear_all_but({log.running})
                return log

            log = crew.ranks.first(begin)
            try:
                with refusals(self.folder):
                    yield log
            except BaseException:
                if crew.ranks.is_main:
                    with suppress(OSError, RunError):
                        self._clear_all_but({self.log().running})
                raise

    def _change(self, log: Log, base: Path, experts: Sequence[Path]) -> dict[str, Any] | None:
        """Return how training changed the tokenizer: an expert's folder may be deleted."""
        changes = (tokenizer_change(base, folder) for folder in experts if self._trained_here(folder))
        return next((c.to_json() for c in reversed([*changes]) if c), log.tokenizer_change)

    def _own_files(self, expert: Path) -> Digests:
        """Return the digests of an expert in the state's folder."""
        return digests_of(expert, model_files(expert)) if self._contains(expert) else {}

    def _contains(self, expert: Path) -> bool:
        return self.folder.resolve() in expert.resolve().parents

    def _trained_here(self, expert: Path) -> bool:
        """Report if our training wrote an expert: functions, a run, the callback."""
        records = (expert / "contmerge" / "train.json", expert.parent / "train.json")
        return any(file.is_file() for file in records) or self._contains(expert)

    def _clear_all_but(self, keep: set[str | None]) -> None:
        for path in self.folder.glob("running-*"):
            if path.name not in keep:
                remove(path)

    def _next_running(self, log: Log, crew: Crew) -> Path:
        number = int(log.running.removeprefix("running-")) + 1 if log.running else 1
        out = self.folder / f"running-{number}"
        crew.ranks.first(out.mkdir)
        return out

    def _publish(self, log: Log, merge: RunningMerge, experts: tuple[Entry, ...], crew: Crew) -> None:
        name = merge.running.name if merge.running else None
        after = replace(
            log, experts=experts, running=name, running_norm=merge.running_norm, versions=versions([log.rule]),
            parameters=merge.rule.parameters(), amplification=merge.trust.amplification if merge.trust else None,
        )  # fmt: skip

        def write() -> None:
            sync_folder(self.folder)
            files = digests_of(self.folder, files_below(self.folder, name)) if name else {}
            write_log(self.folder, replace(after, running_files=files))
            self._clear_all_but({name})

        if merge.running:
            crew.ranks.all(sync_files, merge.running)
        crew.ranks.first(write)


def _word(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
