"""`contmerge merge rank`: helpful and harmful experts for texts."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_contmerge.commands._arguments import add_cpu_argument, add_json_argument, compute_on, print_json, words_of
from hf_contmerge.errors import RecipeError

if TYPE_CHECKING:
    from hf_contmerge.merging.state import MergeState
    from hf_contmerge.models.weights import Weights
    from hf_contmerge.scoring.relevance import Direction, Effect, Text


def add_rank(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge merge rank`."""
    parser.add_argument("experts", nargs="+", metavar="EXPERT", help="full models or peft adapters; folders or Hub ids")
    parser.add_argument(
        "--on", required=True, metavar="A[,B]", help="texts: files or Hub ids; the first decides the order"
    )
    parser.add_argument("--text", metavar="COLUMN", help="the column with text, or a format over columns")
    parser.add_argument("--since", metavar="MODEL", help="what the experts were trained from (default: the base)")
    parser.add_argument("--examples", type=int, default=16, metavar="N", help="documents of each text (default: 16)")
    parser.add_argument("--max-length", type=int, default=256, metavar="N", help="cut after N tokens (default: 256)")
    parser.add_argument("--step", type=float, default=0.25, metavar="A", help="step to measure (default: 0.25)")
    add_cpu_argument(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow the model's own code to run")
    add_json_argument(parser)


def rank_command(args: argparse.Namespace) -> None:
    """Print experts, the most relevant for the first text first.

    Raises:
        ContmergeError: a user error.
    """
    compute_on(cpu=args.cpu)
    _check(args)
    from hf_contmerge.loop.relevance import open_ranking
    from hf_contmerge.merging.state import MergeState
    from hf_contmerge.runtime.ranks import find_ranks
    from hf_contmerge.scoring.relevance import ranked

    def rank() -> None:
        state = MergeState.load(args.state)
        base = state.base()
        directions, texts = _directions(args, state, base), _texts(args, base.folder)
        effects = open_ranking(state.merge(), trusted=args.trust_remote_code).effects(directions, texts, args.step)
        order = ranked(effects, texts[0].name)
        found = [(directions[place].name, effects[place]) for place in order]
        _print_json(args, texts, found) if args.json else _print_table(args, texts, found)

    find_ranks().first(rank)


def _check(args: argparse.Namespace) -> None:
    for word, value in (("--examples", args.examples), ("--max-length", args.max_length)):
        if value < 2:
            raise RecipeError(f"{word} {value}: expected 2 or more.")
    if not 0 < args.step <= 1:
        raise RecipeError(f"--step {args.step:g}: expected a number above 0, up to 1.")
    if len(set(args.experts)) < len(args.experts):
        raise RecipeError("An expert is named twice. Name each once.")


def _directions(args: argparse.Namespace, state: MergeState, base: Weights) -> list[Direction]:
    from hf_contmerge.models.experts import open_expert
    from hf_contmerge.models.folder import resolve_model
    from hf_contmerge.scoring.relevance import Direction

    log = state.log()
    names = {log.base, log.base_folder}
    start = open_expert(resolve_model(args.since, adapters=True), base, base_names=names) if args.since else None
    opened = {name: open_expert(resolve_model(name, adapters=True), base, base_names=names) for name in args.experts}
    return [Direction(name, expert, base, start) for name, expert in opened.items()]


def _texts(args: argparse.Namespace, base: Path) -> list[Text]:
    """Load and tokenize the texts of `--on`."""
    from hf_contmerge.loop.relevance import Reader
    from hf_contmerge.run.recipe.parts import Dataset
    from hf_contmerge.training.data import load_stage_data

    reader = Reader(base, args.examples, args.max_length, args.trust_remote_code)
    texts = []
    for path in dict.fromkeys(words_of(args.on)):
        fields: dict[str, Any] = {"path": path, "text": args.text, "heldout": 0, "max_examples": args.examples}
        data = load_stage_data(Dataset.model_validate(fields), seed=0)
        texts.append(reader.text(path, data))
    if not texts:
        raise RecipeError(
            "--on names no text. Give files or Hub ids with commas, such as --on law.jsonl,general.jsonl."
        )
    return texts


Found = list[tuple[str, "dict[str, Effect]"]]


def _print_json(args: argparse.Namespace, texts: list[Text], found: Found) -> None:
    experts = [{"expert": name, "texts": {text: e.to_json() for text, e in effects.items()}} for name, effects in found]
    read = {text.name: {"documents": len(text.rows), "tokens": sum(map(len, text.rows))} for text in texts}
    print_json({"state": args.state, "step": args.step, "texts": read, "experts": experts})


def _print_table(args: argparse.Namespace, texts: list[Text], found: Found) -> None:
    """Print two tables per text."""
    from rich.console import Console
    from rich.table import Table

    from hf_contmerge.scoring.relevance import GROUPS

    console, step = Console(), f"{args.step:g}"
    names = _short([name for name, _ in found])
    for text in texts:
        gains = ("relevance", f"predicted at {step}", f"real at {step}", "predicted at 1")
        table = Table("expert", *gains, "", title=f"{text.name}: gain in nats per token")
        # In one table, 80 columns would cut all numbers off.
        groups = Table("expert", *GROUPS, title=f"{text.name}: relevance by group of weights")
        for name, (_, effects) in zip(names, found, strict=True):
            e = effects[text.name]
            shown = (_cosine(e.relevance), f"{e.predicted:+.3f}", _real(e), f"{e.whole:+.3f}", e.verdict)
            table.add_row(name, *shown)
            groups.add_row(name, *(_cosine(e.groups.get(group)) for group in GROUPS))
        console.print(table, groups)
    print("By the relevance for the first text. It ranks and explains; only scores of a merge can judge it.")


def _short(names: list[str]) -> list[str]:
    """Return the last parts of paths, if they differ."""
    last = [name.rstrip("/").rpartition("/")[2] for name in names]
    return last if len({*last}) == len(last) else names


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:+.3f}"


def _real(effect: Effect) -> str:
    change = effect.real
    if change.low is None or change.high is None:
        return f"{change.mean:+.3f}"
    return f"{change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
