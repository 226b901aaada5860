"""The model card: a merged model's whole lineage, and what of a recipe the world may see.

Paths of this machine are reduced to names, secrets are blanked, and what was not measured says so.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from hf_contmerge.errors import RunError
from hf_contmerge.merge_rules import rule_class
from hf_contmerge.run.folder import Run
from hf_contmerge.run.places import ExpertPlace
from hf_contmerge.run.recipe.schema import Merge, Recipe
from hf_contmerge.run.scores import BLOCKS, Block, Scores, TaskScore, load_scores
from hf_contmerge.scoring.forgetting.lines import Line, load_lines

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w./-]+)?")
_FILE = re.compile(r"\.(jsonl?|parquet|csv|txt|arrow|gguf|ya?ml)$")
LOCAL_PATH = re.compile(r"/|~|\.\.?/|[A-Za-z]:[\\/]|\\\\|file:")
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{30,}|(?<=://)[^/\s@]+@")
_NAMED = ("base_model", "expert", "minus", "path", "include_path", "output")
NOT_MEASURED = "not measured"
_WHERE_KNOWN = {
    "normalised": (
        "of expert",
        "what is there at the end of all that experts of each stage alone gain over the base; 1 is all",
    ),
    "fuar": ("FUAR", "right answers lost on earlier stages and general tasks, for each that was won on the stages"),
}
"""Metrics that need more than most runs measure."""


def model_card(run: Run, entry: Merge, *, repo_id: str | None = None) -> str:
    """Return the README.md of a merge entry's model after the last merged stage. Raises RunError if there is none."""
    t = last_merged(run, entry)
    recipe, wish = run.recipe, run.recipe.publish
    shown_id = repo_id or (wish.repo_id if wish else recipe.name)
    stages = f"stage {t} of {len(recipe.stages)}"
    parts = [
        f"---\n{_front_matter(run, entry, t, shown_id)}\n---",
        f"# {shown_id.split('/')[-1]}",
        f"A continual merge, after {stages}: {_told(recipe.base_model)} learnt {t} stage{'s' * (t > 1)}, one after "
        f"another, and each was folded into the model with `{entry.rule}` "
        f"(hf_contmerge {_versions(run, entry, t).get('hf_contmerge', 'of unrecorded version')}).",
        f"## Use\n\n{_usage(shown_id)}",
        f"## Lineage\n\n{_lineage(run, entry, t)}",
        f"## Rule\n\n{_rule(run, entry, t)}",
        f"## Scores\n\n{_scores(run, entry, t)}",
        "## Recipe\n\nAs frozen in the run; local files and folders appear by name only.\n\n"
        + _fenced(public_recipe(recipe), "yaml"),
        "## The same merge with mergekit\n\nThe experts are not part of this repository; they are named as in the "
        "run.\n\n" + _fenced(public_mergekit_recipe(run, entry, t) or "not recorded\n", "yaml"),
        "## Versions\n\n" + ", ".join(f"{name} {v}" for name, v in _versions(run, entry, t).items()),
    ]
    return "\n\n".join(parts) + "\n"


# What is pushed, and where to


def last_merged(run: Run, entry: Merge) -> int:
    """Return the number of the last stage that a merge entry has merged. Raises RunError if there is none."""
    done = [t for t in run.stage_numbers() if run.merged(t, entry).is_done("merge")]
    if done:
        return done[-1]
    missing = "merge" if _expert(run, entry, 1).is_done("train") else "train"
    raise RunError(
        f"{run.folder} holds no merged model of {entry.name} yet: the phase {missing} of stage {run.stage(1).name} is "
        "not done. Finish the run with `contmerge run`, then push."
    )


def mapped(value: Any, change: Callable[[str, str], str], key: str = "") -> Any:
    """Return JSON-like data with every string replaced by change(key, string)."""
    if isinstance(value, dict):
        return {k: mapped(v, change, str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [mapped(v, change, key) for v in value]
    return change(key, value) if isinstance(value, str) else value


def _hub_id(name: str) -> str | None:
    """Return the Hub id, without a revision, that a recipe means by a name; None for something on this machine."""
    if not HUB_ID.fullmatch(name) or _FILE.search(name) or Path(name).exists():
        return None
    return name.partition("@")[0]


def public_name(name: str) -> str:
    """Return a Hub id or an address as it is, and a local path as its last component."""
    if _hub_id(name) or ("://" in name and not name.startswith("file:")):
        return name
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2] or "."


def _public_word(key: str, value: str) -> str:
    """Return a recipe's string as the world may see it."""
    if key.endswith("hub_token"):
        return "(removed)"
    if (value and key in _NAMED) or (key != "text" and LOCAL_PATH.match(value)):
        value = public_name(value)
    return _SECRET.sub("(removed)", value)


def public_recipe(recipe: Recipe) -> str:
    """Return the recipe as the world may see it, in YAML."""
    data = mapped(recipe.model_dump(mode="json"), _public_word)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def public_mergekit_recipe(run: Run, entry: Merge, t: int) -> str | None:
    """Return the stage's merge.yml with models named as in the recipe or, if made here, by their place in the run."""
    file = run.merged(t, entry).mergekit_recipe
    if not file.is_file():
        return None
    root = run.folder.resolve()
    given = {
        _expert(run, entry, s).model.resolve(): stage.expert
        for s in range(1, t + 1)
        if (stage := run.stage(s)).expert and not stage.minus  # a difference is made here, into a folder of the run
    }

    def public(key: str, value: str) -> str:
        if key == "model" and "+" in value:  # mergekit's word for a model and an adapter of it
            model, _, adapter = value.partition("+")
            return f"{public('base_model', model)}+{public(key, adapter)}"
        path = Path(value).resolve()
        if key == "base_model":
            return _public_word(key, run.recipe.base_model)
        if key == "model" and given.get(path):
            return _public_word("expert", str(given[path]))
        if key == "model" and path.is_relative_to(root):
            return path.relative_to(root).as_posix()
        return _public_word("path" if key == "model" else key, value)

    data = mapped(yaml.safe_load(file.read_text(encoding="utf-8")), public)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _front_matter(run: Run, entry: Merge, t: int, shown_id: str) -> str:
    from huggingface_hub import ModelCardData

    recipe, seen = run.recipe, [run.stage(s) for s in range(1, t + 1)]
    parents = [recipe.base_model, *(m for s in seen for m in (s.expert, s.minus) if m)]
    sources = [source.path for s in seen if s.dataset for source in s.dataset.sources()]
    datasets = [d for path in sources if (d := _hub_id(path))]
    results = _eval_results(load_scores(run.merged(t, entry)))
    data = ModelCardData(
        # The Hub refuses a card whose base_model could not be a model's id, as with quickstart:smollm2.
        base_model=[re.sub(r"[^\w./-]+", "-", _hub_id(m) or public_name(m)) for m in dict.fromkeys(parents)],
        base_model_relation="merge",
        tags=["merge", "mergekit", "contmerge", entry.rule],
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=list(dict.fromkeys(datasets)) or None,
        license=recipe.publish.license if recipe.publish else None,
        model_name=shown_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _eval_results(scores: Scores) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation", dataset_type=name, dataset_name=name,
            metric_type=score.block, metric_name=score.metric, metric_value=score.value,
        )
        for name, score in scores.items()
    ]  # fmt: skip


def _usage(shown_id: str) -> str:
    return _fenced(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{shown_id}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{shown_id}")\n',
        "python",
    )


def _lineage(run: Run, entry: Merge, t: int) -> str:
    base = f"0. Base model: {_told(run.recipe.base_model)}."
    return "\n".join([base, *(_stage_line(run, entry, s) for s in range(1, t + 1))])


def _stage_line(run: Run, entry: Merge, t: int) -> str:
    stage, place = run.stage(t), _expert(run, entry, t)
    trained = place.record("train") if place.is_done("train") else {}
    merged = run.merged(t, entry).record("merge")
    if stage.dataset:
        read = " and ".join(f"{_told(each.path)} (split {each.split})" for each in stage.dataset.sources())
        source = f"trained on {read}, {_start(run, place, t)}"
    else:
        source = f"given: {_told(str(stage.expert))}" + (f" minus {_told(stage.minus)}" if stage.minus else "")
    digests = merged.get("expert_sha256") or [trained.get("model_sha256")]  # of all experts folded so far
    return (
        f"{t}. **{stage.name}**, {source}.\n"
        f"   SHA-256 of the expert's weights: {_code(digests[-1])}; "
        f"of the merged model's: {_code(merged.get('model_sha256'))}."
    )


def _start(run: Run, place: ExpertPlace, t: int) -> str:
    if place.kind == "base":
        return "starting from the base model"
    before = run.stage(t - 1).name
    return f"starting from {'the expert of' if place.kind == 'previous' else 'the merged model after'} {before}"


def _rule(run: Run, entry: Merge, t: int) -> str:
    cls, record = rule_class(entry.rule), run.merged(t, entry).record("merge")
    parameters = ", ".join(f"{word} = {value}" for word, value in record["parameters"].items()) or "none"
    norms = [(run.stage(s).name, f"{norm:.6g}") for s, norm in enumerate(record["norms"]["experts"], 1)]
    formula = (inspect.getdoc(cls) or "").partition("\n")[0]
    return "\n\n".join(
        [
            f"`{entry.rule}` ({cls.reference}), parameters: {parameters}. With D the change that a stage made to a "
            "weight and S the running tensor:",
            _fenced(formula + "\n", "text"),
            f"Here merged = base + {record['scale']:.6g} × S, and |S| = {record['norms']['running']:.6g}.",
            _table(("stage", "norm of D over the whole model"), norms),
        ]
    )


def _scores(run: Run, entry: Merge, t: int) -> str:
    lines = _lines(run, entry, t)
    general = [task.name for task in run.recipe.evaluate.general_tasks]
    tasks = [name for s in range(1, t + 1) for name in run.stage(s).task_names()] + general
    after = [
        (f"{line.name}, after {run.stage(s).name}", *(_cell(line.rows[s].get(task)) for task in tasks))
        for s in range(1, t + 1)
        for line in lines
    ]
    base = ("base model", *(_cell(lines[-1].rows[0].get(task)) for task in tasks))
    found = {name: score for line in lines for row in line.rows for name, score in row.items()}
    head = ("model", *(f"{task} ({_metric(found.get(task))})" for task in tasks))
    return "\n\n".join(
        [
            _table(head, [base, *after]) if tasks else f"Tasks: {NOT_MEASURED} (the recipe names none).",
            "± is a standard error over documents. Below, accuracies are as they are and a perplexity counts as "
            "-ln(perplexity), in nats, so that higher is better throughout. ACC: mean over the stages at the end; LA: "
            "mean of each stage right after it was learnt; BWT: mean change of the earlier stages since (negative is "
            "forgetting); general: mean change of the general tasks against the base.",
            _summary(run, lines, general, t),
        ]
    )


def _summary(run: Run, lines: Sequence[Line], general: Sequence[str], t: int) -> str:
    stages = [run.stage(s) for s in range(1, t + 1)]
    found = {score.block for line in lines for row in line.rows for score in row.values()}

    measured: list[Block] = [b for b in BLOCKS if b in found]
    values = {(b, x.name): x.metrics(stages, general, b) for b in measured for x in lines}
    more = [metric for metric in _WHERE_KNOWN if any(v[metric] is not None for v in values.values())]

    def row(block: Block, name: str) -> tuple[str, ...]:
        v = values[block, name]
        # One stage has no earlier ones: there BWT is undefined, which is not the same as not measured.
        bwt = "-" if t == 1 else _signed(v["bwt"])
        delta = _signed(v["general_delta"]) if general else "-"
        rest = ("-" if v[m] is None else f"{v[m]:.2f}" for m in more)
        return (name, block, _signed(v["acc"]), _signed(v["la"]), bwt, delta, *rest)

    head = ("model", "kind", "ACC", "LA", "BWT", "general", *(_WHERE_KNOWN[metric][0] for metric in more))
    told = "\n".join(f"{short}: {means}." for short, means in (_WHERE_KNOWN[metric] for metric in more))
    rows = [row(block, line.name) for block in measured for line in lines]
    return "\n\n".join(filter(None, (_table(head, rows), told))) if rows else f"Metrics: {NOT_MEASURED}."


def _lines(run: Run, entry: Merge, t: int) -> list[Line]:
    """Return fine-tuning alone and then this merge, with a row for the base and one for each of the t stages."""
    names = {"previous": "fine-tuning alone, in sequence", "base": "fine-tuning alone, each stage from the base"}
    names[f"merged-{entry.name}"] = "fine-tuning from the merged model"
    experts, merges = load_lines(run, [kind for kind in run.expert_kinds() if kind in names])
    ours = next(line for line in merges if line.name == entry.name)
    named = [replace(x, name=names[x.name]) for x in experts] + [replace(ours, name=f"this merge ({entry.name})")]
    return [replace(x, rows=(*x.rows[: t + 1], *({} for _ in range(t + 1 - len(x.rows))))) for x in named]


def _expert(run: Run, entry: Merge, t: int) -> ExpertPlace:
    start = entry.start_from or rule_class(entry.rule).start_from
    return run.expert(t, f"merged-{entry.name}" if start == "merged" else start)


def _versions(run: Run, entry: Merge, t: int) -> dict[str, str]:
    return run.merged(t, entry).record("merge")["versions"]


def _metric(score: TaskScore | None) -> str:
    if score is None:
        return NOT_MEASURED
    return f"{score.metric.replace('_', ' ')}, {'lower' if score.block == 'perplexity' else 'higher'} is better"


def _cell(score: TaskScore | None) -> str:
    if score is None:
        return NOT_MEASURED
    # The error of a perplexity p = exp(-u) is p times that of u.
    scale = score.value if score.block == "perplexity" else 1.0
    digits = 2 if score.block == "perplexity" else 3
    error = "" if score.stderr is None else f" ± {scale * score.stderr:.{digits}f}"
    return f"{score.value:.{digits}f}{error}"


def _signed(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:+.4f}"


def _told(name: str) -> str:
    """Return a model's or a dataset's public name for the text."""
    return f"`{_SECRET.sub('(removed)', public_name(name))}`"


def _code(digest: str | None) -> str:
    return f"`{digest}`" if digest else "not recorded"


def _fenced(text: str, language: str) -> str:
    return f"````{language}\n{text}````"  # four, since a recipe's format string may hold three


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
