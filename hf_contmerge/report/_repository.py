"""Writes publications to the Hub: each revision is one atomic commit.

Files that arrived before a cut connection are not sent again. huggingface_hub reads the token from HF_TOKEN or
`hf auth login`; this module never does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from hf_contmerge.errors import ContmergeError, RecipeError, ResourceError
from hf_contmerge.report._contents import Contents, is_ours, size_of

MAIN = "main"


@dataclass(frozen=True)
class Revision:
    """A commit to come."""

    branch: str
    message: str
    files: Mapping[str, Contents]
    """Path in the repository -> contents."""

    def sizes(self) -> dict[str, int]:
        """Return path -> bytes, in order."""
        return {name: size_of(contents) for name, contents in sorted(self.files.items())}


@dataclass(frozen=True)
class Publication:
    """A repository to write, its branch main last."""

    repo_id: str
    private: bool
    revisions: Sequence[Revision]
    kind: Literal["model", "dataset"] = "model"
    notes: Sequence[str] = ()
    """For whoever pushes."""

    def to_json(self) -> dict[str, Any]:
        """Return what a push would send."""
        revisions = [{"branch": r.branch, "message": r.message, "files": r.sizes()} for r in self.revisions]
        return {
            "repository": self.repo_id, "kind": self.kind, "private": self.private, "revisions": revisions,
            "notes": list(self.notes),
        }  # fmt: skip


def send(publication: Publication) -> str:
    """Write all revisions; return the last commit's URL.

    Raises:
        RecipeError: a private push meets a public repository.
        ResourceError: no network, no token, no permission to write there, or another push came between.
    """
    from huggingface_hub import HfApi

    api, repo_id, kind = HfApi(), publication.repo_id, publication.kind
    url = ""
    with hub_errors(repo_id, api.endpoint):
        api.create_repo(repo_id, private=publication.private, exist_ok=True, repo_type=kind)
        if publication.private and api.repo_info(repo_id, repo_type=kind).private is False:
            raise RecipeError(
                f"{repo_id} at {api.endpoint} is public, but this push is private. Make it private in its "
                "settings, push to another repository, or allow it with `--public`. Nothing was uploaded."
            )
        for revision in publication.revisions:
            if revision.branch != MAIN:
                api.create_branch(repo_id, branch=revision.branch, repo_type=kind, exist_ok=True)
            url = _commit(api, repo_id, kind, revision)
    return url


def _commit(api: Any, repo_id: str, kind: str, revision: Revision) -> str:
    """Commit a revision's files, verify them, and return the commit's URL."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    at: dict[str, Any] = {"repo_type": kind, "revision": revision.branch}
    head = api.repo_info(repo_id, **at)
    # An earlier push may have other shards, which transformers would still read.
    names = [file.rfilename for file in head.siblings or ()]
    operations = [CommitOperationAdd(path_in_repo=n, path_or_fileobj=c) for n, c in revision.files.items()]
    operations += [CommitOperationDelete(path_in_repo=n) for n in names if is_ours(n) and n not in revision.files]
    commit = api.create_commit(repo_id, operations, commit_message=revision.message, parent_commit=head.sha, **at)
    tree = api.list_repo_tree(repo_id, recursive=True, repo_type=kind, revision=commit.oid)
    sizes = {item.path: getattr(item, "size", None) for item in tree}
    missing = [n for n, c in revision.files.items() if sizes.get(n) != size_of(c)]
    if missing:
        raise ResourceError(
            f"{', '.join(missing)} did not arrive whole at {commit.commit_url}. Push again; uploaded files are not "
            "sent twice."
        )
    return commit.commit_url


@contextmanager
def hub_errors(repo_id: str, endpoint: str) -> Iterator[None]:
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
    return _refusal(error, repo_id, endpoint)


def _refusal(error: Any, repo_id: str, endpoint: str) -> str:
    """Explain an answer of the Hub."""
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
    if status == 412:
        return (
            f"{repo_id} at {endpoint} changed during the push: another commit came between (412), and it was left as "
            "it is. Look at that commit, then push again; uploaded files are not sent twice."
        )
    answer = error.server_message or error.response.reason_phrase
    return (
        f"{endpoint} answered {status} to the push of {repo_id}: {answer}. Fix the reported problem, or push again "
        "later."
    )
