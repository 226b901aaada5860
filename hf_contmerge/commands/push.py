"""`contmerge push`: runs, merge states, models and experts to the Hub.

contmerge push runs/x --dry-run                          what would be sent; nothing is
contmerge push runs/x --repo-id me/x --with-state        others append: contmerge run RECIPE --from me/x
contmerge push state --repo-id me/x                      a state and its newest export
contmerge push merged --repo-id me/x                     a model of `merge export`
contmerge push runs/x/stages/01-law/experts/base/expert --repo-id me/law
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_contmerge.commands._arguments import add_json_argument, named_run, print_json
from hf_contmerge.commands._plugins import add_plugin_argument
from hf_contmerge.errors import size

if TYPE_CHECKING:
    from hf_contmerge.report.push import Publication
    from hf_contmerge.run.folder import Run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge push`."""
    parser.add_argument(
        "what", metavar="WHAT", nargs="?",
        help="a run (default: the only one under runs/), a merge state, a written model, a trained expert",
    )  # fmt: skip
    parser.add_argument("--repo-id", metavar="OWNER/NAME")
    parser.add_argument("--merge", metavar="ENTRY", help="merge entry of the run")
    parser.add_argument("--with-state", action="store_true", help="add the merge state, for `run --from`")
    parser.add_argument("--with-documents", action="store_true", help="results per document, as OWNER/NAME-results")
    parser.add_argument("--last-only", action="store_true", help="no branches of the earlier stages")
    parser.add_argument("--base", metavar="NAME", help="the base's name on the Hub, if it is a folder here")
    parser.add_argument("--license", metavar="L", help="licence on the card (default: that of all parents)")
    parser.add_argument("--public", action="store_true", help="make the repository public")
    parser.add_argument("--dry-run", action="store_true", help="list the files and stop; no network is used")
    add_json_argument(parser)
    add_plugin_argument(parser)
    parser.set_defaults(do=_push)


def _push(args: argparse.Namespace) -> None:
    from hf_contmerge.report.push import Wish, publications_of, push

    wish = Wish(
        args.repo_id, args.merge, False if args.public else None, args.license, args.base, args.last_only,
        args.with_state, args.with_documents, online=not args.dry_run,
    )  # fmt: skip
    publications = publications_of(_named(args.what), wish)
    if args.dry_run and args.json:
        print_json([publication.to_json() for publication in publications])
    elif args.dry_run:
        print("\n".join(_listing(publications)))
    elif args.json:
        print_json({"url": push(publications), "notes": [note for p in publications for note in p.notes]})
    else:
        url = push(publications)
        print(*(note for p in publications for note in p.notes), url, sep="\n")


def _named(what: str | None) -> Run | Path:
    """Return the run or folder of a name."""
    folder = Path(what or "")
    if what and folder.is_dir() and not (folder / "recipe.yml").is_file():
        return folder
    run = named_run(what)
    run.require_same_plugins()
    return run


def _listing(publications: Sequence[Publication]) -> Iterator[str]:
    """Yield the lines of a dry run."""
    for publication in publications:
        seen = "private" if publication.private else "public"
        yield f"{publication.repo_id}: {publication.kind} repository, {seen} if it is new. Nothing was sent."
        for revision in publication.revisions:
            yield f"  {revision.branch}: {revision.message}"
            sizes = revision.sizes()
            yield from (f"  {count:>15,}  {name}" for name, count in sizes.items())
            yield f"  {sum(sizes.values()):>15,}  in {len(sizes)} files ({size(sum(sizes.values()))})"
        yield from publication.notes
