"""A published merge that a run continues: `contmerge run RECIPE --from owner/name`.

The run keeps a copy of the merged model and of its state in `from/`: stages start from that model, merges fold their
experts into that state, and row 0 of the scores is that model. The experts behind it are not needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hf_contmerge.errors import ModelError, RecipeError, RunError
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merging.lineage import LINEAGE, read_lineage, write_lineage
from hf_contmerge.merging.merge import FoldedExpert, RunningMerge
from hf_contmerge.merging.state import Log, MergeState
from hf_contmerge.models.contents import companions, is_weights
from hf_contmerge.models.folder import fetch_merge
from hf_contmerge.models.weights import Weights, weights_sha256
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.runtime.digests import changed_files
from hf_contmerge.runtime.files import link_file, put_in_place, remove
from hf_contmerge.runtime.records import Record

_CURE = "Remove the folder, and give the same command again: it is fetched anew."


@dataclass(frozen=True)
class Published:
    """The copy of a published merge in a run."""

    model: Path

    @cached_property
    def log(self) -> Log:
        """The state's record. `check` says if the files are still those."""
        return MergeState(self.model / "state").log()

    def experts(self) -> tuple[FoldedExpert, ...]:
        """Return the experts behind it, whose weights are elsewhere."""
        return tuple(replace(entry.expert(), name=entry.model) for entry in self.log.experts)

    def records(self) -> list[Record]:
        """Return the experts for merge.json."""
        return [
            {"stage": e.stage, "model": e.model, "sha256": e.sha256, "norm": e.norm, "kind": e.kind,
             **({} if e.weight == 1.0 else {"weight": e.weight})}
            for e in self.log.experts
        ]  # fmt: skip

    def merge(self, base: Path, name: str, rule: MergeRule) -> RunningMerge:
        """Return the merge to fold the next experts into."""
        log, running = self.log, self.model / "state" / (self.log.running or "")
        return RunningMerge(base, name, rule, self.experts(), running, log.running_norm, trust=log.trust())

    def check(self) -> None:
        """Raise RunError for files with other bytes than fetched."""
        if changed := changed_files(self.model, read_lineage(self.model)["files"]):
            raise RunError(f"{self.model / changed[0]} changed or went missing after it was fetched. {_CURE}")


def find_published(run: Run, base: Path, rule: MergeRule) -> Published:
    """Return a run's copy of the continued merge, made at first.

    Raises:
        RecipeError: the recipe has another rule, several, or what needs the experts.
        ModelError: there is no such merge, it is damaged, or it is of another base.
    """
    assert run.recipe.continue_from
    folder = run.folder / "from"
    if not (folder / LINEAGE).is_file():
        _copy(fetch_merge(run.recipe.continue_from), folder, run.recipe.continue_from)
    published = Published(folder)
    published.check()
    log = published.log
    if weights_sha256(base) != log.base_sha256:
        raise ModelError(
            f"{run.recipe.continue_from} is a merge of {log.base} (SHA-256 {log.base_sha256[:12]}), and base_model "
            f"{run.recipe.base_model} has other weights. Name that base in the recipe."
        )
    _require_same_rule(run.recipe, rule, published)
    return published


def check_continued(recipe: Recipe) -> None:
    """Raise RecipeError for settings that need the published experts' weights."""
    needs = ["guard"] * bool(recipe.guard) + ["baselines"] * bool(recipe.baselines)
    needs += ["`auto` parameters"] * any(entry.auto for entry in recipe.merge)
    needs += ["evaluate.routed"] * recipe.evaluate.routed
    if recipe.continue_from and (needs or len(recipe.merge) != 1):
        what = f"{needs[0]}, which needs the experts behind it" if needs else f"{len(recipe.merge)} merge entries"
        raise RecipeError(
            f"A run that continues the published merge {recipe.continue_from} cannot have {what}. Remove it: one merge "
            "entry, with the rule of that merge."
        )


def _require_same_rule(recipe: Recipe, rule: MergeRule, published: Published) -> None:
    entry, log = recipe.merge[0], published.log
    asked = {word: rule.parameters()[word] for word in entry.settings() if word in rule.parameters()}
    if entry.rule != log.rule or asked != {word: log.parameters.get(word) for word in asked}:
        raise RecipeError(
            f"{recipe.continue_from} was merged by {log.rule} with {log.parameters or 'no parameters'}; merge entry "
            f"{entry.name} has {entry.rule} with {asked or 'its defaults'}. A state is continued by its own rule."
        )
    if twice := {e.stage for e in log.experts} & {stage.name for stage in recipe.stages}:
        raise RecipeError(f"{recipe.continue_from} has a stage {min(twice)} already. Give yours another name.")


def _copy(source: Path, folder: Path, name: str) -> None:
    """Copy model, state and lineage; check that they belong together."""
    scratch = folder.with_name(".from")
    remove(scratch)
    own = [path for path in source.glob("*.safetensors*") if is_weights(path.name)]
    state = [source / LINEAGE, *(source / "state").rglob("*.safetensors"), source / "state" / "state.json"]
    if not state[-1].is_file() or not state[0].is_file():
        raise ModelError(f"{name} has no merge state to continue. Its owner adds one by `contmerge push --with-state`.")
    for path in (*own, *companions(source), *state):
        target = scratch / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        link_file(path.resolve(), target)
    lineage, log = read_lineage(scratch), MergeState(scratch / "state").log()
    MergeState(scratch / "state").running()  # reads it
    Weights(scratch)
    experts = [e["sha256"] for e in lineage["experts"]]
    if experts != [e.sha256 for e in log.experts] or lineage.get("model_sha256") != weights_sha256(scratch):
        remove(scratch)
        raise ModelError(f"{name} is damaged: its model, its state and its lineage do not belong together.")
    (scratch / LINEAGE).unlink()
    write_lineage(scratch, {word: value for word, value in lineage.items() if word != "files"})
    put_in_place(scratch, folder)
