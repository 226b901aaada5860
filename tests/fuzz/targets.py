"""The table of targets: what each takes, which parser of ours reads it, and what inputs it starts from."""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from toys import ROOT
from toys.models import CHATML, perturbed, toy_llama, write_jsonl
from toys.reports import make_run, with_models

from fuzz.fuzz import Form, sealed_json, sealed_yaml

Seeds = Callable[[Path], list[bytes]]


@dataclass(frozen=True)
class Target:
    """A parser and its inputs."""

    name: str
    form: Form
    file: str
    """Of the input, in the target's folder."""
    read: Callable[[Place], Any]
    seeds: Seeds
    """Of the toy home."""
    like: str = ""
    """What of the home is copied into the folder first."""
    refuses: tuple[type[Exception], ...] = ()
    """Errors that the function documents besides ours; its callers translate them."""
    examples: int = 100
    """Of the sample in the default tests."""
    turn: float = 1.0
    """Seconds in each round of `make fuzz`."""


@dataclass
class Place:
    """A target's folder."""

    folder: Path
    file: Path
    home: Path
    writable: tuple[str, ...]
    """Folders, as the system names them."""
    fresh: bool
    """Each input is a new file: caches know files by their number and time."""

    @classmethod
    def of(cls, target: Target, home: Path, folder: Path) -> Place:
        """Make a target's folder."""
        folder.mkdir(parents=True)
        if target.like:
            shutil.copytree(home / target.like, folder / target.like, symlinks=True)
        file = folder / target.file
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = tuple(os.path.realpath(path) for path in (folder, home / "cache"))
        return cls(folder, file, home, writable, bool(target.like))

    def put(self, data: bytes) -> None:
        """Write the input."""
        new = f"{self.file}.new" if self.fresh else str(self.file)
        with open(new, "wb") as file:
            file.write(data)
        if self.fresh:
            os.replace(new, self.file)

    def clear(self) -> None:
        """Remove what the target wrote."""
        if os.path.exists(f"{self.folder}/out"):
            shutil.rmtree(self.folder / "out", ignore_errors=True)

    @property
    def text(self) -> str:
        """The input as text; what is not UTF-8 becomes a sign."""
        return self.file.read_bytes().decode("utf-8", "surrogateescape")


def make_home(home: Path) -> Path:
    """Make toys to spoil: a base, an expert, an adapter, a state, a run and its files."""
    from matplotlib import font_manager  # noqa: F401  (its first import makes folders of its own)
    from toys.loras import lora

    from hf_contmerge.merging.state import MergeState

    home.mkdir(parents=True, exist_ok=True)
    base = toy_llama(home / "base", seed=0)
    perturbed(base, home / "expert", seed=1, size=0.01)
    lora(base, home / "adapter", seed=2)
    state = MergeState.create(home / "state", base=base, rule="magmax").add(home / "expert", home / "adapter")
    state.export(home / "merged")
    with_models(make_run(home / "run", stages=2, merge=["magmax"]), home / "merged", base)
    write_jsonl(home / "texts.jsonl", [{"text": f"the quick brown fox jumps {i} times"} for i in range(8)])
    return home


# Seeds


def _texts(*texts: str) -> Seeds:
    return lambda _home: [text.encode() for text in texts]


def _files(*names: str) -> Seeds:
    """Return files of the home."""
    return lambda home: [(home / name).read_bytes() for name in names]


def _recipes(home: Path) -> list[bytes]:
    ours = [p.read_bytes() for p in sorted((ROOT / "recipes").glob("*.yml")) if p.stem not in ("magmax", "opcm")]
    return [*ours, yaml.safe_dump(_RECIPE).encode(), yaml.safe_dump(_LONG_RECIPE).encode()]


_RECIPE: dict[str, Any] = {
    "name": "toy", "base_model": "base", "merge": ["average"], "stages": [{"name": "a", "dataset": "a.jsonl"}],
}  # fmt: skip
_LONG_RECIPE: dict[str, Any] = {
    "name": "long", "base_model": "owner/base@main", "output": "runs/x", "seed": 3, "plugins": ["p.py"],
    "stages": [
        {"name": "a", "dataset": {"path": "a.jsonl", "text": "{q}\n{a}", "heldout": 4, "labels": {"a": ["no", "yes"]},
                                  "min_chars": 1, "max_chars": 100, "max_examples": 10}, "tasks": ["mmlu"],
         "train": {"learning_rate": "1e-4"}},
        {"name": "b", "expert": "owner/b", "minus": "owner/c"},
        {"name": "c", "dataset": {"mix": [{"path": "a.jsonl", "share": 0.5}, {"path": "b.csv", "share": 0.5,
                                  "streaming": True, "max_examples": 3}], "max_examples": 5}},
    ],
    "train": {"max_steps": 3, "strategy": ["lora", "replay"], "parameters": {"lora": {"r": 8, "target_modules": ".*q"},
              "replay": {"examples": 4}}, "statistics": ["inputs"], "optim_target_modules": ["q_proj"],
              "report_to": "none", "lr_scheduler_kwargs": {"a": 1}, "model_init_kwargs": {"dtype": "auto"}},
    "merge": [{"rule": "magmax", "parameters": {"lambda": "auto"}, "dtype": "bfloat16", "tokenizer_from": "b"},
              {"name": "two", "rule": "opcm", "start_from": "merged", "shard_size": 1000}],
    "evaluate": {"general_tasks": ["hellaswag", {"name": "t", "dataset": "t.jsonl", "kind": "multiple_choice",
                 "choices": ["a", "b"]}], "limit": 8, "batch_size": 4, "same_within": {"accuracy": 0.02}},
    "guard": {"max_forgetting": 0.01, "on": ["general"], "ladder": ["shrink", {"rule": "average"}, "keep_previous"]},
    "publish": {"repo_id": "me/x", "merge": "two", "license": "mit"},
}  # fmt: skip
_STUDY: dict[str, Any] = {
    "name": "s", "recipe": {**_RECIPE, "stages": [{"name": n, "expert": f"o/{n}"} for n in "abc"]}, "orders": 2,
    "seeds": [0, 1], "vary": {"train.learning_rate": [1e-5, 1e-4], "merge.0.rule": ["average", "opcm"]},
    "settings": [{"name": "slow", "set": {"train.strategy": "lora", "train.max_steps": 3}}], "reference": "average",
}  # fmt: skip
_ORDERS = {**_STUDY, "orders": [["a", "b", "c"], ["c", "b", "a"]], "vary": {}}
_MERGEKIT = """
merge_method: ties
base_model: {model: {path: owner/base, revision: main}}
models:
  - model: owner/base
  - model: a+b
    parameters: {weight: 1.0, density: 0.5}
  - model: {model: {path: "x@y"}, lora: {path: z}}
    parameters: {weight: 1.0, density: 5e-1}
parameters: {normalize: true, lambda: 0.5, int8_mask: true}
dtype: bfloat16
out_dtype: float16
tokenizer: {source: base}
"""
_TASK = """
task: t
tag: [x, y]
dataset_path: json
dataset_kwargs: {data_files: {test: texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: "{{ text[:9] | upper }}"
doc_to_target: text
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
filter_list: [{name: x, filter: [{function: regex, regex_pattern: 'a(b|c)*'}, {function: take_first}]}]
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
num_fewshot: 1
metadata: {version: 1.0}
"""
_GROUP = (
    "group: g\ntask: [t, {task: t, num_fewshot: 2}, {group: h, task: [t]}]\naggregate_metric_list: [{metric: acc}]\n"
)
_TEMPLATES = (
    CHATML,
    "{% set ns = namespace(x=1) %}{% for m in messages if m.role == 'user' %}{{ m['content'] | trim | tojson }}"
    "{% endfor %}",
    "{% macro f(x) %}{{ x[0] ~ x|length }}{% endmacro %}{{ f(messages) }}{{ raise_exception('no') }}",
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{{ strftime_now('%Y') }}",
)
_PATTERNS = (
    r"(?:.*?(?:language|text).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp))", r".*\.(q|k|v)_proj$",
    r"(-?[$0-9.,]{2,})|(-?[0-9]+)", r"(?s).*answer is:? *([A-D])", r"(?P<a>x)(?(a)y|z)(?=b)(?<!c)\1",
    r"x{2,5}?y*+(?>a|b)",
)  # fmt: skip
_JSONL = (
    '{"text": "the quick brown fox", "n": 1.50}\n{"text": "jumps", "n": 2}\n',
    '{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}\n',
    '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "tools": null}\n',
    '{"prompt": "p", "chosen": "c", "rejected": "r"}\nnull\n{"chosen": [{"role": "user", "content": "x"}, {"role": '
    '"assistant", "content": "y"}], "rejected": [{"role": "user", "content": "x"}, {"role": '
    '"assistant", "content": "z"}]}\n',
    '[{"text": "a"}, "b",\n {"text": "c", "tools": [{"type": "function"}], "chat_template_kwargs": {"think": true}}]\n',
    '{"query": "2+2?", "choices": ["3", "4"], "gold": 1}\n{"query": "x", "choices": ["a"], "gold": "0"}\n',
)
_CSV = ('text,label\n"a, b",1\nc,\n', "text\tlabel\na\t0\n", 'a;b\n"x ""y""\nz";2\n', "\ufefftext\nhello\n")


def _records(home: Path) -> list[bytes]:
    return [sealed_json(b'{\n "format": 2,\n "a": [1, {"b": null}],\n "versions": {"torch": "2"}\n}')]


def _log_lines(_home: Path) -> list[bytes]:
    from hf_contmerge.runtime.records import sealed_line

    values = {"model": "x", "experts": 1, "kept": 0.5}
    return [(sealed_line(values) + sealed_line({**values, "experts": 2})).encode()]


def _header(entries: dict[str, Any], size: int) -> bytes:
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + bytes(size)


def _headers(_home: Path) -> list[bytes]:
    one = {"a.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    two = {**one, "b": {"dtype": "BF16", "shape": [], "data_offsets": [16, 18]}, "__metadata__": {"format": "pt"}}
    return [
        _header(one, 16),
        _header(two, 18),
        _header({"e": {"dtype": "I64", "shape": [0, 3], "data_offsets": [0, 0]}}, 0),
    ]


# Parsers


def _recipe(place: Place) -> Any:
    from hf_contmerge.run.recipe.text import load_recipe

    return load_recipe(place.file)


def _recipe_in_full(place: Place) -> Any:
    from hf_contmerge.run.recipe.text import load_recipe, recipe_yaml

    recipe = load_recipe(place.file)
    recipe_yaml(recipe)
    return (
        [recipe.train_of(stage) for stage in recipe.stages if stage.dataset],
        list(recipe.tasks()),
        recipe.run_folder(),
    )


def _override(place: Place) -> Any:
    from hf_contmerge.run.recipe.text import apply_override, parse_recipe

    data = json.loads(json.dumps(_LONG_RECIPE))
    apply_override(data, place.text)
    return parse_recipe(data)


def _study(place: Place) -> Any:
    from hf_contmerge.run.recipe.study import load_study, study_cells

    return study_cells(load_study(place.file))


def _mergekit_recipe(place: Place) -> Any:
    from hf_contmerge.merging.in_mergekit.recipe import read_mergekit_recipe

    return read_mergekit_recipe(place.file)


def _pattern(place: Place) -> Any:
    import re

    from hf_contmerge.runtime.patterns import require_quick

    pattern = place.text
    require_quick(pattern)
    for text in ("a" * 60, "model.layers.10.self_attn.q_proj", "x1-y 2,3." * 6):
        re.match(pattern, text)


def _printed(place: Place) -> Any:
    from hf_contmerge.runtime.hiding import blanked, printable, secrets_in, shown

    text = place.text
    shown_text = printable(text)
    assert "\x1b" not in shown_text
    return shown_text, list(secrets_in({text: [text]})), shown(text), blanked({"token": text})


def _format(place: Place) -> Any:
    from hf_contmerge.training._format import read_format
    from hf_contmerge.training._forms import require_columns

    row = {"text": "a", "q": 1.5, "list": [1, {"x": None}], "a.b": None, "": True}
    format = read_format(place.text, row, "`text`")
    require_columns(list(row), format.columns, "data")
    return format.fill(row, exact=True)


def _model_name(place: Place) -> Any:
    from hf_contmerge.models.folder import resolve_model
    from hf_contmerge.models.headers import resolve_headers

    name = place.text
    if name.startswith("quickstart:"):  # the package's own model
        return None
    return resolve_headers(name, place.folder / "out") if len(name) % 2 else resolve_model(name)


def _record(place: Place) -> Any:
    from hf_contmerge.runtime.records import read_record

    return read_record(place.file, "Restore it.")


def _lines(place: Place) -> Any:
    from hf_contmerge.runtime.records import read_lines

    return read_lines(place.file, "Remove it.")


def _sealed(place: Place) -> Any:
    from hf_contmerge.runtime.records import require_seal

    return require_seal(place.file, "Restore it.")


def _state(place: Place) -> Any:
    from hf_contmerge.loop.verify import verify_state
    from hf_contmerge.merging.state import MergeState
    from hf_contmerge.runtime.plugins import require_same

    state = MergeState.load(place.file.parent)
    log = state.log()
    require_same(log.versions, place.file.parent)
    rule = state.rule()
    rule.scale(log.norms()), log.trust(), [f"{e.norm:.4f} {e.kind:8s} {e.sha256[:12]}" for e in log.experts]
    log.lineage()
    return verify_state(state)


def _exports(place: Place) -> Any:
    from hf_contmerge.merging.state import MergeState
    from hf_contmerge.models.survival import Survival

    return [(e["experts"], e["model"], Survival.read(e).in_words()) for e in MergeState(place.file.parent).exports()]


def _grown(place: Place) -> Any:
    """Add an expert to a state, then export it: the whole of what reads state.json."""
    from hf_contmerge.merging.state import MergeState

    copy = place.folder / "out" / "state"
    shutil.copytree(place.file.parent, copy)
    state = MergeState.load(copy).add(place.home / "merged")
    state.export(place.folder / "out" / "model")


def _reported(place: Place) -> Any:
    """Write the report of a forged run; its pictures, which take a second, now and then."""
    from hf_contmerge.report._pages import pages
    from hf_contmerge.report._tables import cost_tables, costs
    from hf_contmerge.report.write import load_results, print_table, sections, summary, write_report
    from hf_contmerge.run.folder import Run

    run = Run.load(place.folder / "run")
    if place.file.stat().st_size % 16 == 0:
        return write_report(run)
    results = load_results(run)
    with redirect_stdout(io.StringIO()):
        print_table(run)
    shown = [section for section in sections(run, results) if not section.empty]
    return pages(run, results, [], shown), json.dumps(summary(run, results)), cost_tables(costs(run))


def _pushed(place: Place) -> Any:
    """List what a push of a forged run would send."""
    from hf_contmerge.report.push import Wish, publications_of
    from hf_contmerge.run.folder import Run

    run = Run.load(place.folder / "run")
    run.require_same_plugins()
    wish = Wish("me/x", with_state=True, with_documents=True, online=False)
    for publication in publications_of(run, wish):
        publication.to_json()
        for name, contents in ((n, c) for r in publication.revisions for n, c in r.files.items()):
            assert ".." not in name.split("/")
            assert isinstance(contents, bytes) or contents.resolve().is_relative_to(run.folder.resolve())


def _lineage(place: Place) -> Any:
    from hf_contmerge.loop.proof import find_model, prove
    from hf_contmerge.loop.verify import verify_model

    folder = place.file.parent
    verify_model(folder)
    model = find_model(str(folder))
    return list(prove(model, {})) if model.lineage else None


def _statistics(place: Place) -> Any:
    from hf_contmerge.models.statistics import Statistics, damaged_statistics, statistics_digest

    folder = place.file.parents[1]
    found, names = Statistics(folder), ("model.layers.0.mlp.up_proj.weight", "x")
    for name in names:
        found.of(name, found.kinds, torch.device("cpu"))
        found.prefetch(name)
    return damaged_statistics(folder), statistics_digest(folder)


def _header_of(place: Place) -> Any:
    from hf_contmerge.models.weights import Weights, weights_sha256

    weights = Weights(place.file)
    for name in weights.floating():
        weights.tensor(name).sum()
    return weights.main_dtype, weights.numel(), weights.depths, weights_sha256(place.file)


def _index(place: Place) -> Any:
    from hf_contmerge.models.folder import resolve_model
    from hf_contmerge.models.weights import Weights

    folder = place.file.parent
    return Weights(folder).shapes(), resolve_model(str(folder))


def _config(place: Place) -> Any:
    from hf_contmerge.models.experts import check_mergeable, open_expert
    from hf_contmerge.models.folder import copy_companions, resolve_model
    from hf_contmerge.models.weights import Weights

    folder = resolve_model(str(place.file.parent))
    check_mergeable(folder)
    open_expert(folder, Weights(place.home / "base"))
    open_expert(place.home / "adapter", Weights(folder))
    (place.folder / "out").mkdir()
    copy_companions(folder, place.folder / "out", dtype=torch.bfloat16)


def _adapter(place: Place) -> Any:
    from hf_contmerge.models.experts import expert_sha256, open_expert
    from hf_contmerge.models.folder import resolve_model
    from hf_contmerge.models.lora.settings import check_loadable
    from hf_contmerge.models.weights import Weights

    folder, base = resolve_model(str(place.file.parent), adapters=True), _base_weights(place.home)
    check_loadable(folder)
    expert = open_expert(folder, base)
    for name in base.names:
        expert.rank(name), expert.factors(name)
        expert.reader(name, base.tensor(name))(0, 4, torch.zeros(4))
    expert_sha256(folder)
    return Weights


@functools.cache
def _base_weights(home: Path) -> Any:
    from hf_contmerge.models.weights import Weights

    return Weights(home / "base")


def _tokenizer(place: Place) -> Any:
    from hf_contmerge.models.config import special_tokens, tokens_of
    from hf_contmerge.models.function import check_meaning
    from hf_contmerge.models.tokenizer import tokenizer_change

    folder, base = place.file.parent, place.home / "base"
    tokens_of(folder), special_tokens(folder)
    change = tokenizer_change(base, folder)
    check_meaning(base, folder)
    check_meaning(folder, base)
    if change:
        copy = Path(shutil.copytree(base, place.folder / "out"))
        change.write(copy)


def _loaded_tokenizer(place: Place) -> Any:
    from hf_contmerge.models.loading import load_tokenizer

    tokenizer = load_tokenizer(place.file.parent)
    return tokenizer("the quick brown fox")["input_ids"]


def _chat_template(place: Place) -> Any:
    from hf_contmerge.run.recipe.schema import Train
    from hf_contmerge.training.limits import TrainerLimits
    from hf_contmerge.training.tokenizer import stage_tokenizer

    train = Train.model_validate({"chat_template_path": str(place.file)})
    tokenizer = stage_tokenizer(place.home / "base", train)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return TrainerLimits(train, lambda: tokenizer).check({"messages": turns}, "messages")


def _task_file(place: Place) -> Any:
    from hf_contmerge.scoring._formats import list_tasks, read_task
    from hf_contmerge.scoring._strangers import _require_harmless
    from hf_contmerge.scoring._task_digest import TaskDigests
    from hf_contmerge.scoring.cache import JsonStore

    digests = TaskDigests.open([place.file.parent], JsonStore(None))
    [digests.sha256(name) for name in list_tasks(place.file.parent).files]
    _require_harmless(place.file, trusted=False, seen=set())
    return read_task


def _task(place: Place) -> Any:
    """Load a task as scoring does, and render its requests."""
    from lm_eval.tasks import TaskManager

    from hf_contmerge.run.recipe.parts import Task
    from hf_contmerge.scoring._strangers import foreign_tasks
    from hf_contmerge.scoring.tasks import check_tasks, sample_requests

    with suppress(Exception), foreign_tasks(trust_remote_code=False):  # the parsers below have the same file
        if "t" not in TaskManager(include_path=[place.file.parent], include_defaults=False).all_tasks:
            return None  # else lm-eval looks through its own thousands
    check_tasks([Task(name="t")], [place.file.parent])
    return sample_requests("t", [place.file.parent], few_shot=None, limit=3)


def _task_template(place: Place) -> Any:
    from lm_eval.utils import env

    from hf_contmerge.scoring._strangers import _sandbox

    return _sandbox(env.filters).from_string(place.text).render(text="a b", choices=["x", "y"], n=2)


def _read(kind: Any) -> Callable[[Place], Any]:
    def read(place: Place) -> Any:
        from hf_contmerge.training._records import parse_record, read_records

        return [parse_record(record.text) for record in read_records(str(place.file), "data", kind)]

    return read


def _examples(place: Place) -> Any:
    """Make examples and questions of a file's records."""
    import datasets

    from hf_contmerge.run.recipe.parts import DataSource, Task
    from hf_contmerge.training._asked import asked_of
    from hf_contmerge.training._forms import fit_rows
    from hf_contmerge.training._records import read_records
    from hf_contmerge.training._rows import Rows

    records = list(read_records(str(place.file), "data", "json"))
    if not records:
        return
    columns = {name: [getattr(r, name) for r in records] for name in ("text", "place")}
    rows = Rows("data", datasets.Dataset.from_dict(columns), are_records=True)
    spec = {"path": "data", "labels": {"label": ("no", "yes")}} if "label" in rows.columns else {"path": "data"}
    if "query" in rows.columns:
        task = Task.model_validate({"name": "t", "dataset": "data", "kind": "multiple_choice" if len(records) % 2 else
                                    "exact_match"})  # fmt: skip
        list(asked_of(task, rows).made())
    list(fit_rows(rows, DataSource.model_validate(spec)).rows)


def _data_file(place: Place) -> Any:
    """Read a file as a stage does."""
    from hf_contmerge.run.recipe.parts import Dataset
    from hf_contmerge.training.data import load_stage_data

    return list(load_stage_data(Dataset(path=str(place.file), heldout=1), seed=0).train)


def _parquets(home: Path) -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    tables = [{"text": ["a", "b", None]}, {"prompt": ["a", "b"], "completion": ["c", "d"]}, {"messages": [
        [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]] * 2}]  # fmt: skip
    made = []
    for table in tables:
        sink = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table(table), sink)
        made.append(sink.getvalue().to_pybytes())
    return made


def _arrows(_home: Path) -> list[bytes]:
    import pyarrow

    table, sink = pyarrow.table({"text": ["a", "b", "c"]}), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return [sink.getvalue().to_pybytes()]


def _gguf(place: Place) -> Any:
    from hf_contmerge.models.folder import _dequantise
    from hf_contmerge.models.headers import _of_gguf

    _of_gguf(place.file, place.folder / "out" / "headers")
    _dequantise(place.file, place.folder / "out" / "whole")


def _ggufs(home: Path) -> list[bytes]:
    """Return a llama of one layer."""
    import gguf
    import numpy as np

    file, words = home / "toy.gguf", ["<unk>", "<s>", "</s>", "a", "b", "ab"]
    if not file.exists():
        writer = gguf.GGUFWriter(file, "llama")
        for name, value in (
            ("block_count", 1),
            ("context_length", 32),
            ("embedding_length", 8),
            ("head_count", 2),
            ("feed_forward_length", 16),
            ("head_count_kv", 2),
            ("vocab_size", len(words)),
        ):
            getattr(writer, f"add_{name}")(value)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_types([1] * len(words))
        writer.add_token_merges(["a b"])
        shapes = {"token_embd": (6, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,),
                  **{f"blk.0.attn_{n}": (8, 8) for n in ("q", "k", "v", "output")}, "blk.0.ffn_up": (16, 8),
                  "blk.0.ffn_gate": (16, 8), "blk.0.ffn_down": (8, 16)}  # fmt: skip
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [file.read_bytes()]


def _score_file(place: Place) -> Any:
    from hf_contmerge.run.scores import _read_documents

    return _read_documents(place.file)


def _score_files(_home: Path) -> list[bytes]:
    import pyarrow
    from pyarrow import parquet

    sink = pyarrow.BufferOutputStream()
    values = {"task": ["t", "t"], "document": ["a", "b"], "gain": [0.5, 1.0], "weight": [1.0, 2.0], "answer":
              [None, "x"], "text": ["a", None]}  # fmt: skip
    parquet.write_table(pyarrow.table(values), sink, compression="zstd", write_page_checksum=True)
    return [sink.getvalue().to_pybytes()]


def _forged(name: str) -> Seeds:
    return lambda home: [(home / name).read_bytes()]


def _statistics_records(_home: Path) -> list[bytes]:
    kinds = {"inputs": {"examples": 4, "tokens": 9, "data": "0", "same": {"b": "a"}}}
    values = {"format": 2, "expert_sha256": "0" * 64, "kinds": kinds, "files": {"inputs.safetensors": "0" * 32}}
    return [sealed_json(json.dumps(values, indent=1).encode())]


def _sealed_recipes(home: Path) -> list[bytes]:
    return [sealed_yaml(text) for text in _recipes(home)]


_OF_A_RUN: Sequence[tuple[str, Form, str]] = (
    ("recipe", "sealed yaml", "recipe.yml"), ("inputs", "record", "inputs.json"),
    ("training", "record", "stages/02-s2/experts/previous/train.json"),
    ("merge", "record", "stages/02-s2/merges/magmax/merge.json"),
    ("score", "record", "stages/02-s2/merges/magmax/score.json"),
)  # fmt: skip

TARGETS: Sequence[Target] = (
    # Recipes
    Target("recipe", "yaml", "r.yml", _recipe, _recipes, examples=40, turn=4),
    Target("recipe in full", "yaml", "r.yml", _recipe_in_full, _recipes),
    Target("override", "text", "r.txt", _override, _texts("train.max_steps=3", "merge.0={rule: opcm}", "a.b.c=[1]")),
    Target("study", "yaml", "s.yml", _study, lambda _: [yaml.safe_dump(s).encode() for s in (_STUDY, _ORDERS)],
           examples=50),
    Target("mergekit recipe", "yaml", "m.yml", _mergekit_recipe,
           lambda _: [_MERGEKIT.encode(), *((ROOT / "recipes" / n).read_bytes() for n in ("magmax.yml", "opcm.yml"))],
           turn=4),
    # Words
    Target("pattern", "text", "p.txt", _pattern, _texts(*_PATTERNS), refuses=(ValueError,), turn=4),
    Target("text to print", "text", "t.txt", _printed,
           _texts("hf_" + "a" * 32, "https://u:p@h/x?token=1", "a\x1b[2Jb")),
    Target("format", "text", "f.txt", _format, _texts("text", "{text}: {q:.2f}", "{list[0]!r:>9}{a.b}"),
           refuses=(ValueError, TypeError)),
    Target("model name", "text", "n.txt", _model_name, _texts("owner/model@main", "~/x", "quickstart:x", "a.gguf")),
    # Records
    Target("record", "record", "record.json", _record, _records, turn=4),
    Target("log line", "bytes", "exports.jsonl", _lines, _log_lines, turn=2),
    Target("sealed yaml", "sealed yaml", "recipe.yml", _sealed, _sealed_recipes),
    Target("state", "record", "state/state.json", _state, _forged("state/state.json"), like="state", examples=50),
    Target("state grown", "record", "state/state.json", _grown, _forged("state/state.json"), like="state", examples=5),
    Target("exports", "bytes", "state/exports.jsonl", _exports, _forged("state/exports.jsonl"), like="state",
           examples=50),
    *(
        Target(f"{what} of {name}", form, f"run/{file}", read, _forged(f"run/{file}"), like="run", examples=2, turn=8)
        for name, form, file in _OF_A_RUN
        for what, read in (("report", _reported), ("push", _pushed))
    ),
    Target("lineage", "record", "merged/merge.json", _lineage, _forged("merged/merge.json"), like="merged",
           examples=10),
    Target("statistics", "record", "expert/statistics/statistics.json", _statistics, _statistics_records,
           like="expert"),
    # Models
    Target("safetensors", "safetensors", "x.safetensors", _header_of, _headers, turn=4),
    Target("index", "json", "base/model.safetensors.index.json", _index,
           lambda _: [b'{"metadata": {}, "weight_map": {"model.norm.weight": "model.safetensors"}}'], like="base"),
    Target("config", "json", "base/config.json", _config, _files("base/config.json"), like="base", examples=20),
    Target("adapter config", "json", "adapter/adapter_config.json", _adapter, _files("adapter/adapter_config.json"),
           like="adapter", examples=30),
    Target("adapter weights", "safetensors", "adapter/adapter_model.safetensors", _adapter,
           _files("adapter/adapter_model.safetensors"), like="adapter", examples=30),
    Target("tokenizer", "json", "expert/tokenizer.json", _tokenizer, _files("expert/tokenizer.json"), like="expert",
           examples=30),
    Target("tokenizer config", "json", "expert/tokenizer_config.json", _tokenizer,
           _files("expert/tokenizer_config.json"), like="expert", examples=30),
    Target("tokenizer loaded", "json", "base/tokenizer.json", _loaded_tokenizer, _files("base/tokenizer.json"),
           like="base", examples=5),
    Target("chat template", "text", "c.jinja", _chat_template, _texts(*_TEMPLATES), examples=10),
    Target("gguf", "bytes", "m.gguf", _gguf, _ggufs, examples=5),
    # Tasks
    Target("task file", "yaml", "tasks/t.yaml", _task_file, _texts(_TASK, _GROUP, "include: t.yaml\ntask: [a]\n"),
           turn=2),
    Target("task", "yaml", "tasks/t.yaml", _task, _texts(_TASK), examples=2),
    Target("task template", "text", "t.jinja", _task_template, _texts("{{ text | upper }}", "{{ 3 * 'a' }}{{ n ** 2 }}",
           "{% for c in choices %}{{ c ~ loop.index }}{% endfor %}", "{{ text | regex_replace('a', 'b') }}"),
           refuses=(Exception,)),
    # Data
    Target("jsonl", "lines", "d.jsonl", _read("json"), _texts(*_JSONL), turn=4),
    Target("csv", "bytes", "d.csv", _read("csv"), _texts(*_CSV), turn=4),
    Target("txt", "bytes", "d.txt", _read("text"), _texts("a\r\nb\n", "\ufeffa\n"), turn=4),
    Target("examples", "lines", "d.jsonl", _examples, _texts(*_JSONL), examples=30, turn=2),
    Target("parquet", "bytes", "d.parquet", _data_file, _parquets, examples=5),
    Target("arrow", "bytes", "d.arrow", _data_file, _arrows, examples=5),
    Target("scores", "bytes", "score.parquet", _score_file, _score_files, examples=30),
)  # fmt: skip
"""All parsers of files that others may have made."""
