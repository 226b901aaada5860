"""`contmerge statistics`: measure an expert for merge rules with statistics.

Training writes the same files.

contmerge statistics experts/law --data law.jsonl
contmerge statistics path/to/adapter --data owner/texts --examples 64
torchrun --nproc-per-node 2 --no-python contmerge statistics experts/law --data law.jsonl
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hf_contmerge.commands._arguments import add_cpu_argument, compute_on
from hf_contmerge.errors import RecipeError
from hf_contmerge.run.recipe.parts import Dataset, StatisticsSettings
from hf_contmerge.runtime.foreign import expanded

if TYPE_CHECKING:
    from hf_contmerge.training.statistics import Measured


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge statistics`."""
    known = StatisticsSettings()
    parser.add_argument("model", metavar="MODEL", help="a trained model or a peft adapter; a folder or a Hub id")
    parser.add_argument("--data", required=True, metavar="FILE", help="its training data: a file or a Hub id")
    parser.add_argument("--text", metavar="COLUMN", help="the column with text, or a format over columns")
    parser.add_argument("--base", metavar="MODEL", help="the pretrained model (default: an adapter's own, or MODEL)")
    parser.add_argument("--out", metavar="DIR", help="output folder (default: MODEL/statistics)")
    parser.add_argument(
        "--kind", choices=("inputs", "fisher"), default="inputs", help="what to measure (default: inputs)"
    )
    for word, what in (
        ("examples", "read at most N examples"),
        ("batch-size", "N examples per batch"),
        ("max-length", "cut examples after N tokens"),
    ):
        default = getattr(known, word.replace("-", "_"))
        parser.add_argument(f"--{word}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    add_cpu_argument(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="allow the model's own code to run")
    parser.set_defaults(do=statistics_command)


def statistics_command(args: argparse.Namespace) -> None:
    """Measure an expert and write its statistics."""
    compute_on(cpu=args.cpu)
    from hf_contmerge.runtime.launching import join_ranks, keep_freed_memory, leave_ranks
    from hf_contmerge.training.statistics import measure_expert

    settings, out = _settings(args), _out(args)
    keep_freed_memory()
    ranks, crew = join_ranks()
    measured = crew.ranks.main_first(_look_up, args, settings)
    found = measure_expert(measured, out)
    leave_ranks()
    if ranks.is_main_process:
        what = "linear maps" if args.kind == "inputs" else "weights"
        print(f"{out}: {len(found.moments)} {what}, {found.tokens:,} tokens")


def _settings(args: argparse.Namespace) -> StatisticsSettings:
    fields = {"kinds": (args.kind,), **{w: getattr(args, w) for w in ("examples", "batch_size", "max_length")}}
    try:
        return StatisticsSettings.model_validate(fields)
    except ValidationError as error:
        wrong = str(error.errors()[0]["loc"][0])
        raise RecipeError(f"--{wrong.replace('_', '-')} {fields[wrong]}: expected 1 or more.") from error


def _out(args: argparse.Namespace) -> Path:
    from hf_contmerge.models.statistics import FOLDER

    folder = expanded(args.model)
    if not args.out and not folder.is_dir():
        raise RecipeError(
            f"{args.model} is not a local folder, so its statistics need a destination. Give --out; or download the "
            f"expert, because rules look for statistics in its folder, under {FOLDER}/."
        )
    return Path(args.out) if args.out else folder / FOLDER


def _look_up(args: argparse.Namespace, settings: StatisticsSettings) -> Measured:
    """Find the model, its base and the data.

    Raises:
        ContmergeError: a user error.
    """
    from hf_contmerge.models.folder import is_adapter, resolve_model
    from hf_contmerge.models.layout import check_loads, check_same_layout, check_tokenizer
    from hf_contmerge.training.data import load_stage_data
    from hf_contmerge.training.job import base_of
    from hf_contmerge.training.statistics import Measured

    expert = resolve_model(args.model, adapters=True)
    base = resolve_model(args.base) if args.base else base_of(expert)
    check_tokenizer(base)
    check_loads(base, trusted=args.trust_remote_code)
    if base != expert and not is_adapter(expert):
        check_same_layout(base, expert)
    fields: dict[str, Any] = {"path": args.data, "text": args.text, "heldout": 0, "max_examples": settings.examples}
    data = load_stage_data(Dataset.model_validate(fields), seed=0)
    return Measured(expert, base, data, settings, args.trust_remote_code)
