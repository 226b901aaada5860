"""Score a model folder with lm-eval, on all ranks of all nodes.

The tasks of a run are ordinary lm-eval task files in its `tasks/` folder, so the stock command measures the same:
`lm_eval --model hf --model_args pretrained=FOLDER --include_path RUN/tasks --tasks law_heldout`.
"""

from __future__ import annotations

import difflib
import gc
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer

from hf_contmerge import corpus
from hf_contmerge.adapter_files import is_adapter
from hf_contmerge.errors import DataError, RecipeError, ResourceError, unknown
from hf_contmerge.loaded_model import load_model
from hf_contmerge.model_folder import bf16_pays
from hf_contmerge.recipe import Evaluate, Task
from hf_contmerge.task_scores import Block, Sample, TaskScore
from hf_contmerge.tensor_files import Weights, tensor_bytes

LOG = logging.getLogger(__name__)

_ACCURACIES = ("acc", "exact_match", "f1", "acc_norm")
_SAMPLED = 32  # documents of a task, to tell how long its requests are
_PERPLEXITIES = ("word_perplexity", "perplexity", "byte_perplexity")


@dataclass(frozen=True)
class Requests:
    """What a task asks of a model: how often, some of the texts, and whether it wants text back."""

    count: int
    texts: tuple[str, ...]
    generates: bool


def write_perplexity_task(folder: Path, name: str, documents: Sequence[str]) -> None:
    """Write an lm-eval task that measures the perplexity of documents."""
    data = _write_rows(folder / f"{name}.jsonl", [{"text": text} for text in documents])
    aggregations = {"word_perplexity": "weighted_perplexity", "byte_perplexity": "weighted_perplexity",
                    "bits_per_byte": "bits_per_byte"}  # fmt: skip
    metrics = [{"metric": m, "aggregation": a, "higher_is_better": False} for m, a in aggregations.items()]
    _write_task(folder, name, data, {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": metrics,
    })  # fmt: skip


def write_choice_task(folder: Path, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write an lm-eval multiple-choice task. Rows have `query`, `choices` and `gold` (the right one's index)."""
    data = _write_rows(folder / f"{name}.jsonl", rows)
    _write_task(folder, name, data, {
        "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    })  # fmt: skip


def write_task(folder: Path, task: Task) -> None:
    """Write the lm-eval task that a recipe makes from a dataset. Raises DataError as corpus does."""
    rows = corpus.task_rows(task)
    if task.kind == "perplexity":
        write_perplexity_task(folder, task.name, [row["text"] for row in rows])
    else:
        write_choice_task(folder, task.name, rows)


def heldout_documents(data: corpus.StageData, *, chars: int, tokenizer_folder: Path) -> list[str]:
    """Return a stage's held-out examples as documents; conversations in the tokenizer's chat template."""

    def render(messages: list[corpus.Row]) -> str:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        corpus.require_chat_template(tokenizer)
        return tokenizer.apply_chat_template(messages, tokenize=False)

    return corpus.documents(data.heldout, data.form, chars=chars, render=render)


def check_tasks(names: Sequence[str], folders: Sequence[Path]) -> None:
    """Load all tasks, to see that they and their data are there.

    Raises:
        RecipeError: a task is neither in the folders nor known to lm-eval.
        DataError: its dataset is missing or cannot be read.
        ResourceError: the Hub, where its dataset lies, cannot be reached.
    """
    manager = _task_manager(names, folders)
    for name in names:
        if name not in manager.all_tasks:
            raise RecipeError(unknown("task", name, _near(name, manager.all_tasks)))
    for name in names:
        _load_task(manager, name)


def load_libraries() -> None:
    """Import what scoring imports when it begins, so that the memory of a process that has them can be measured."""
    import lm_eval.evaluator
    import lm_eval.models.huggingface  # noqa: F401


def sample_requests(name: str, folders: Sequence[Path], *, few_shot: int | None, limit: int | None) -> Requests:
    """Return what a task will ask of a model, from its first documents. Raises as `check_tasks`.

    `few_shot`, `limit`: as the recipe has them; None: as the task does.
    """
    loaded = _load_task(_task_manager([name], folders), name)
    leaves: Mapping[str, Any] = loaded["tasks"]
    count, sampled = 0, []
    for leaf in leaves.values():
        if few_shot is not None:
            leaf.set_config(key="num_fewshot", value=few_shot)
        documents = min(len(leaf.eval_docs), limit or len(leaf.eval_docs))
        leaf.build_all_requests(limit=min(documents, _SAMPLED))
        asked = [tuple(word for word in i.args if isinstance(word, str)) for i in leaf.instances]
        count += round(len(asked) * documents / min(documents, _SAMPLED)) if documents else 0
        sampled += asked
    generates = any(leaf.OUTPUT_TYPE == "generate_until" for leaf in leaves.values())
    return Requests(count, tuple("".join(words) for words in sampled), generates)


def score_model(
    folder: Path,
    tasks: Sequence[Task],
    *,
    task_folder: Path,
    evaluate: Evaluate,
    ranks: Any,
    base: Path | None = None,
    known: Callable[[str], Mapping[str, TaskScore]] = lambda _: {},
    trust_remote_code: bool = False,
) -> tuple[str, dict[str, TaskScore]]:
    """Measure a model on tasks. All ranks call this together; the result is whole on the main process only.

    Args:
        folder: the model, or an adapter of `base`.
        tasks: what to measure; those made from datasets have been written to `task_folder`.
        task_folder: where they lie.
        evaluate: batch size, dtype, limits.
        ranks: accelerate's PartialState: device, rank and world size, over all nodes.
        base: the model that an adapter belongs to; a whole model needs none.
        known: what is known already of weights with this digest; those tasks are not measured again.
        trust_remote_code: let the model run code of its own.

    Returns:
        The digest of the weights as they were scored, and the score of each task by name.

    Raises:
        DataError: a task gave no number.
    """
    whole = base if base and is_adapter(folder) else folder
    dtype = _dtype(whole, evaluate)
    model = load_model(folder, whole, dtype=dtype, trust_remote_code=trust_remote_code).eval()
    digest = _loaded_sha256(model)
    have = {t.name: known(digest)[t.name] for t in tasks if t.name in known(digest)}
    missing = [t for t in tasks if t.name not in have]
    scores: dict[str, TaskScore] = {}
    if missing:
        tokenizer = AutoTokenizer.from_pretrained(whole, trust_remote_code=trust_remote_code)
        scores = _measure(model.to(ranks.device), tokenizer, missing, task_folder, evaluate)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return digest, {**have, **scores}


def _measure(
    model: Any, tokenizer: Any, tasks: Sequence[Task], task_folder: Path, evaluate: Evaluate
) -> dict[str, TaskScore]:
    """Return the scores, on the main process; nothing on the others.

    One call of lm-eval a task: in one call, it refuses a task that stands both alone and in a group.
    """
    from lm_eval.evaluator import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about what we do on purpose
    lm = _language_model(model, tokenizer, evaluate)
    folders = [task_folder, *([Path(evaluate.include_path)] if evaluate.include_path else [])]
    manager = _task_manager([t.name for t in tasks], folders)
    scores = {}
    for task in tasks:
        loaded = _load_task(manager, task.name)
        leaves: Mapping[str, Any] = loaded["tasks"]  # one, or those of a group or a tag
        if task.num_fewshot is not None:
            for leaf in leaves.values():
                leaf.set_config(key="num_fewshot", value=task.num_fewshot)
        _share(lm, leaves, evaluate)
        whole = loaded["groups"].get(task.name)
        results = simple_evaluate(
            lm, tasks=[whole] if whole else list(leaves.values()), limit=evaluate.limit, bootstrap_iters=0,
            log_samples=True, task_manager=manager,
        )  # fmt: skip
        if results and lm.accelerator.is_main_process:
            scores[task.name] = _task_score(results, task.name, list(leaves))
    return scores


def _language_model(model: Any, tokenizer: Any, evaluate: Evaluate) -> Any:
    """Return lm-eval's view of a loaded model. `_share` sets its rank and world size.

    HFLM takes the local rank for the rank and ignores ranks on CPUs. Without a float32 softmax, a bfloat16 model's
    log-likelihoods would be rounded to two digits before they are summed.
    """
    from accelerate import Accelerator
    from lm_eval.models.huggingface import HFLM

    parent: Any = HFLM  # its registration hides its type

    class QuietHFLM(parent):
        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:  # noqa: ARG002
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:  # noqa: ARG002
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    lm = QuietHFLM(
        pretrained=model, tokenizer=tokenizer, backend="causal", softmax_dtype="float32",
        batch_size=evaluate.batch_size, max_length=evaluate.max_length,
    )  # fmt: skip
    lm.accelerator = Accelerator()
    return lm


def _share(lm: Any, leaves: Mapping[str, Any], evaluate: Evaluate) -> None:
    """Let the ranks share a task's documents; where one would get none, which lm-eval refuses, each measures all."""
    ranks = lm.accelerator.num_processes
    enough = all(min(len(leaf.eval_docs), evaluate.limit or ranks) >= ranks for leaf in leaves.values())
    lm._rank, lm._world_size = (lm.accelerator.process_index, ranks) if enough else (0, 1)


def _task_manager(names: Sequence[str], folders: Sequence[Path]) -> Any:
    from lm_eval.tasks import TaskManager

    include: list[str | Path] = [str(f) for f in folders if f.is_dir()]
    ours = TaskManager(include_path=include, include_defaults=False)
    # Indexing lm-eval's own tasks takes seconds: only when one of them is meant.
    return ours if set(names) <= set(ours.all_tasks) else TaskManager(include_path=include)


def _load_task(manager: Any, name: str) -> Mapping[str, Mapping[str, Any]]:
    """Return lm-eval's tasks and groups under a name. Raises as `check_tasks`."""
    try:
        return manager.load([name])
    except ConnectionError as error:
        raise ResourceError(
            f"The dataset of the task {name} is not here, and the Hub cannot be reached: {error}. Check the network "
            "and HF_HUB_OFFLINE, or leave the task out."
        ) from error
    except (FileNotFoundError, DatasetGenerationError) as error:
        raise DataError(f"The dataset of the task {name} cannot be read: {error.__cause__ or error}") from error


def _near(name: str, known: Sequence[str]) -> list[str]:
    """Return the few of lm-eval's thousands of tasks that a message should show."""
    return difflib.get_close_matches(name, known, n=8, cutoff=0.4)


def _task_score(results: Any, name: str, leaves: Sequence[str]) -> TaskScore:
    """Return one task's score; a group's is that of all the documents of its leaves together."""
    samples = [s for leaf in leaves for s in _samples(results, leaf)]
    if not samples:
        raise DataError(f"The task {name} has no documents to measure.")
    metric = _metric(name, samples)
    block: Block = "perplexity" if metric in _PERPLEXITIES else "accuracy"
    values = [s[metric] for s in samples]
    pairs = [tuple(map(float, v)) if isinstance(v, tuple | list) else (float(v), 1.0) for v in values]
    sample = Sample(tuple(g for g, _ in pairs), tuple(w for _, w in pairs))
    if not math.isfinite(sample.utility) or any(_is_nan(s) for s in samples):
        raise DataError(f"The task {name} gave nan or infinity on this model: the weights are damaged or diverged.")
    reported = results["results"].get(name, {})
    details = {
        "metrics": {k.split(",")[0]: v for k, v in reported.items() if isinstance(v, float)},
        "version": results["versions"].get(name),
        "documents_sha256": hashlib.sha256("".join(s["doc_hash"] for s in samples).encode()).hexdigest(),
    }
    value = math.exp(-sample.utility) if block == "perplexity" else sample.utility
    return TaskScore(block, metric, value, sample.utility, sample.stderr(), sample.gains, sample.weights, details)


def _samples(results: Any, leaf: str) -> list[Mapping[str, Any]]:
    """Return the results of each document, in order; where a task filters answers in several ways, the first way."""
    samples = sorted(results["samples"][leaf], key=lambda s: s["doc_id"])
    return [s for s in samples if s.get("filter") == samples[0].get("filter")]


def _metric(name: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """Return the metric to take, which all documents must have as a number of their own (or a sum and its weight)."""

    def has(sample: Mapping[str, Any], metric: str) -> bool:
        return metric in sample and (metric in _PERPLEXITIES or not isinstance(sample[metric], tuple | list))

    metrics = (*_ACCURACIES, *_PERPLEXITIES)
    found = next((m for m in metrics if all(has(s, m) for s in samples)), None)
    if found is None:
        raise DataError(f"The task {name} reports none of {', '.join(metrics)} for every document; use another.")
    return found


def _is_nan(sample: Mapping[str, Any]) -> bool:
    """Say whether a log-likelihood is no number: a multiple choice among such ones would still give an accuracy."""
    answers = [r[0] if isinstance(r, tuple | list) else r for r in sample["filtered_resps"]]
    return any(isinstance(a, float) and math.isnan(a) for a in answers)


def _dtype(folder: Path, evaluate: Evaluate) -> torch.dtype:
    if evaluate.dtype != "auto":
        return getattr(torch, evaluate.dtype)
    return torch.bfloat16 if bf16_pays(Weights(folder).numel()) else torch.float32


def _loaded_sha256(model: torch.nn.Module) -> str:
    """Return the digest of the weights as scored: two folders that differ only in dtype may be one model here."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def _write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _write_task(folder: Path, name: str, data: Path, fields: Mapping[str, Any]) -> None:
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test", **fields, "metadata": {"version": 1.0},
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")
