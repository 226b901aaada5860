"""Pushes a run's models to the Hub, in one commit.

Uploaded: the merged weights, config and tokenizer, and four files written here: README.md (the card), recipe.yml,
merge.yml, and merge.json, from which `contmerge verify` merges the parents again. Local paths are reduced to names and
secrets of the recipe are blanked in all of them; any other file in the merged folder stops the push, as does one that
is not as the run recorded it. huggingface_hub reads the token from HF_TOKEN or `hf auth login`; this module never does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_contmerge.errors import ContmergeError, ModelError, RecipeError, ResourceError, RunError, unknown
from hf_contmerge.merging.lineage import LINEAGE
from hf_contmerge.models.contents import companions, is_weights
from hf_contmerge.report._lineage import run_lineage
from hf_contmerge.report._public import (
    HUB_ID,
    LOCAL_PATH,
    mapped,
    public_mergekit_recipe,
    public_name,
    public_recipe,
)
from hf_contmerge.report.card import last_merged, model_card
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.schema import Merge, Recipe
from hf_contmerge.runtime.foreign import read_json, require_own_files
from hf_contmerge.runtime.records import record_text

Contents = Path | bytes
_OURS = {"README.md", "recipe.yml", "merge.yml", LINEAGE}


def push_merged(run: Run, *, repo_id: str | None = None, entry: str | None = None, private: bool | None = None) -> str:
    """Push the last merged model in one commit; return its URL.

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
    from huggingface_hub import HfApi

    wish = run.recipe.publish
    chosen = _chosen_entry(run.recipe, entry)
    repo_id = _checked_repo_id(repo_id or (wish.repo_id if wish else None))
    private = (wish.private if wish else True) if private is None else private
    t = last_merged(run, chosen)
    files = _files(run, chosen, t, repo_id)
    api = HfApi()
    message = f"{run.recipe.name}: {chosen.name} after stage {t} of {len(run.recipe.stages)}"
    with _hub_errors(repo_id, api.endpoint):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and api.model_info(repo_id).private is False:
            raise RecipeError(
                f"{repo_id} at {api.endpoint} is public, but this push is private. Make it private in its "
                "settings, push to another repository, or allow it with `--public`. Nothing was uploaded."
            )
        return _commit(api, repo_id, files, message)


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


def _files(run: Run, entry: Merge, t: int, repo_id: str) -> dict[str, Contents]:
    """Return path in the repository -> contents."""
    run.settle()
    place = run.merged(t, entry)
    place.check("merge", "merged")
    place.check_recipe()
    folder = place.model
    require_own_files(folder, error=ModelError)
    merged = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
    model = {path.relative_to(folder).as_posix() for path in companions(folder)} | _OURS
    refused = [n for n, path in merged.items() if path.is_symlink() or not (n in model or is_weights(n))]
    if refused:
        raise ModelError(
            f"{folder} holds {', '.join(refused)}. Only weights, config, tokenizer, templates, licence and the model's "
            "code are ever uploaded: move the others elsewhere and push again. Nothing was uploaded."
        )
    if not any(path.suffix == ".safetensors" for path in merged.values()):
        raise RunError(f"{folder} holds no weights. Merge again: `contmerge redo {run.folder} merge`, then run.")
    files: dict[str, Contents] = {name: _cleaned(path) for name, path in merged.items()}
    files["README.md"] = model_card(run, entry, repo_id=repo_id).encode()
    files["recipe.yml"] = public_recipe(run.recipe).encode()
    mergekit = public_mergekit_recipe(run, entry, t)
    lineage = run_lineage(run, entry, t)
    files |= {"merge.yml": mergekit.encode()} if mergekit else {}
    return files | ({LINEAGE: record_text(lineage).encode()} if lineage else {})


def _commit(api: Any, repo_id: str, files: dict[str, Contents], message: str) -> str:
    """Commit all files, verify them, and return the commit's URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    # An earlier push may have other shards, which transformers would still read.
    stale = [n for n in api.list_repo_files(repo_id) if is_weights(n) and n not in files]
    operations = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in files.items()]
    operations += [CommitOperationDelete(path_in_repo=n) for n in stale]
    commit = api.create_commit(repo_id, operations, commit_message=message)
    tree = api.list_repo_tree(repo_id, recursive=True, revision=commit.oid)
    sizes = {item.path: getattr(item, "size", None) for item in tree}
    missing = [n for n, c in files.items() if sizes.get(n) != (len(c) if isinstance(c, bytes) else c.stat().st_size)]
    if missing:
        raise ResourceError(
            f"{', '.join(missing)} did not arrive whole at {commit.commit_url}. Push again; uploaded files are not "
            "sent twice."
        )
    return commit.commit_url


@contextmanager
def _hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one sentence."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]  (httpx's, any version)

    try:
        yield
    except ContmergeError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: an upload thread's or hf_xet's
        raise ResourceError(_explanation(error, repo_id, endpoint)) from error


def _explanation(error: BaseException, repo_id: str, endpoint: str) -> str:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
        OfflineModeIsEnabled,
    )

    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, OfflineModeIsEnabled):
        return f"Cannot push {repo_id}: HF_HUB_OFFLINE is set. Unset it and push again."
    if not isinstance(error, HTTPError):
        return f"Pushing {repo_id} to {endpoint} failed: {' '.join(str(error).split()) or type(error).__name__}"
    if not isinstance(error, HfHubHTTPError):
        return (
            f"Cannot reach {endpoint} to push {repo_id} ({type(error).__name__}). Check the network, the proxy and "
            "HF_ENDPOINT, then push again; uploaded files are not sent twice."
        )
    status = error.response.status_code
    if status == 401:
        return (
            f"{endpoint} requires a login (401): the token is missing or no longer valid. Log in with "
            f"`hf auth login`, or set HF_TOKEN, then push {repo_id} again."
        )
    if status == 403:
        return (
            f"{endpoint} denies this token write access to {repo_id} (403). Create one with write permission for "
            f"{repo_id.split('/')[0]} at {endpoint}/settings/tokens, pass it to `hf auth login`, and push again."
        )
    answer = error.server_message or error.response.reason_phrase
    return (
        f"{endpoint} answered {status} to the push of {repo_id}: {answer}. Fix the reported problem, or push again "
        "later."
    )


# What stays on this machine


def _cleaned(path: Path) -> Contents:
    """Return a file's contents; configs lose local paths."""
    if path.suffix != ".json" or "config" not in path.name:  # a vocabulary may hold "/home" as a token: leave it alone
        return path
    data = read_json(path)

    def public(key: str, value: str) -> str:
        return public_name(value) if key.endswith(("path", "file", "dir")) and LOCAL_PATH.match(value) else value

    cleaned = mapped(data, public)
    return path if cleaned == data else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()
