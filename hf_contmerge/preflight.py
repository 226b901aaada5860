"""What is looked up and checked before the first phase, so that bad input is told before hours are spent."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_contmerge import corpus, experts, finetune, model_folder, scoring, tensor_files
from hf_contmerge.corpus import StageData
from hf_contmerge.errors import ResourceError, size
from hf_contmerge.merge_rules import MergeRule
from hf_contmerge.merge_words import make_rule
from hf_contmerge.recipe import Merge
from hf_contmerge.run_folder import Run


@dataclass(frozen=True)
class Prepared:
    """What was looked up and checked before the first phase."""

    base: Path
    rules: dict[str, MergeRule]
    """Merge entry name -> MergeRule."""
    kinds: dict[str, str]
    """Merge entry name -> the kind of expert that it folds."""
    given: dict[str, Path]
    """Model name in the recipe -> its folder, for given experts and what is taken from them."""
    data: dict[str, StageData]
    """Stage name -> StageData."""

    def expert_kinds(self) -> list[str]:
        """Return each kind of expert that some entry asks for, once."""
        return list(dict.fromkeys(self.kinds.values()))


def prepare(run: Run, ranks: Any) -> Prepared:
    """Resolve and check all that the recipe names, so that bad input is told before hours are spent."""
    recipe = run.recipe
    rules = {e.name: make_rule(e.rule, e.parameters, where=f"merge entry {e.name}") for e in recipe.merge}
    kinds = {entry.name: _kind(entry, rules[entry.name]) for entry in recipe.merge}
    with ranks.main_process_first():
        base = model_folder.resolve_model(recipe.base_model)
        experts.check_mergeable(base)
        model_folder.check_tokenizer(base)
        names = {n for s in recipe.stages for n in (s.expert, s.minus) if n}
        given = {name: model_folder.resolve_model(name) for name in sorted(names)}
        for path in given.values():
            model_folder.check_same_layout(base, path)
            experts.check_mergeable(path)
        if any(s.dataset for s in recipe.stages):
            finetune.check_training(recipe.train, base)
        data = _load_data(run, base, write=ranks.is_main_process)
    ranks.wait_for_everyone()
    folders = [run.tasks, *([Path(recipe.evaluate.include_path)] if recipe.evaluate.include_path else [])]
    scoring.check_tasks([t.name for t in recipe.measured(run.stage_numbers())], folders)
    if ranks.is_main_process:
        _check_disk(run, tensor_files.Weights(base).numel(), kinds)
        run.link_base(base)
    return Prepared(base, rules, kinds, given, data)


def _kind(entry: Merge, rule: MergeRule) -> str:
    start = entry.start_from or rule.start_from
    return f"merged-{entry.name}" if start == "merged" else start


def _load_data(run: Run, base: Path, *, write: bool) -> dict[str, StageData]:
    """Load the stages' datasets, and write the tasks that are made from datasets."""
    data = {}
    for stage in run.recipe.stages:
        if stage.dataset:
            data[stage.name] = corpus.load_stage_data(stage.dataset, seed=run.recipe.seed)
        if stage.dataset and stage.heldout_task and write:
            chars = stage.dataset.heldout_chars
            documents = scoring.heldout_documents(data[stage.name], chars=chars, tokenizer_folder=base)
            scoring.write_perplexity_task(run.tasks, stage.heldout_task, documents)
    for task in run.recipe.tasks():
        if task.dataset and write:
            scoring.write_task(run.tasks, task)
    return data


def _check_disk(run: Run, parameters: int, kinds: dict[str, str]) -> None:
    """Raise ResourceError if what is still to be written does not fit on the disk."""
    need = 0
    for t in run.stage_numbers():
        trained = [run.expert(t, kind) for kind in dict.fromkeys(kinds.values())]
        need += sum(4 * parameters for place in {p.folder: p for p in trained}.values() if not place.is_done("train"))
        need += sum(2 * parameters for e in run.recipe.merge if not run.merged(t, e).is_done("merge"))
    need += 2 * 4 * parameters * len(kinds)  # the running states: the last one and the one being written
    free = shutil.disk_usage(run.folder).free
    if need > free:
        raise ResourceError(
            f"This run still needs about {size(need)} in {run.folder} and {size(free)} are free. "
            "Free some, name another disk with --run, or use fewer merge entries."
        )
