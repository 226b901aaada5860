"""Documents lost by plain fine-tuning and kept by a merge.

The reference of a stage is the model right after that stage; the reference of a general task is the base. Answers:
right in the reference, wrong after plain fine-tuning, right with the merge. Texts: the largest fall and recovery of the
log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hf_contmerge.report._findings import natural
from hf_contmerge.report._results import Results, line_label
from hf_contmerge.report._tables import Cell, Quote, Section, Table
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.scoring.forgetting.lines import Line

_EACH = 2  # examples of a task
_TASKS = 12  # with examples
_SIDE = 5  # documents side by side
_LONGEST = 160  # characters of such a document
_LEAST = 0.1  # nats per word, of the fall and of the recovery


@dataclass(frozen=True)
class _Story:
    """A task's scores before, after plain fine-tuning, after the merge."""

    task: str
    before: TaskScore
    before_name: str
    plain: TaskScore
    merge: TaskScore


def examples(results: Results) -> Section:
    """Return examples of forgetting; empty without fine-tuning, merge or texts."""
    plain = results.baseline
    merge = next((best for b in results.stage_blocks() if (best := results.best(b))), None)
    title = "Forgotten and regained"
    if not plain or not merge or len(plain.rows) != len(merge.rows):
        return Section(title)
    quotes, counts = [], []
    for story in _stories(results, plain, merge)[:_TASKS]:
        texts = results.base[story.task].texts
        if len(texts) != len(story.before.gains):  # older versions kept no texts
            continue
        documents = _answers(story) if story.before.block == "accuracy" else _texts(story)
        if documents and story.before.block == "accuracy":
            counts.append(_count(story, merge))
        quotes += [
            Quote(f"{story.task}, document {i + 1}", texts[i], _outcome(story, i, merge)) for i in documents[:_EACH]
        ]
    intro = (
        f"Documents lost by {line_label('previous')} and kept or regained by {merge.name}, the clearest of each "
        f"task. {' '.join(counts)}"
    )
    return Section(title, intro.rstrip(), quotes=quotes)


def answers(results: Results) -> Section:
    """Return five documents with answers side by side; empty without texts.

    Documents on which the models differ come first, in turn from each task.
    """
    title = "Five answers side by side"
    best = next((line for b in results.stage_blocks() if (line := results.best(b))), None)
    lines = [(line_label("previous"), results.baseline), (best.name if best else "", best)]
    models = [("base", results.base), *((name, line.rows[-1]) for name, line in lines if line)]
    tasks = [task for task, score in results.base.items() if len(score.texts) == len(score.gains) > 0
             and all(task in row for _, row in models)]  # fmt: skip
    tasks.sort(key=lambda task: results.base[task].block)  # answers tell more than perplexities
    queues = {task: _by_difference([row[task] for _, row in models]) for task in tasks}
    longest = max(map(len, queues.values()), default=0)
    chosen = [(task, queue[i]) for i in range(longest) for task, queue in queues.items() if i < len(queue)][:_SIDE]
    if not best or not chosen:
        return Section(title)
    rows = [
        [Cell(_beginning(results.base[task].texts[i])), *(_answer_cell(row[task], i) for _, row in models)]
        for task, i in chosen
    ]
    table = Table("", ("document", *(name for name, _ in models)), rows, wraps=True)
    return Section(title, "The models after the last stage. Documents on which they differ come first.", [table])


def _by_difference(scores: Sequence[TaskScore]) -> list[int]:
    """Return documents in order, those with the largest differences first."""

    def differs(i: int) -> float:
        gains = [score.gains[i] / score.weights[i] for score in scores]
        return max(gains) - min(gains)

    return sorted(range(len(scores[0].gains)), key=lambda i: (-differs(i), i))


def _beginning(text: str) -> str:
    words = _one_line(text)
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST].rstrip()} …"


def _answer_cell(score: TaskScore, i: int) -> Cell:
    shade = 0.0 if score.block == "perplexity" else 0.4 if score.gains[i] else -0.4
    return Cell(_answer(score, i), shade=shade)


def _stories(results: Results, plain: Line, merge: Line) -> list[_Story]:
    last_plain, last_merge, candidates = plain.rows[-1], merge.rows[-1], []
    for j, stage in enumerate(results.stages[: len(plain.rows) - 2], 1):  # nothing came after the last one
        candidates += [(task, plain.rows[j], f"after {stage.name}") for task in stage.task_names()]
    candidates += [(task, results.base, "base") for task in results.general_tasks]
    return [
        _Story(task, before[task], by, last_plain[task], last_merge[task])
        for task, before, by in candidates
        if task in before and task in last_plain and task in last_merge and task in results.base
    ]


def _answers(story: _Story) -> list[int]:
    """Return documents right, then wrong, then right again, in order."""
    rows = zip(story.before.gains, story.plain.gains, story.merge.gains, strict=True)
    return [i for i, (a, b, c) in enumerate(rows) if (a, b, c) == (1.0, 0.0, 1.0)]


def _texts(story: _Story) -> list[int]:
    """Return documents with the largest fall and recovery, clearest first."""
    falls = []
    for i, weight in enumerate(story.before.weights):
        fell = (story.before.gains[i] - story.plain.gains[i]) / weight
        back = (story.merge.gains[i] - story.plain.gains[i]) / weight
        if min(fell, back) >= _LEAST:
            falls.append((-min(fell, back), i))
    return [i for _, i in sorted(falls)]


def _count(story: _Story, merge: Line) -> str:
    a, b, c = story.before.gains, story.plain.gains, story.merge.gains
    lost = sum(x == 1 and y == 0 for x, y in zip(a, b, strict=True))
    back = len(_answers(story))
    new = sum(x == 1 and y == 1 and z == 0 for x, y, z in zip(a, b, c, strict=True))
    return (
        f"{story.task}: of {sum(x == 1 for x in a)} right answers ({story.before_name}), {line_label('previous')} lost "
        f"{lost}; {merge.name} has {back} of these right, and lost {new} more."
    )


def _outcome(story: _Story, i: int, merge: Line) -> str:
    steps = [(story.before_name, story.before), (line_label("previous"), story.plain), (merge.name, story.merge)]
    return " → ".join(f"{name}: {_answer(score, i)}" for name, score in steps)


def _answer(score: TaskScore, i: int) -> str:
    """Return a model's answer, or the document's perplexity."""
    if score.block == "perplexity":
        return f"perplexity {natural(math.exp(min(-score.gains[i] / score.weights[i], 500.0)), 'perplexity')}"
    verdict = "right" if score.gains[i] else "wrong"
    return f"{verdict} ({_one_line(score.answers[i])})" if len(score.answers) > i and score.answers[i] else verdict


def _one_line(text: str) -> str:
    return " ".join(text.split())
