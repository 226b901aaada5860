"""A run's findings in words. Pure functions of scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hf_contmerge.report._results import Results, line_label, scopes
from hf_contmerge.run.places import IN_CONTEXT
from hf_contmerge.run.scores import Block
from hf_contmerge.scoring.forgetting.lines import Line
from hf_contmerge.scoring.forgetting.paired import Change

UNITS = {
    "accuracy": "share of right answers, 0 to 1",
    "perplexity": "-ln(perplexity), in nats per word for word_perplexity; higher is better; 0.1 nats is about 10 %",
}


@dataclass(frozen=True)
class Metric:
    """The words for a metric, and how its number is written."""

    short: str
    meaning: str
    signed: bool = False
    """Show a plus sign."""
    unit: bool = True
    """In the block's unit; a share has none."""


METRICS = {
    "acc": Metric("ACC", "mean utility over the stages learnt so far, at the end"),
    "aia": Metric("AIA", "ACC after each stage, averaged over the run"),
    "la": Metric("LA", "mean utility of each stage right after it was learnt"),
    "bwt": Metric("BWT", "mean change of earlier stages since they were learnt; negative is forgetting", signed=True),
    "bwt_per_stage": Metric(
        "BWT/T", "BWT summed and divided by the number of all stages, as TRACE defines it", signed=True
    ),
    "forgetting": Metric("F", "mean drop of earlier stages from their best; higher is worse"),
    "fwt": Metric("FWT", "mean gain over the base on a stage before it is learnt; needs `matrix: full`", signed=True),
    "intransigence": Metric(
        "I", "intransigence: shortfall of the last stage against joint training on all stages; higher is worse"
    ),
    "against_alone": Metric(
        "against alone", "mean shortfall of each stage, when learnt, against its single-stage expert; higher is worse"
    ),
    "normalised": Metric(
        "of expert",
        "share of the single-stage experts' gain over the base that the final model keeps; 1 is all",
        unit=False,
    ),
    "joint_kept": Metric(
        "of joint", "share of joint training's gain over the base that the final model has; 1 is all", unit=False
    ),
    "general_delta": Metric("general Δ", "mean change of the general tasks against the base", signed=True),
    "lost": Metric(
        "right → wrong",
        "documents of earlier stages that were right when learnt and are wrong now, beyond guessing",
        signed=True,
    ),
    "regained": Metric(
        "wrong → right",
        "documents of earlier stages that were wrong when learnt and are right now, beyond guessing",
        signed=True,
    ),
    "general_lost": Metric(
        "general right → wrong", "documents of general tasks that the base had right, beyond guessing", signed=True
    ),
    "general_gained": Metric(
        "general wrong → right", "documents of general tasks that the base had wrong, beyond guessing", signed=True
    ),
    "fuar": Metric(
        "FUAR",
        "right answers lost on earlier stages and general tasks, per right answer gained on the stages",
        unit=False,
    ),
}
"""Name in summary.json -> words: the only place with words for metrics."""
UNMEASURED = "General abilities were not measured: the recipe has no `evaluate.general_tasks`."
_ALWAYS = ("acc", "la", "bwt")  # a BWT near 0 says nothing without LA


def known_metrics(lines_metrics: Iterable[Mapping[str, float | None]]) -> list[str]:
    """Return the measured metrics in the order of METRICS."""
    lines = list(lines_metrics)
    return [name for name in METRICS if name in _ALWAYS or any(values.get(name) is not None for values in lines)]


def amount(value: float, block: Block, *, sign: bool = True) -> str:
    """Return a difference of utilities with its unit."""
    number, digits, unit = (value, 2, "nats") if block == "perplexity" else (100 * value, 1, "points")
    rounded = round(number, digits) + 0.0  # no "-0.00"
    return f"{rounded:{'+' if sign and rounded else ''}.{digits}f} {unit}".replace("-", "−")


def smallest(results: Results) -> str:
    """Return the smallest relevant differences, in words."""
    return " or ".join(amount(results.matters.get(b, 0.0), b, sign=False) for b in results.blocks())


def relative(value: float, block: Block) -> str:
    """Format a change as a perplexity ratio or as points."""
    if block == "accuracy":
        return amount(value, block)
    ratio = math.exp(-value)
    return f"× {ratio:.1f}" if ratio >= 1.95 else f"× {ratio:.2f}"


def interval(change: Change, block: Block) -> str:
    """Format a confidence interval in the change's unit."""
    if change.low is None or change.high is None:
        return "unknown"
    return " to ".join(amount(limit, block).split()[0] for limit in (change.low, change.high))


def natural(value: float, block: Block) -> str:
    """Format a score: a perplexity, or an accuracy in percent."""
    if block == "accuracy":
        return f"{100 * value:.1f}%"
    if value >= 1e5:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2}f}"


def fate(change: Change | None, block: Block) -> str:
    """Describe the fate of a stage."""
    if change is None:
        return "was not measured"
    if change.sign == 0:
        return f"{'is the same' if change.same else 'shows no change'} ({amount(change.mean, block)})"
    return f"{'gained' if change.sign > 0 else 'forgot'} {amount(abs(change.mean), block, sign=False)}"


def outcome(change: Change | None, block: Block, what: str) -> str:
    """Describe the fate of a stage with its amount."""
    if change is None:
        return "was not measured"
    verb = "is the same on" if change.same else ("shows no change on", "got better on", "forgot")[change.sign]
    return f"{verb} {what} ({'perplexity ' * (block == 'perplexity')}{relative(change.mean, block)})"


def headline(results: Results) -> str:
    """Return the finding of the whole run in one sentence."""
    stages = f"After {results.last} stage{'s' * (results.last != 1)}"
    what = "the earlier ones" if results.last > 2 else "the first"
    for block in results.stage_blocks():
        if results.last > 1:
            clauses = compared(results, lambda line, b=block: outcome(results.kept(line, b), b, what))
        else:
            clauses = compared(results, lambda line, b=block: "gained " + gained(results.learnt(line, b), b))
        if clauses:
            again = [t.replace(f" {what} (", " them (" if results.last > 2 else " it (") for t in clauses[1:]]
            return f"{stages}, " + "; ".join([clauses[0], *again])
    return f"{stages}, nothing to compare yet" if results.last else "Nothing has been learnt yet"


def caption(results: Results) -> str:
    """Return the caption: learning first, then how to read the picture."""
    gains = []
    for block in results.stage_blocks() if results.last > 1 else ():
        clauses = compared(results, lambda line, b=block: gained(results.learnt(line, b), b))
        gains.append(f"Mean gain on each stage when it was learnt, {block}: {'; '.join(clauses)}. " if clauses else "")
    return (
        "".join(gains) + "Bars: 95 % intervals, paired by document. Hollow marker: no change seen, or less than "
        f"{smallest(results)} (a stage since it was learnt, general ability against the base). ★: an expert trained on "
        "that stage alone. 0.1 nats is about 10 % of the perplexity."
        + " Dashed line: an expert trained on all stages at once." * (results.joint is not None)
        + f" {UNMEASURED}" * (not results.general_tasks)
        + _left_out(results)
    )


def _left_out(results: Results) -> str:
    shown = len(results.shown)
    return "" if shown == results.last else f" {shown} of {results.last} stages are shown; all are in scores.csv."


def compared(results: Results, describe: Callable[[Line], str]) -> list[str]:
    """Summarise plain fine-tuning and the best merge to date."""
    best = next((line for b in results.stage_blocks() if (line := results.best(b))), None)
    name = best.name + ", the best merge," * (len(results.merges) > 1) if best else ""
    if best and (lossy := results.lossy(best)):
        name += f" ({lossy.taken})"
    named = [(line_label("previous"), results.baseline), (name, best)]
    return [f"{name} {describe(line)}" for name, line in named if line and len(line.rows) == results.last + 1]


def gained(change: Change | None, block: Block) -> str:
    """Format a change, or report it as not measured."""
    return amount(change.mean, block) if change else "not measured"


def verdict(results: Results, line: Line) -> str:
    """Compare a merge with plain fine-tuning and the mean expert."""
    plain = results.baseline
    if len(line.rows) < 2:
        return "not measured yet."
    t = min(len(line.rows), len(plain.rows)) - 1 if plain else len(line.rows) - 1
    parts = [f"after {t} stage{'s' * (t != 1)}, this run has no plain fine-tuning to compare with"]
    if plain:
        parts = [_against(results, line, plain, t)]
    mean = next((m for m in results.merges if m.name == results.mean_of_experts != line.name and len(m.rows) > t), None)
    for block in results.stage_blocks() if mean else ():
        assert mean
        if change := results.overall(line, mean, t, block):
            parts.append(f"against the mean of the experts: {_scope_text(change, block, 'over all stages')}")
    parts += [
        f"{100 * kept:.0f} % of joint training's gain ({block})".replace("-", "−")
        for block in results.stage_blocks()
        if (kept := line.metrics(results.stages, (), block)["joint_kept"]) is not None
    ]
    parts += _against_examples(results, line)
    if lossy := results.lossy(line):
        parts.append(f"{lossy.taken}, so this does not judge the rule: {lossy.advice()}")
    return "; ".join(parts) + "."


def _against_examples(results: Results, line: Line) -> list[str]:
    """Compare a merge with the base behind training examples."""
    shown = results.expert(IN_CONTEXT)
    if not shown or len(shown.rows) != len(line.rows):
        return []
    scores = list(shown.rows[-1].values())
    facts = [score.details["shown"] for score in scores if "shown" in score.details]
    cut, documents = sum(fact["cut"] for fact in facts), sum(len(score.gains) for score in scores)
    name = f"the base with {max((fact['shots'] for fact in facts), default=0)} examples in its prompt"
    name += f" (cut for {cut} of {documents} documents)" if cut else ""
    return [
        f"against {name}: {_scope_text(change, block, 'over all stages')}"
        for block in results.stage_blocks()
        if (change := results.overall(line, shown, len(line.rows) - 1, block))
    ]


def _against(results: Results, line: Line, plain: Line, t: int) -> str:
    new, old = line.rows[t], plain.rows[t]
    last = results.stages[t - 1].name
    words = {"last stage": f"on {last}, the last one" if t > 1 else f"on {last}", "general": "on general tasks"}
    if t > 1:
        words = {"all stages": "over all stages", "earlier stages": "on the earlier", **words}
    parts = []
    for block in results.blocks():
        groups = scopes(results.stages[:t], results.general_tasks, new, old)
        parts += [
            _scope_text(change, block, where)
            for scope, where in words.items()
            if (change := results.mean_change(groups[scope], block))
        ]
    comparison = "; ".join(parts) or "nothing to compare yet"
    return f"after {t} stage{'s' * (t != 1)}, against plain fine-tuning: {comparison}"


def _scope_text(change: Change, block: Block, where: str) -> str:
    if change.stderr is None:
        return f"too few documents {where} ({amount(change.mean, block)})"
    return f"{change.seen} {where} ({amount(change.mean, block)}, {interval(change, block)})"


def badge(results: Results, line: Line) -> str:
    """Return better, worse or same, over all stages of the first block."""
    plain = results.baseline
    t = min(len(line.rows), len(plain.rows)) - 1 if plain else 0
    if not plain or t < 1:
        return "same"
    changes = [c for b in results.stage_blocks() if (c := results.overall(line, plain, t, b))]
    word = ("same", "better", "worse")[changes[0].sign] if changes else "same"
    return "same" if word == "worse" and results.lossy(line) else word  # not the rule's fault
