"""`contmerge gate`: may a candidate take a model's place? For continuous integration.

    contmerge gate owner/model runs/x --tasks arc_easy,law --max-loss 0.01

Both models are measured on the same documents, as by `contmerge score`; cached scores are instant.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from hf_contmerge.commands._arguments import compute_on, number_from, print_json
from hf_contmerge.commands._models import ANY_MODEL, opened_model
from hf_contmerge.commands.score import Answer, add_measuring, measured, output_file, score_request
from hf_contmerge.errors import LossError, ResourceError
from hf_contmerge.runtime.files import write_atomically
from hf_contmerge.runtime.hiding import printable

if TYPE_CHECKING:
    from hf_contmerge.scoring.forgetting.gate import Gate

_SUMMARY = "GITHUB_STEP_SUMMARY"
_WHAT = """Exit codes: 0 if the candidate passes, and if the documents do not tell
(4 with --strict); 3 for a proven loss; 2 for an error.

A loss is proven, or ruled out, by the interval of the difference, paired by
document. With several tasks the intervals hold for all of them together."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `contmerge gate`."""
    parser.description = f"{parser.description}\n\n{_WHAT}"
    parser.add_argument("base", metavar="BASE", help=ANY_MODEL)
    parser.add_argument("candidate", metavar="CANDIDATE", help="the model that may take its place")
    parser.add_argument(
        "--max-loss", type=number_from(0, math.inf, "a number such as 0.01"), default=0.01, metavar="X",
        help="loss allowed on each task: a share of accuracy, or nats (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--confidence",
        type=number_from(0.51, 1, "a number such as 0.95"),
        default=0.95,
        metavar="C",
        help="of the verdict (default: 0.95)",
    )
    parser.add_argument("--strict", action="store_true", help="exit with 4 where the documents do not tell")
    parser.add_argument("--json", metavar="OUT", nargs="?", const="", help="print JSON; or also write it to a file")
    parser.add_argument("--markdown", metavar="OUT", help=f"write Markdown (also added to ${_SUMMARY}, if set)")
    add_measuring(parser)
    parser.set_defaults(do=gate_command)


def gate_command(args: argparse.Namespace) -> None:
    """Measure both models and print the verdict.

    Raises:
        LossError: a loss is proven; with --strict, also if it cannot be ruled out.
        ContmergeError: a user error.
    """
    from hf_contmerge.report.gate import gate_json, print_gate

    compute_on(cpu=args.cpu)
    outs = output_file("--json", args.json), output_file("--markdown", args.markdown)
    request = score_request(args)
    with ExitStack() as stack:
        names = [stack.enter_context(opened_model(name)) for name in (args.base, args.candidate)]
        models = dict.fromkeys(names)
        answers = dict(zip(models, measured(models, request), strict=False))
    if not answers:
        return  # another rank prints
    gate = _judged(args, answers[names[0]], answers[names[-1]])
    if args.json == "":
        print_json(gate_json(gate))
    else:
        print_gate(gate)
    _write(gate, *outs)
    _end(gate, strict=args.strict)


def _judged(args: argparse.Namespace, old: Answer, new: Answer) -> Gate:
    from hf_contmerge.scoring.forgetting.gate import Gate, judge_tasks

    tasks = judge_tasks(old.scores, new.scores, args.max_loss, args.confidence)
    same = old.model == new.model
    return Gate(args.base, args.candidate, tasks, args.max_loss, args.confidence, same)


def _write(gate: Gate, facts: Path | None, page: Path | None) -> None:
    """Write the requested files and the summary of a GitHub job."""
    from hf_contmerge.report.gate import gate_json, gate_markdown

    markdown, summary = printable(gate_markdown(gate)), os.environ.get(_SUMMARY)
    if facts:
        write_atomically(facts, printable(json.dumps(gate_json(gate), indent=1)) + "\n")
    if page:
        write_atomically(page, markdown)
    if summary:
        try:
            with open(summary, "a", encoding="utf-8") as file:  # other steps write to it too
                file.write(f"{markdown}\n")
        except OSError as error:
            raise ResourceError(f"Cannot write ${_SUMMARY} ({summary}): {error.strerror}.") from error


def _end(gate: Gate, *, strict: bool) -> None:
    if gate.verdict == "proven loss":
        names = ", ".join(task.task for task in gate.having("proven loss"))
        raise LossError(f"{gate.candidate} lost more than {gate.max_loss:g} on {names}: proven.", proven=True)
    if gate.verdict == "undecided" and strict:
        raise LossError(
            "The documents do not tell if the candidate lost too much. Measure more of them (--limit), or allow a "
            "larger loss (--max-loss).",
            proven=False,
        )
