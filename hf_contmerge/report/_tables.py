"""The report's tables and sections; templates give them their look."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hf_contmerge.report._findings import (
    METRICS,
    UNITS,
    amount,
    interval,
    known_metrics,
    natural,
    relative,
)
from hf_contmerge.report._results import Results, any_score, scopes, task_facts
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import IN_CONTEXT, JOINT, ORACLE, ROUTED, Place
from hf_contmerge.run.recipe.phases import PHASES, Phase
from hf_contmerge.run.scores import Block, Scores
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.paired import Change

MISSING = "–"
_METRIC_UNITS: dict[Block, str] = {"perplexity": "nats", "accuracy": "shares"}
_AT_THE_END = ("acc", "la", "bwt", "general_delta")
_KEPT = 300  # characters; scores keep no more of a document


@dataclass(frozen=True)
class Cell:
    """A formatted value with tooltip, shade and highlight.

    The shade is from -1 (worse) to 1 (better).
    """

    text: str = MISSING
    hint: str = ""
    shade: float = 0.0
    marked: bool = False

    @property
    def way(self) -> str:
        return "up" if self.shade > 0 else "down" if self.shade < 0 else ""

    @property
    def strength(self) -> float:
        """How opaque the shade is."""
        return 0.08 + 0.5 * min(abs(self.shade), 1)


@dataclass(frozen=True)
class Table:
    """A table with a heading; cells of the first column are names."""

    title: str
    header: tuple[str, ...]
    rows: list[list[Cell]]
    judged: bool = True
    """A shade means better or worse, not more or less."""
    wraps: bool = False
    """Cells hold words: they wrap, and are listed below each other on a phone."""


@dataclass(frozen=True)
class Quote:
    """A document as an example: source, beginning, answers of the models."""

    source: str
    text: str
    outcome: str

    @property
    def beginning(self) -> str:
        """The text on one line, with dots where it was cut."""
        return " ".join(self.text.split()) + " …" * (len(self.text) >= _KEPT)


@dataclass(frozen=True)
class Picture:
    """An SVG picture with a description."""

    svg: str
    alt: str


@dataclass(frozen=True)
class Section:
    """A part of the report with a heading; left out if empty."""

    title: str
    intro: str = ""
    tables: Sequence[Table] = field(default=())
    quotes: Sequence[Quote] = field(default=())
    pictures: Sequence[Picture] = field(default=())

    @property
    def empty(self) -> bool:
        return not (self.tables or self.quotes or self.pictures)


def answer_table(results: Results) -> Table:
    """Return the first table: lines down, changes against the base across."""
    t = results.last
    asked = ("earlier stages", "last stage", "general") if t > 1 else ("last stage", "general")
    titles = {"last stage": f"last stage ({results.stages[t - 1].name})"} if t else {}
    groups = {
        name: scopes(results.stages[:t], results.general_tasks, line.rows[-1], results.base)
        for name, line in results.named_lines()
        if len(line.rows) == t + 1 > 1 and (t == 1 or line is not results.expert("base"))  # knows one stage each
    }
    changes: dict[tuple[str, Block], dict[str, Change | None]] = {
        (scope, block): {name: results.mean_change(group[scope], block) for name, group in groups.items()}
        for scope in asked
        for block in results.blocks()
    }
    measured = {key: of for key, of in changes.items() if any(of.values())}
    rows = [[Cell(name), *(answer_cell(of[name], block) for (_, block), of in measured.items())] for name in groups]
    header = ("against the base", *(f"{titles.get(scope, scope)}, {block}" for scope, block in measured))
    return Table("", header, rows, wraps=True)


def answer_cell(change: Change | None, block: Block) -> Cell:
    """Return a change in words and numbers."""
    if change is None:
        return Cell("not measured")
    limits = "" if change.low is None else f" ({interval(change, block)})"
    ratio = f", perplexity {relative(change.mean, block)}" if block == "perplexity" else ""
    word = change.seen if change.low is not None else "too few documents"
    return Cell(f"{word}: {amount(change.mean, block)}{limits}{ratio}", shade=0.4 * change.sign)


def score_grid(results: Results) -> list[Table]:
    """Return all scores: tasks across, stages of each line down."""
    tasks = [t for b in results.blocks() for t in results.shown_tasks
             if (s := any_score(results, t)) and s.block == b]  # fmt: skip
    learnt = {task: t for t, stage in enumerate(results.stages, 1) for task in stage.task_names()}
    blocks = {t: s.block for t in tasks if (s := any_score(results, t))}
    largest = {b: _largest(results, [t for t in tasks if blocks[t] == b]) for b in results.blocks()}
    rows = [[Cell("base"), Cell(""), *(score_cell(results, results.base, k, 0) for k in tasks)]]
    for name, line in results.named_lines():
        shown = [t for t in results.shown if t < len(line.rows) and line.rows[t]]
        for t in shown:
            cells = [score_cell(results, line.rows[t], k, largest[blocks[k]], own=learnt.get(k) == t)
                     for k in tasks]  # fmt: skip
            rows.append([Cell(name if t == shown[0] else ""), Cell(results.stages[t - 1].name), *cells])
    return [Table("", ("line", "after", *tasks), rows)] if len(rows) > 1 else []


def _largest(results: Results, tasks: Sequence[str]) -> float:
    """Return the largest change against the base: the darkest shade."""
    lines, base = (*results.experts, *results.merges), results.base
    changes = [abs(row[t].utility - base[t].utility) for x in lines for row in x.rows for t in tasks
             if t in row and t in base]  # fmt: skip
    return max(changes, default=0.0)


def score_cell(results: Results, row: Scores, task: str, largest: float, *, own: bool = False) -> Cell:
    """Return a score, shaded by its proven change against the base."""
    score = row.get(task)
    if score is None:
        return Cell()
    hint, shade = f"utility {score.utility:.4f}", 0.0
    base = results.base
    change = results.change(row, base, [task], score.block) if task in base and row is not base else None
    if change:
        against = f"{amount(change.mean, score.block)} against the base, {interval(change, score.block)}"
        hint += f"; {against}" + (f"; {change.seen}" if change.sign == 0 else "")
        shade = change.mean / largest if largest and change.sign else 0.0
    return Cell(natural(score.value, score.block), hint, shade, own)


def change_cell(change: Change | None, block: Block) -> Cell:
    """Return a change with its interval, shaded if it is proven."""
    if change is None:
        return Cell()
    if change.low is None or change.high is None:
        return Cell(f"{amount(change.mean, block)} (too few documents)")
    least = "" if change.detectable is None else f"detectable: {amount(change.detectable, block, sign=False)}"
    hint = least if change.sign else f"{change.seen}; {least}".rstrip("; ")
    mark = "" if change.sign else "≈ "
    return Cell(f"{mark}{amount(change.mean, block)} ({interval(change, block)})", hint, 0.4 * change.sign)


def metric_tables(results: Results) -> list[Table]:
    """Return a table of each line's metrics per block."""
    return [
        metric_table(
            {n: x.metrics(results.stages, results.general_tasks, block) for n, x in results.named_lines()}, block
        )
        for block in results.blocks()
    ]


def metric_table(metrics: Mapping[str, Mapping[str, float | None]], block: Block) -> Table:
    """Return a table of measured metrics. `found`: line -> metrics."""
    names = known_metrics(metrics.values())
    rows = [[Cell(line), *(metric_cell(values[m], block, m) for m in names)] for line, values in metrics.items()]
    title = f"Metrics, {block}, in {_METRIC_UNITS[block]}"
    return Table(title, ("line", *(METRICS[m].short for m in names)), rows)


def metric_cell(value: float | None, block: Block, name: str) -> Cell:
    """Return a metric; `name`: as METRICS has it."""
    if value is None:
        return Cell()
    metric = METRICS[name]
    return Cell(_number(value, name), f"{metric.meaning}; {UNITS[block]}" if metric.unit else metric.meaning)


def estimate_cell(mean: float | None, change: Change | None, block: Block, name: str) -> Cell:
    """Return a metric with its interval, if it has one."""
    cell = metric_cell(mean, block, name)
    if mean is None or change is None or change.low is None or change.high is None:
        return cell
    return replace(cell, text=f"{cell.text} ({_number(change.low, name)} to {_number(change.high, name)})")


def _number(value: float, name: str) -> str:
    return f"{value + 0.0:{'+' * METRICS[name].signed}.3f}".replace("-", "−")


def final_table(results: Results, block: Block) -> Table:
    """Return metrics and last scores; only metrics if tasks are many."""
    tasks = [t for t in task_facts(results) if (s := any_score(results, t)) and s.block == block]
    tasks = tasks if len(tasks) <= 4 else []
    largest = _largest(results, tasks)
    rows = [[Cell("base"), *(score_cell(results, results.base, t, 0) for t in tasks), *[Cell()] * len(_AT_THE_END)]]
    for name, line in results.named_lines():
        values = line.metrics(results.stages, results.general_tasks, block)
        last = [score_cell(results, line.rows[-1], t, largest) for t in tasks]
        rows.append([Cell(name), *last, *(metric_cell(values[m], block, m) for m in _AT_THE_END)])
    header = ("", *tasks, *(METRICS[m].short for m in _AT_THE_END))
    return Table(f"{block} at the end (metrics in {_METRIC_UNITS[block]})", header, rows)


def task_tables(results: Results) -> list[Table]:
    """Return a table per task: scores after each stage, and changes."""
    tables = []
    facts_of = task_facts(results)
    for task in results.shown_tasks:
        facts = facts_of[task]
        if facts["block"] and task in results.base:
            tables.append(_task_table(results, task, facts["block"], facts["stage"]))
    return tables


def _task_table(results: Results, task: str, block: Block, stage: str | None) -> Table:
    learnt = next((t for t, s in enumerate(results.stages, 1) if s.name == stage), 0)
    names, shown = ["base", *(s.name for s in results.stages)], (0, *results.shown)
    after = [names[t] for t in shown]
    largest, rows = _largest(results, [task]), []
    for name, line in results.named_lines():
        if not any(task in row for row in line.rows[1:]):
            continue
        measured = [t for t in shown if t < len(line.rows)]
        cells = [score_cell(results, line.rows[t], task, largest, own=t == learnt > 0) for t in measured]
        cells += [Cell()] * (len(after) - len(cells))
        last = line.rows[-1] if task in line.rows[-1] else {}
        changes = [results.change(last, results.base, [task], block) if last else None]
        if 0 < learnt < results.last:
            there = last and len(line.rows) > learnt + 1 and task in line.rows[learnt]
            changes.append(results.change(last, line.rows[learnt], [task], block) if there else None)
        rows.append([Cell(name), *cells, *(change_cell(c, block) for c in changes), _detectable(changes[-1], block)])
    since = ("since it was learnt",) if 0 < learnt < results.last else ()
    title = f"{task} ({'stage ' + stage if stage else 'general'}, {len(results.base[task].gains)} documents)"
    return Table(title, ("line", *after, "against the base", *since, "detectable"), rows)


def sides_tables(results: Results) -> list[Table]:
    """Return a table per line: lost and regained documents."""
    tasks = [task for task, facts in task_facts(results).items() if facts["block"] == "accuracy"]
    tables = [_sides_table(results, name, line, tasks) for name, line in results.named_lines()]
    return [table for table in tables if table.rows]


def _sides_table(results: Results, name: str, line: Line, tasks: Sequence[str]) -> Table:
    numbers = range(1, len(line.rows))
    rows = [[Cell(task), *(_sides_cell(results, line, t, task) for t in numbers)] for task in tasks]
    header = ("after", *(results.stages[t - 1].name for t in numbers))
    return Table(name, header, [row for row in rows if any(cell.text != MISSING for cell in row[1:])])


def _sides_cell(results: Results, line: Line, t: int, task: str) -> Cell:
    lost, gained = (results.flips(line, t, task, to) for to in ("wrong", "right"))
    if lost is None or gained is None:
        return Cell()
    text = " / ".join(amount(c.mean, "accuracy").removesuffix(" points") for c in (lost, gained))
    hint = "; ".join(f"{to} {interval(c, 'accuracy')}" for to, c in (("now wrong", lost), ("now right", gained)))
    return Cell(text, hint, 0.4 * (lost.sign + gained.sign))


def _detectable(change: Change | None, block: Block) -> Cell:
    """Return the smallest change with 80 % power on these documents."""
    if change is None or change.detectable is None:
        return Cell()
    return Cell(amount(change.detectable, block, sign=False))


@dataclass(frozen=True)
class Cost:
    """The cost of a phase at a place."""

    what: str
    """The place's folder in the run."""
    phase: str
    seconds: float | None
    peak_memory: int | None
    """Bytes."""
    device: str
    processes: int | None
    shared: bool = False
    """Spent by another run of the study, whose expert this run links."""


def costs(run: Run) -> list[Cost]:
    """Return seconds and peak memory of each finished phase."""
    spent = []
    for _, place in run.places():
        for phase in PHASES[:-1]:
            if place.is_done(phase):
                r = place.record(phase)
                where = str(place.folder.relative_to(run.folder))
                spent.append(Cost(where, phase, r.get("seconds"), r.get("peak_memory_bytes"),
                                  r.get("device", ""), r.get("processes"), "shared" in r))  # fmt: skip
    return spent


def line_cost(run: Run, line: Line, *, merged: bool) -> tuple[float, int | None]:
    """Return the seconds and peak bytes behind a line's last model.

    Its trainings and merges count, also those that another run of the study has done; measuring does not.
    """
    done = [place.record(phase) for place, phase in _work(run, line.name, merged=merged) if place.is_done(phase)]
    peaks = [r["peak_memory_bytes"] for r in done if r.get("peak_memory_bytes") is not None]
    return math.fsum(r.get("seconds") or 0.0 for r in done), max(peaks, default=None)


def _work(run: Run, name: str, *, merged: bool) -> Iterator[tuple[Place, Phase]]:
    """Yield the trainings and merges behind a line."""
    if merged:
        entry = next(e for e in run.recipe.merge if e.name == name)
        merges = [run.merged(t, entry) for t in run.stage_numbers()]
        for place in merges:
            yield place, "merge"
        name = merges[-1].record("merge").get("start_from", "base") if merges[-1].is_done("merge") else "base"
    if name == JOINT:
        yield run.joint, "train"
    elif name != IN_CONTEXT:
        kind = "base" if name in (ROUTED, ORACLE) else name
        for t in run.stage_numbers():
            yield run.expert(t, kind), "train"


def cost_tables(spent: Sequence[Cost]) -> list[Table]:
    """Return the sum of each phase, and each phase of each place."""
    rows = []
    for phase in [p for p in PHASES if any(c.phase == p for c in spent)]:
        these = [c for c in spent if c.phase == phase]
        rows.append([Cell(phase), Cell(str(len(these))), *_spent(these)])
    rows.append([Cell("all"), Cell(str(len(spent))), *_spent(spent)])
    total = sum(c.seconds or 0.0 for c in spent)
    each = [[Cell(c.what), Cell(c.phase), *_spent([c], total)] for c in spent]
    header = ("phase", "how often", "time", "peak memory")
    return [Table("Time and memory per phase", header, rows),
            Table("One by one", ("what", "phase", "time", "peak memory"), each)]  # fmt: skip


def _spent(these: Sequence[Cost], total: float = 0.0) -> list[Cell]:
    seconds = sum(c.seconds or 0.0 for c in these)
    peaks = [c.peak_memory for c in these if c.peak_memory is not None]
    time = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    share = f"{100 * seconds / total:.0f} % of all" if total else ""
    return [Cell(time, share), Cell(f"{max(peaks) / 2**30:.1f} GiB") if peaks else Cell()]
