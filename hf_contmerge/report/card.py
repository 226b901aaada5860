"""The model card: a merged model's lineage and public recipe.

Missing scores are named as such.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hf_contmerge.errors import RunError
from hf_contmerge.merge_rules import named_rule
from hf_contmerge.models.config import chat_template
from hf_contmerge.report._changes import change_tables, seen_losses
from hf_contmerge.report._findings import METRICS, UNITS, UNMEASURED, headline, known_metrics
from hf_contmerge.report._front_matter import front_matter
from hf_contmerge.report._merges import stored
from hf_contmerge.report._parents import Licence, parents_of
from hf_contmerge.report._pictures import draw_forgetting
from hf_contmerge.report._public import (
    expert_of,
    hub_id,
    hub_model,
    public,
    public_mergekit_recipe,
    public_recipe,
)
from hf_contmerge.report._results import Results
from hf_contmerge.report._routes import route_table
from hf_contmerge.report._sources import stage_sources
from hf_contmerge.report._tables import Cell, Table, metric_table
from hf_contmerge.report._templates import fill
from hf_contmerge.report.write import load_results
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import FROM_BASE, IN_CONTEXT, JOINT, ORACLE, ROUTED, ExpertPlace, one_a_stage
from hf_contmerge.run.recipe.schema import Merge
from hf_contmerge.run.scores import BLOCKS, Block, Scores, TaskScore, load_scores
from hf_contmerge.runtime.hiding import without_secrets
from hf_contmerge.scoring.forgetting.lines import Line, load_lines

NOT_MEASURED = "not measured"
_AT_THE_END = {
    JOINT: "joint training, all stages at once",
    ROUTED: "separate experts, routed by the prompt",
    ORACLE: "separate experts, with an oracle",
    IN_CONTEXT: "the base model, with training examples in its prompt",
}
_ON_THE_CARD = (
    "acc", "la", "bwt", "normalised", "joint_kept", "general_delta", "lost", "regained", "general_lost",
    "general_gained", "fuar",
)  # fmt: skip


@dataclass(frozen=True)
class CardFacts:
    """What a push adds to the card of a merge."""

    repo_id: str | None = None
    licence: Licence = field(default_factory=Licence)
    picture: bytes | None = None
    branches: tuple[str, ...] = ()
    """Of the earlier stages."""
    with_state: bool = False
    documents: str | None = None
    """Repository of the results of each document."""
    results: Results | None = None
    """Of the run, loaded once for several cards."""


def draw_picture(results: Results) -> bytes | None:
    """Return the picture of a run as a PNG; None without scores."""
    file = io.BytesIO()
    if not results.blocks():
        return None
    draw_forgetting(results, file)
    return file.getvalue()


def model_card(run: Run, entry: Merge, *, t: int | None = None, facts: CardFacts | None = None) -> str:
    """Return the README.md of an entry's merge after stage t.

    `t`: by default the last merged stage. Raises RunError without one.
    """
    t, facts = t or last_merged(run, entry), facts or CardFacts()
    recipe, rule = run.recipe, named_rule(entry.rule)
    shown_id = facts.repo_id or (recipe.publish.repo_id if recipe.publish else recipe.name)
    merge = run.merged(t, entry).record("merge")
    lines = _lines(run, entry, t)
    metrics, results = _metrics(run, lines, t), facts.results or load_results(run)
    changes = change_tables(run, results, entry, t)
    return fill(
        "card.md",
        front_matter=_front_matter(run, entry, t, shown_id, facts.licence),
        facts=facts,
        licence=facts.licence.in_words(),
        alt=headline(results),
        chat=bool(chat_template(run.merged(t, entry).model)),
        repo_id=shown_id,
        t=t,
        stages=len(recipe.stages),
        base=without_secrets(hub_model(recipe.base_model)),
        before=public(recipe.continue_from or ""),
        lineage=[_ancestor(run, entry, s) for s in range(1, t + 1)],
        rule=entry.rule,
        reference=rule.reference,
        formula=(inspect.getdoc(rule) or "").partition("\n")[0],
        merge=merge,
        norms=_norms(run, merge),
        stored=stored(run).get(entry.name),
        scores=_scores(run, lines, t),
        changes=changes,
        losses=seen_losses(changes),
        routes=[table for block in metrics if (table := route_table(results, block, entry.name)).rows],
        unmeasured="" if recipe.evaluate.general_tasks else UNMEASURED,
        metrics=[metric_table(of, block) for block, of in metrics.items()],
        shown=[METRICS[m] for m in known_metrics(x for of in metrics.values() for x in of.values())],
        units={block: UNITS[block] for block in metrics},
        recipe=public_recipe(recipe),
        mergekit=public_mergekit_recipe(run, entry, t) or "not recorded",
    )


def last_merged(run: Run, entry: Merge) -> int:
    """Return the last merged stage. Raises RunError without one."""
    if t := run.last_merged(entry):
        return t
    missing = "merge" if expert_of(run, entry, 1).is_done("train") else "train"
    raise RunError(
        f"{run.folder} holds no merged model of {entry.name} yet: the phase {missing} of stage {run.stage(1).name} is "
        "not done. Finish the run with `contmerge run`, then push."
    )


def _front_matter(run: Run, entry: Merge, t: int, shown_id: str, licence: Licence) -> str:
    recipe = run.recipe
    sources = [source for n in range(1, t + 1) for source in stage_sources(run, expert_of(run, entry, n), n)]
    results = _eval_results(load_scores(run.merged(t, entry)))
    return front_matter(
        parents_of(run, t), "merge", ["merge", "mergekit", "contmerge", entry.rule],
        datasets=[d for source in sources if (d := hub_id(source.path))],
        licence=licence.name or (recipe.publish.license if recipe.publish else None),
        model_name=shown_id.split("/")[-1] if results else None, eval_results=results or None,
    )  # fmt: skip


def _eval_results(scores: Scores) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation", dataset_type=name, dataset_name=name,
            metric_type=score.block, metric_name=score.metric, metric_value=score.value,
        )
        for name, score in scores.items()
    ]  # fmt: skip


@dataclass(frozen=True)
class _Ancestor:
    """A stage's expert in the lineage, and the merged model after it."""

    name: str
    source: str
    """The given expert."""
    datasets: tuple[tuple[str, str], ...]
    """Names of the training data, and their splits and licences; empty for a given expert."""
    minus: str | None
    start: str
    expert_sha256: str | None
    merged_sha256: str | None


def _ancestor(run: Run, entry: Merge, t: int) -> _Ancestor:
    stage, place = run.stage(t), expert_of(run, entry, t)
    trained = place.record("train") if place.is_done("train") else {}
    merged = run.merged(t, entry).record("merge")
    digests = merged.get("expert_sha256") or [trained.get("model_sha256")]  # of all experts folded so far
    return _Ancestor(
        name=stage.name,
        source=public(str(stage.expert or "")),
        datasets=tuple((public(s.path), s.in_words()) for s in stage_sources(run, place, t)),
        minus=public(stage.minus) if stage.minus else None,
        start=_start(run, entry, place, t),
        expert_sha256=digests[-1],
        merged_sha256=merged.get("model_sha256"),
    )


def _start(run: Run, entry: Merge, place: ExpertPlace, t: int) -> str:
    from_base = (entry.start_from or named_rule(entry.rule).start_from) in FROM_BASE
    if t == 1 and run.recipe.continue_from and not from_base:
        return "the published merge"
    if place.kind == "base":
        return "the base model"
    before = run.stage(t - 1).name
    return f"{'the expert of' if place.kind == 'previous' else 'the merged model after'} {before}"


def _norms(run: Run, merge: dict[str, Any]) -> Table:
    norms = merge["norms"]["experts"]
    parts = merge.get("folded", one_a_stage(len(norms)))
    own = [{"weight": part.get("weight"), **part.get("chosen", {})} for part in parts]
    words = [word for word in dict.fromkeys(w for values in own for w in values) if any(v.get(word) for v in own)]
    rows = [
        [Cell(run.stage(part["stage"]).name), Cell(f"{norm:.6g}"), *(_coefficient(word, values) for word in words)]
        for part, norm, values in zip(parts, norms, own, strict=True)
    ]
    return Table("", ("stage", "norm of D over the whole model", *words), rows)


def _coefficient(word: str, values: Mapping[str, float | None]) -> Cell:
    """Return an expert's weight, or a coefficient of its fold."""
    value = values.get(word)
    return Cell("1" if word == "weight" else "") if value is None else Cell(f"{value:.4g}")


def _scores(run: Run, lines: Sequence[Line], t: int) -> Table | None:
    """Return the table of scores, if the recipe names a task."""
    tasks = [name for s in range(1, t + 1) for name in run.stage(s).task_names()]
    tasks += run.recipe.evaluate.general_names
    models = [(_start_name(run), lines[-1].rows[0])]
    models += [(f"{x.name}, after {run.stage(s).name}", x.rows[s]) for s in range(1, t + 1) for x in lines
if x.name not in _AT_THE_END.values() or s == len(run.recipe.stages)]  # fmt: skip
    measured = {name: score for line in lines for row in line.rows for name, score in row.items()}
    rows = [[Cell(name), *(_cell(row.get(task)) for task in tasks)] for name, row in models]
    head = ("model", *(f"{task} ({_metric(measured.get(task))})" for task in tasks))
    return Table("", head, rows) if tasks else None


def _start_name(run: Run) -> str:
    """Return row 0's name: the base, or the continued merge."""
    before = run.recipe.continue_from
    return f"published merge {public(before)}" if before else "base model"


def _metrics(run: Run, lines: Sequence[Line], t: int) -> dict[Block, dict[str, dict[str, float | None]]]:
    """Return block -> line -> measured metrics."""
    stages = [run.stage(s) for s in range(1, t + 1)]
    general = run.recipe.evaluate.general_names
    measured = {score.block for line in lines for row in line.rows for score in row.values()}
    return {
        block: {
            line.name: {m: v for m, v in line.metrics(stages, general, block).items() if m in _ON_THE_CARD}
            for line in lines
        }
        for block in reversed(BLOCKS) if block in measured
    }  # fmt: skip


def _lines(run: Run, entry: Merge, t: int) -> list[Line]:
    """Return the lines of fine-tuning and of this merge, base first."""
    names = {"previous": "fine-tuning alone, in sequence", "base": "fine-tuning alone, each stage from the base"}
    names |= {f"merged-{entry.name}": "fine-tuning from the merged model", **_AT_THE_END}
    experts, merges = load_lines(run, [kind for kind in run.expert_kinds() if kind in names])
    ours = next(line for line in merges if line.name == entry.name)
    named = [replace(x, name=names[x.name]) for x in experts] + [replace(ours, name=f"this merge ({entry.name})")]
    if t < len(run.recipe.stages):
        named = [replace(x, joint={}) for x in named if x.name not in _AT_THE_END.values()]
    return [replace(x, rows=(*x.rows[: t + 1], *({} for _ in range(t + 1 - len(x.rows))))) for x in named]


def _metric(score: TaskScore | None) -> str:
    if score is None:
        return NOT_MEASURED
    return f"{score.metric.replace('_', ' ')}, {'lower' if score.block == 'perplexity' else 'higher'} is better"


def _cell(score: TaskScore | None) -> Cell:
    if score is None:
        return Cell(NOT_MEASURED)
    # The error of a perplexity p = exp(-u) is p times that of u.
    scale = score.value if score.block == "perplexity" else 1.0
    digits = 2 if score.block == "perplexity" else 3
    error = "" if score.stderr is None else f" ± {scale * score.stderr:.{digits}f}"
    return Cell(f"{score.value:.{digits}f}{error}")
