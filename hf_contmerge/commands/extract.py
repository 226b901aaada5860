"""`contmerge extract-lora`: a LoRA adapter from the difference of two models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hf_contmerge.commands._arguments import add_json_argument, print_json
from hf_contmerge.commands._models import ANY_MODEL, opened_model
from hf_contmerge.commands.merge import crew_of
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.hiding import printable

if TYPE_CHECKING:
    from hf_contmerge.merging.extraction import Kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge extract-lora`."""
    parser.add_argument("fine", metavar="FINE", help=ANY_MODEL)
    parser.add_argument("--base", required=True, metavar="MODEL", help="the model that FINE was trained from")
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="a new folder for the adapter")
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", type=int, metavar="R", help="rank of each linear map")
    size.add_argument(
        "--energy", type=float, metavar="E", help="the smallest ranks with this share of each map's squared change"
    )
    parser.add_argument(
        "--no-rest", action="store_true", help="leave out what has no low-rank form, as norms (default: save it whole)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add_json_argument(parser)
    parser.set_defaults(do=extract_command, workers=0)


def extract_command(args: argparse.Namespace) -> None:
    """Write the adapter and print what it keeps.

    Raises:
        ContmergeError: a user error.
    """
    from hf_contmerge.merging.extraction import Extraction, extract_adapter
    from hf_contmerge.models.folder import resolve_model
    from hf_contmerge.report.exports import adapter_card

    wanted = Extraction(args.rank, args.energy, save_rest=not args.no_rest)
    crew = crew_of(args)
    with opened_model(args.fine) as fine:
        kept = extract_adapter(
            resolve_model(fine, adapters=True), resolve_model(args.base), args.out, wanted,
            names=(args.base, args.fine), crew=crew,
        )  # fmt: skip
    if not crew.ranks.is_main:
        return
    write_atomically(Path(args.out) / "README.md", adapter_card(args.base, args.fine, kept, wanted))
    if args.json:
        print_json({"adapter": args.out, **kept.to_json()})
    else:
        _show(args.out, kept)


def _show(out: str, kept: Kept) -> None:
    ranks = sorted(kept.ranks.values())
    low_rank = f"{len(ranks)} linear maps of rank {ranks[0]} to {ranks[-1]}" if ranks else "no linear map"
    print(printable(f"{out}: {low_rank}; {100 * kept.energy:.4g} % of the update's squared length is kept."))
    if kept.saved:
        print(printable(f"Saved whole: {_listed(kept.saved)}."))
    if kept.dropped:
        share = 100 * kept.share_of(kept.dropped)
        print(printable(f"Not in the adapter: {_listed(kept.dropped)}: {share:.2g} % of the update."))


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
