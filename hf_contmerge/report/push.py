"""Pushes runs, merge states, models and experts to the Hub.

A run's repository has a branch per stage with the merged model of that stage, and the last one on main: weights, config
and tokenizer, the card (README.md) with the picture, recipe.yml, merge.yml, and merge.json, from which `contmerge
verify` merges the parents again. Local paths are reduced to names and secrets of the recipe are blanked in all of them;
any other file in the merged folder stops the push, as does one that is not as recorded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_contmerge.errors import RecipeError, RunError, shell_word, unknown
from hf_contmerge.merging.lineage import LINEAGE, read_lineage
from hf_contmerge.merging.state import MergeState
from hf_contmerge.models.folder import is_adapter
from hf_contmerge.models.weights import weights_sha256
from hf_contmerge.report._contents import PICTURE, Contents, model_contents
from hf_contmerge.report._documents import documents_of
from hf_contmerge.report._evaluations import evaluations, task_data
from hf_contmerge.report._lineage import run_lineage
from hf_contmerge.report._parents import Licence, licence_of, parents_of
from hf_contmerge.report._plain_cards import Plain, expert_card, written_card
from hf_contmerge.report._public import (
    HUB_ID,
    hub_id,
    hub_model,
    public,
    public_lineage,
    public_mergekit_recipe,
    public_recipe,
)
from hf_contmerge.report._repository import MAIN, Publication, Revision, send
from hf_contmerge.report._states import run_state, state_contents
from hf_contmerge.report.card import CardFacts, draw_picture, last_merged, model_card
from hf_contmerge.report.write import load_results
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace
from hf_contmerge.run.recipe.schema import Merge, Recipe
from hf_contmerge.runtime.digests import changed_files
from hf_contmerge.runtime.records import Record, read_record, record_text
from hf_contmerge.runtime.shapes import RECORDS
from hf_contmerge.training.job import OWN


@dataclass(frozen=True)
class Wish:
    """What to push, and where to."""

    repo_id: str | None = None
    """owner/name; the recipe's `publish.repo_id` by default."""
    merge: str | None = None
    """Name of the merge entry; the recipe's `publish.merge`, or its only one, by default."""
    private: bool | None = None
    """Visibility of a new repository; the recipe's `publish.private` by default, else True."""
    license: str | None = None
    base: str | None = None
    """The base's name on the Hub, if the recipe names a folder."""
    last_only: bool = False
    """Leave out the branches of the stages."""
    with_state: bool = False
    """Add the merge state, so that others can append to the merge."""
    with_documents: bool = False
    """Push the results of each document as a dataset."""
    online: bool = True
    """Ask the Hub for the parents' licences."""


def push_merged(run: Run, *, repo_id: str | None = None, entry: str | None = None, private: bool | None = None) -> str:
    """Push a run's merged models; return the URL of the last commit.

    Args:
        run: a run with at least one merged stage.
        repo_id: owner/name; the recipe's `publish.repo_id` by default.
        entry: name of the merge entry; the recipe's `publish.merge`, or its only one, by default.
        private: visibility of a new repository; the recipe's `publish.private` by default, else True.

    Raises:
        RecipeError: no merge or repository is named, or a private push meets a public repository.
        RunError: no stage is merged.
        ModelError: the merged folder holds files that are no part of a model.
        ResourceError: no network, no token, or no permission to write there.
    """
    return push(publications_of(run, Wish(repo_id, entry, private)))


def push(publications: Sequence[Publication]) -> str:
    """Send publications, the model last; return the URL of its commit."""
    return [send(publication) for publication in publications][-1]


def publications_of(what: Run | Path, wish: Wish) -> list[Publication]:
    """Return what a push would send, the model last. Sends nothing.

    Args:
        what: a run, or the folder of a state, a written model or a trained expert.
        wish: the choices.

    Raises:
        RecipeError, RunError, ModelError: as `push_merged`.
    """
    if isinstance(what, Run):
        return list(_of_run(what, wish))
    if wish.merge or wish.last_only or wish.with_documents:
        raise RecipeError(f"{what} is no run: --merge, --last-only and --with-documents are for runs.")
    _require_made(what)
    repo_id = _checked_repo_id(wish.repo_id)
    if (what / "state.json").is_file():
        made = _of_state(MergeState.load(what), wish, repo_id)
    elif (what / LINEAGE).is_file():
        made = _of_written(what, read_lineage(what), wish, repo_id)
    else:
        made = _of_expert(what, wish, repo_id)
    files, message, licence = made
    revision = Revision(MAIN, message, files)
    return [Publication(repo_id, wish.private is not False, [revision], notes=[f"Licence: {licence.in_words()}."])]


def _require_made(folder: Path) -> None:
    """Raise RunError for a folder without a record of ours."""
    of_run = folder.name == "expert" and (folder.parent / "train.json").is_file()
    if not of_run and not any((folder / name).is_file() for name in ("state.json", LINEAGE, f"{OWN}/train.json")):
        raise RunError(
            f"{folder} holds no run, no merge state, and no record of a model ({LINEAGE}, {OWN}/train.json): nothing "
            "says what its files should be. Give a folder that contmerge wrote."
        )


# Runs


def _of_run(run: Run, wish: Wish) -> Iterator[Publication]:
    publish = run.recipe.publish
    entry = _chosen_entry(run.recipe, wish.merge)
    repo_id = _checked_repo_id(wish.repo_id or (publish.repo_id if publish else None))
    private = (publish.private if publish else True) if wish.private is None else wish.private
    last = last_merged(run, entry)
    run.settle()
    if wish.base:
        run = Run(run.folder, run.recipe.model_copy(update={"base_model": _checked_base(wish.base)}))
    licence = licence_of(parents_of(run, last), wish.license or (publish.license if publish else None),
                         online=wish.online)  # fmt: skip
    facts = CardFacts(repo_id, licence, with_state=wish.with_state)
    if wish.with_documents:
        facts = replace(facts, documents=f"{repo_id}-results")
        yield Publication(f"{repo_id}-results", private, [documents_of(run, entry, last, repo_id)], "dataset")
    notes = [f"Licence: {licence.in_words()}."]
    if not hub_id(hub_model(run.recipe.base_model)):
        notes.append(f"The base is called {public(run.recipe.base_model)}: name it on the Hub with --base owner/name.")
    yield Publication(repo_id, private, _revisions(run, entry, last, facts, all_stages=not wish.last_only), notes=notes)


def _revisions(run: Run, entry: Merge, last: int, facts: CardFacts, *, all_stages: bool) -> list[Revision]:
    """Return a branch per earlier stage, and the last one on main."""
    results, data = load_results(run), task_data(run)
    branches = tuple(_branch(run, t) for t in range(1, last)) if all_stages else ()
    facts = replace(facts, results=results)
    early = replace(facts, with_state=False)
    final = replace(facts, picture=draw_picture(results), branches=branches)

    def revision(t: int, facts: CardFacts, branch: str) -> Revision:
        message = f"{run.recipe.name}: {entry.name} after stage {t} of {len(run.recipe.stages)}"
        return Revision(branch, message, _run_files(run, entry, t, facts) | evaluations(run, entry, t, data))

    return [*(revision(t, early, branch) for t, branch in enumerate(branches, 1)), revision(last, final, MAIN)]


def _branch(run: Run, t: int) -> str:
    """Return a stage's branch: a name of git."""
    return f"{t:02d}-{re.sub(r'[.]+', '-', run.stage(t).name)}"


def _run_files(run: Run, entry: Merge, t: int, facts: CardFacts) -> dict[str, Contents]:
    """Return path in the repository -> contents."""
    place = run.merged(t, entry)
    place.check("merge", "merged")
    place.check_recipe()
    own = [n.removeprefix("merged/") for n in place.record("merge")["files"] if n.startswith("merged/")]
    files = model_contents(place.model, own)
    files["README.md"] = model_card(run, entry, t=t, facts=facts).encode()
    files["recipe.yml"] = public_recipe(run.recipe).encode()
    files |= {PICTURE: facts.picture} if facts.picture else {}
    mergekit, lineage = public_mergekit_recipe(run, entry, t), run_lineage(run, entry, t)
    files |= {"merge.yml": mergekit.encode()} if mergekit else {}
    files |= {LINEAGE: record_text(lineage).encode()} if lineage else {}
    return files | (run_state(run, entry, t) if facts.with_state else {})


def _chosen_entry(recipe: Recipe, name: str | None) -> Merge:
    entries = {e.name: e for e in recipe.merge}
    name = name or (recipe.publish.merge if recipe.publish else None)
    if name is None and len(entries) == 1:
        return recipe.merge[0]
    if name is None:
        raise RecipeError(
            f"The run has {len(entries)} merges ({', '.join(entries)}), and none is chosen. "
            f"Choose one with `--merge {recipe.merge[0].name}`, or `publish: {{merge: ...}}` in the recipe."
        )
    if name not in entries:
        raise RecipeError(unknown("merge entry", name, entries, where="publish.merge"))
    return entries[name]


def _checked_repo_id(repo_id: str | None) -> str:
    if repo_id is None:
        raise RecipeError(
            "No repository is named. Give `--repo-id owner/name`, or `publish: {repo_id: ...}` in the recipe."
        )
    if not HUB_ID.fullmatch(repo_id) or repo_id.count("/") != 1 or "@" in repo_id:
        raise RecipeError(f"The repository must be named owner/name, as on the Hub; got {repo_id!r}.")
    return repo_id


def _checked_base(base: str) -> str:
    if not HUB_ID.fullmatch(base):
        raise RecipeError(f"--base takes the base's name on the Hub, such as owner/name; got {base!r}.")
    return base


# States, written models, trained experts

_Made = tuple[dict[str, Contents], str, Licence]


def _of_state(state: MergeState, wish: Wish, repo_id: str) -> _Made:
    """Return a state's newest written model, with the state itself."""
    log = state.log()
    model = next((Path(e["model"]) for e in reversed(state.exports()) if e["experts"] == len(log.experts)), None)
    lineage = read_lineage(model) if model and (model / LINEAGE).is_file() else None
    if not model or not lineage or [e["sha256"] for e in lineage["experts"]] != [e.sha256 for e in log.experts]:
        raise RunError(
            f"{state.folder} has no written model of its {len(log.experts)} experts. Write it, then push: "
            f"contmerge merge export {shell_word(state.folder)} merged"
        )
    files, message, licence = _of_written(model, lineage, replace(wish, with_state=False), repo_id, state=True)
    return {**files, **state_contents(state)}, message, licence


def _of_written(model: Path, lineage: Record, wish: Wish, repo_id: str, *, state: bool = False) -> _Made:
    """Return a model that `merge export` or `remix` wrote."""
    if wish.with_state:
        raise RecipeError(f"{model} is a written model. Push the folder of its state: the model goes with it.")
    _require_whole(model, lineage["files"], "Export it again")
    files = model_contents(model, lineage["files"], apart=[LINEAGE])
    names = [wish.base or lineage["base"], *(e["model"] for e in lineage["experts"])]
    licence = licence_of(names, wish.license, online=wish.online)
    if wish.base:
        lineage = Record({**lineage, "base": _checked_base(wish.base)})
    shown = public_lineage({**lineage, "model_sha256": weights_sha256(model)})
    card = written_card(shown, Plain(repo_id, licence, is_adapter(model), with_state=state))
    files |= {"README.md": card.encode(), LINEAGE: record_text(shown).encode()}
    return files, f"{lineage['rule']}: {len(lineage['experts'])} experts", licence


def _of_expert(folder: Path, wish: Wish, repo_id: str) -> _Made:
    """Return an expert that `finetune_stage` or a run trained."""
    if wish.with_state:
        raise RecipeError(f"{folder} is a trained expert, and has no merge state.")
    own = folder / OWN / "train.json"
    if own.is_file():
        record = read_record(own, "Train it again.", RECORDS["train"])
        files = record["files"]
    else:
        record = ExpertPlace(folder.parent, folder.parent.name).record("train")
        files = {n.removeprefix("expert/"): digest for n, digest in record["files"].items() if n.startswith("expert/")}
    _require_whole(folder, files, "Train it again")
    contents = model_contents(folder, files, apart=[OWN, "statistics", "README.md"])
    base = wish.base and _checked_base(wish.base)
    card, licence = expert_card(record, folder, Plain(repo_id, adapter=is_adapter(folder), base=base),
                                lambda names: licence_of(names, wish.license, online=wish.online))  # fmt: skip
    return {**contents, "README.md": card.encode()}, f"expert of {repo_id.split('/')[1]}", licence


def _require_whole(folder: Path, digests: dict[str, Any], cure: str) -> None:
    """Raise RunError for files with other bytes than recorded."""
    if changed := changed_files(folder, digests):
        raise RunError(
            f"{folder / changed[0]} changed or went missing after it was written: it is not published. {cure}."
        )
