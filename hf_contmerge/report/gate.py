"""A gate's verdict in words: terminal, Markdown, JSON."""

from __future__ import annotations

from typing import Any

from hf_contmerge import __version__
from hf_contmerge.report._findings import amount, interval, natural
from hf_contmerge.report._tables import Cell, Table
from hf_contmerge.report._templates import fill
from hf_contmerge.report._terminal import rich_table
from hf_contmerge.run.scores import Block
from hf_contmerge.runtime.versions import versions
from hf_contmerge.scoring.forgetting.gate import Gate, GatedTask

_SHADES = {"passes": 0.4, "undecided": 0.0, "proven loss": -0.4}


def sentences(gate: Gate) -> list[str]:
    """Return the verdict, and a sentence for each task behind it."""
    if gate.same_model:
        return [f"Passes: {gate.candidate} is {gate.base}, byte for byte."]
    if gate.verdict == "passes":
        return [f"Passes: no task lost more than is allowed ({_sure(gate)})."]
    losses = [_loss(task) for task in gate.having("proven loss")]
    doubts = [_doubt(task) for task in gate.having("undecided")]
    if losses:
        return [f"Proven loss ({_sure(gate)}).", *losses, *doubts]
    return [f"Not enough documents to tell: no loss is proven, and none is ruled out ({_sure(gate)}).", *doubts]


def _sure(gate: Gate) -> str:
    number = len(gate.tasks)
    return f"{100 * gate.confidence:g} % confidence" + (f" for all {number} tasks together" if number > 1 else "")


def _loss(task: GatedTask) -> str:
    change, block = task.change, task.new.block
    assert change.high is not None
    least = amount(-change.high, block, sign=False)
    return f"{task.task} lost {amount(-change.mean, block, sign=False)}, at least {least}; allowed: {_allowed(task)}."


def _doubt(task: GatedTask) -> str:
    change, block = task.change, task.new.block
    seen = f"{task.task}: {amount(change.mean, block)} ({interval(change, block)}) on {task.documents} documents"
    if change.low is None:
        return f"{seen}; one document has no interval."
    if task.enough is None:
        return f"{seen}; the difference is about as large as the loss allowed, {_allowed(task)}."
    return f"{seen}; allowed: {_allowed(task)}. About {_rounded(task.enough)} documents would tell, if it stays so."


def _rounded(number: int) -> str:
    return f"{int(float(f'{number:.1e}')):,}"


def _allowed(task: GatedTask) -> str:
    return allowed(task.max_loss, task.new.block)


def allowed(max_loss: float, block: Block) -> str:
    """Format a loss that is allowed, with all its digits."""
    return f"{max_loss:g} nats" if block == "perplexity" else f"{100 * max_loss:g} points"


def gate_table(gate: Gate) -> Table:
    """Return a row per task: both scores, the difference, the verdict."""
    header = ("task", "base", "candidate", "difference", "interval", "allowed loss", "documents", "verdict")
    return Table("", header, [_row(task, gate) for task in gate.tasks])


def _row(task: GatedTask, gate: Gate) -> list[Cell]:
    change, block = task.change, task.new.block
    verdict = "same model" if gate.same_model else task.verdict
    texts = [task.task, natural(task.old.value, block), natural(task.new.value, block), amount(change.mean, block)]
    texts += [interval(change, block), _allowed(task), str(task.documents)]
    return [*map(Cell, texts), Cell(verdict, shade=_SHADES[gate.verdict if gate.same_model else task.verdict])]


def print_gate(gate: Gate) -> None:
    """Print the table and the sentences."""
    from rich.console import Console

    console = Console()
    console.print(rich_table(gate_table(gate)), "")
    for sentence in sentences(gate):
        console.print(sentence, highlight=False, markup=False)


def gate_markdown(gate: Gate) -> str:
    """Return the verdict as Markdown."""
    return fill("gate.md", gate=gate, sentences=sentences(gate), table=gate_table(gate), version=__version__)


def gate_json(gate: Gate) -> dict[str, Any]:
    """Return the verdict for machines. Differences are utilities: negative is a loss."""
    return {
        "verdict": gate.verdict, "base": gate.base, "candidate": gate.candidate, "max_loss": gate.max_loss,
        "confidence": gate.confidence, "same_model": gate.same_model, "sentences": sentences(gate),
        "tasks": {task.task: _task_json(task) for task in gate.tasks}, "versions": versions(),
    }  # fmt: skip


def _task_json(task: GatedTask) -> dict[str, Any]:
    change = task.change
    return {
        "verdict": task.verdict, "block": task.new.block, "metric": task.new.metric, "base": task.old.value,
        "candidate": task.new.value, "change": change.mean, "low": change.low, "high": change.high,
        "interval_confidence": change.confidence, "documents": task.documents, "documents_to_decide": task.enough,
    }  # fmt: skip
