"""The text in a file is the text that is trained on and asked for, whatever it looks like."""

import bz2
import csv
import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from toys.models import TEXT, toy_llama, write_jsonl

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.parts import Dataset, DataSource, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.scoring.files import write_task
from hf_contmerge.scoring.tasks import load_task, task_manager
from hf_contmerge.training import _packed
from hf_contmerge.training._rows import load_rows
from hf_contmerge.training.data import StageData, load_stage_data, task_rows
from hf_contmerge.training.finetune import train_expert
from hf_contmerge.training.job import TrainJob
from hf_contmerge.training.limits import trainer_limits

Row = dict[str, Any]

# Every one of these is text that a reader somewhere takes for something else.
ODD = [
    "1969-07-20", "2020-01-01T00:00:00Z", "12:30", "007", "0x1F", "1e5", "1_000", "1,5", "3.10", "True", "false", "yes",
    "NA", "N/A", "nan", "NaN", "null", "None", "inf", "-", "#N/A", "[1, 2, 3]", "['a']", "{'a': 1}", "(1,)", "[]", '""',
    "{{text}}", "{% if x %}", "{text}", "{0}", "%s", "a\r\nb", "a\nb\n", " a ", "\ta", "a\u2028b", "a\x85b", "a\x00b",
    "\ufeffa", "é", "𝄞", "a;b", 'say "x"', "=1+1", "'", "\\n", "12345678901234567890123", "0.1234567890123456789",
]  # fmt: skip


def _jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _array(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


def _csv(path: Path, rows: list[Row], *, encoding: str = "utf-8", delimiter: str = ",", end: str = "\n") -> None:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
        writer.writerows([rows[0].keys(), *(row.values() for row in rows)])


def _parquet(path: Path, rows: list[Row], kind: Any = None) -> None:
    columns = {name: pyarrow.array([row[name] for row in rows], kind or pyarrow.string()) for name in rows[0]}
    parquet.write_table(pyarrow.table(columns), path)


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    "x.jsonl": _jsonl, "x.json": _array, "x.csv": _csv, "x.parquet": _parquet,
    "bom.csv": lambda path, rows: _csv(path, rows, encoding="utf-8-sig", end="\r\n"),
    "utf16.csv": lambda path, rows: _csv(path, rows, encoding="utf-16"),
    "semicolon.csv": lambda path, rows: _csv(path, rows, delimiter=";"),
    "x.tsv": lambda path, rows: _csv(path, rows, delimiter="\t"),
    "x.jsonl.gz": lambda path, rows: path.write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    ) and None,
    "large.parquet": lambda path, rows: _parquet(path, rows, pyarrow.large_string()),
    "view.parquet": lambda path, rows: _parquet(path, rows, pyarrow.string_view()),
    "category.parquet": lambda path, rows: _parquet(path, rows, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
}  # fmt: skip


def load(path: Path, **fields: Any) -> StageData:
    return load_stage_data(Dataset(path=str(path), **{"heldout": 0, **fields}), seed=0)


def trained(path: Path, **fields: Any) -> list[str]:
    return sorted(load(path, **fields).train["text"])


def asked(folder: Path, task: Task) -> list[tuple[str, Any]]:
    """Return the question and the answer of each document, as lm-eval reads the task's files."""
    write_task(folder, task)
    leaf = load_task(task_manager([task.name], [folder]), task).leaves[task.name]
    return [(leaf.doc_to_text(doc), leaf.doc_to_target(doc)) for doc in leaf.eval_docs]


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_odd_texts(name: str, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    if streaming and name == "view.parquet":
        pytest.skip("pyarrow cannot shuffle string views")
    WRITERS[name](tmp_path / name, [{"text": text, "n": str(i)} for i, text in enumerate(ODD)])
    fields = {"streaming": True, "max_examples": 99} if streaming else {}
    assert trained(tmp_path / name, **fields) == sorted(ODD)
    assert trained(tmp_path / name, text="{text} {n}", **fields) == sorted(f"{t} {i}" for i, t in enumerate(ODD))


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.parquet"])
def test_odd_texts_are_asked_for(name: str, tmp_path: Path) -> None:
    """Of each kind of task, as lm-eval has them."""
    WRITERS[name](tmp_path / name, [{"text": text, "gold": text} for text in ODD])
    whole = Dataset(path=str(tmp_path / name), heldout=0)
    texts = asked(tmp_path / "tasks", Task(name="ppl", kind="perplexity", dataset=whole))
    assert sorted(texts) == sorted(("", text) for text in ODD)
    exact = Task(name="exact", kind="exact_match", dataset=whole, question="text")
    assert asked(tmp_path / "tasks", exact) == [(text, text.strip()) for text in ODD]
    choice = Task(name="mc", kind="multiple_choice", dataset=whole, question="{text}", choices=tuple(ODD), answer="n")
    WRITERS[name](tmp_path / name, [{"text": text, "n": str(i)} for i, text in enumerate(ODD)])
    assert asked(tmp_path / "tasks", choice) == [(text, i) for i, text in enumerate(ODD)]
    leaf = load_task(task_manager(["mc"], [tmp_path / "tasks"]), choice).leaves["mc"]
    assert leaf.doc_to_choice(leaf.eval_docs[0]) == ODD


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A new file for each example."""
    folder, count = tmp_path_factory.mktemp("texts"), iter(range(10**9))
    return lambda name: folder / f"{next(count)}{name}"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.parquet"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(TEXTS, TEXTS), min_size=2, max_size=6))
def test_any_texts(name: str, file: Callable[[str], Path], rows: list[tuple[str, str]]) -> None:
    path = file(name)
    WRITERS[name](path, [{"prompt": a, "completion": b} for a, b in rows])
    examples = load(path).train
    assert sorted(zip(examples["prompt"], examples["completion"], strict=True)) == sorted(rows)
    exam = Task(name="exam", kind="exact_match", dataset=str(path), question="prompt", answer="completion")  # pyright: ignore
    assert task_rows(exam) == [{"query": a, "gold": b.strip()} for a, b in rows]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(TEXTS.filter(lambda t: "\n" not in t and not t.endswith("\r")), min_size=2, max_size=6))
def test_any_lines(file: Callable[[str], Path], texts: list[str]) -> None:
    path = file("x.txt")
    path.write_bytes("\ufeff".encode() + "\r\n".join(texts).encode())
    assert trained(path) == sorted(texts)


KEYS = st.sampled_from(["role", "content", "name", "tool_calls", "arguments", "a.b", "x"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
TURN = st.builds(
    lambda more, role, content: {**more, "role": role, "content": content},
    st.dictionaries(KEYS, VALUES, max_size=3), st.sampled_from(["user", "assistant", "tool"]), TEXTS,
)  # fmt: skip


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talks=st.lists(st.lists(TURN, min_size=1, max_size=3), min_size=2, max_size=4))
def test_any_conversations(file: Callable[[str], Path], talks: list[list[Row]]) -> None:
    """No field is added to a turn, and none is lost or made a string."""
    path = file("x.jsonl")
    _jsonl(path, [{"messages": talk} for talk in talks])
    found = [row["messages"] for row in load(path).train.to_list()]
    assert sorted(json.dumps(talk, sort_keys=True) for talk in found) == sorted(
        json.dumps(talk, sort_keys=True) for talk in talks
    )


# Numbers


def test_numbers_are_as_the_file_writes_them(tmp_path: Path) -> None:
    """Also where a format asks for a number of digits; JSON's other values are JSON's."""
    (tmp_path / "n.jsonl").write_text(
        '{"n": 1.10, "b": true, "l": ["é", 1]}\n{"n": 1e5, "b": null, "l": 1}\n'
        '{"n": 12345678901234567890123, "b": false, "l": {"a": "x"}}\n{"n": NaN, "b": "x", "l": 0}\n'
    )
    assert trained(tmp_path / "n.jsonl", text="{n}") == ["1.10", "12345678901234567890123", "1e5", "NaN"]
    assert trained(tmp_path / "n.jsonl", text="{b} {l}") == ['false {"a": "x"}', 'true ["é", 1]', "x 0"]
    (tmp_path / "n.csv").write_text("n\n007\n1.5\n")
    assert trained(tmp_path / "n.csv", text="{n}") == ["007", "1.5"]
    assert trained(tmp_path / "n.csv", text="{n:.2f}") == ["1.50", "7.00"]
    task = Task(name="x", kind="exact_match", dataset=str(tmp_path / "n.jsonl"), question="{l}", answer="n")  # pyright: ignore
    assert [row["gold"] for row in task_rows(task)] == ["1.10", "1e5", "12345678901234567890123", "NaN"]


def test_typed_files_keep_their_values(tmp_path: Path) -> None:
    day = pyarrow.array([0, 86400], pyarrow.timestamp("s"))
    parquet.write_table(pyarrow.table({"day": day, "n": [1, 2], "none": pyarrow.nulls(2)}), tmp_path / "x.parquet")
    assert trained(tmp_path / "x.parquet", text="{day:%Y-%m-%d} {n}") == ["1970-01-01 1", "1970-01-02 2"]
    assert (
        refused(lambda: load(tmp_path / "x.parquet", text="none"), tmp_path) == "HERE/x.parquet (split train) is empty."
    )
    assert refused(lambda: load(tmp_path / "x.parquet", text="n"), tmp_path) == (
        "HERE/x.parquet, row 1: the column n holds 1, not text. Make text of it with a format: `text: '{n}'`."
    )


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pyarrow.StringArray.from_buffers(2, pyarrow.array([0, 2, 4], pyarrow.int32()).buffers()[1],
                                          pyarrow.py_buffer(b"ok\xff\xfe")),
         "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (pyarrow.array([0, 2**50], pyarrow.timestamp("ms")), "date value out of range"),
    ],
    ids=["text", "date"],
)  # fmt: skip
def test_typed_values_that_cannot_be_read(column: pyarrow.Array, why: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    said = refused(lambda: load(tmp_path / "x.parquet", text="{text}"), tmp_path)
    assert said == f"HERE/x.parquet, row 2: cannot be read: {why}. Write the file without this row."


# Names


@pytest.mark.parametrize("name", ["a.b", "a[0]", "a b", "é", "{x}", "a.b[c].d", "1"])
def test_column_of_any_name(name: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{name: "one"}, {name: "two"}])
    assert trained(path, text=name) == ["one", "two"]
    if name != "{x}":
        assert trained(path, text=f"<{{{name}}}>") == ["<one>", "<two>"]


NAMES = ["-x", ".x", "a [v2]", "a*b", "a?b", "{a}", "%20", "ü ñ", "#a", "a&b", "__a", "a'b"]


@pytest.mark.parametrize("name", NAMES)
def test_file_and_folder_of_any_name(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    for kind in (".jsonl", ".csv", ".parquet"):
        WRITERS[f"x{kind}"](folder / f"{name}{kind}", [{"text": "1969-07-20"}, {"text": "NA"}])
        assert trained(folder / f"{name}{kind}") == ["1969-07-20", "NA"]
    inner = folder / "data"
    inner.mkdir()
    _jsonl(inner / "train.jsonl", [{"text": "007"}])
    _jsonl(inner / "test.jsonl", [{"text": "NA"}])
    assert trained(inner, heldout_split="test") == ["007"]
    task = Task(name="t", kind="perplexity", dataset=str(inner / "test.jsonl"))  # pyright: ignore
    assert asked(folder / "tasks", task) == [("", "NA")]


def test_name_of_an_archive(tmp_path: Path) -> None:
    _jsonl(tmp_path / "a::b.jsonl", [{"text": "a"}])
    assert refused(lambda: load(tmp_path / "a::b.jsonl"), tmp_path) == (
        "HERE/a::b.jsonl: `datasets` takes a name with '::' for a file in an archive. Rename it."
    )


# What is refused, with its line


WRONG: dict[str, tuple[bytes, str]] = {
    "latin.csv": (b"text\na\ncaf\xe9\n", ", line 3: byte 4 is 0xe9, which is not UTF-8. Save the file as UTF-8."),
    "latin.jsonl": (
        b'{"text": "a"}\n{"text": "\xe9"}\n',
        ", line 2: byte 11 is 0xe9, which is not UTF-8. Save the file as UTF-8.",
    ),
    "latin.txt": (b"caf\xe9\n", ", line 1: byte 4 is 0xe9, which is not UTF-8. Save the file as UTF-8."),
    "utf16.txt": (
        "text".encode("utf-16-le"),
        " looks like UTF-16 without a byte order mark. Save it as UTF-8.",
    ),
    "half.txt": (
        b"\xff\xfea",
        " is not UTF-16, as its byte order mark says. Save the file as UTF-8.",
    ),
    "number.jsonl": (
        b'{"text": "a"}\n3\n',
        ", line 2: an object with the columns was expected; got 3.",
    ),
    "list.jsonl": (
        b'{"text": "a"}\n["b"]\n',
        ', line 2: an object with the columns was expected; got ["b"].',
    ),
    "twice.jsonl": (
        b'{"text": "a"}\n{"text": "b", "text": "c"}\n',
        ", line 2: this is no JSON object (it has the key 'text' twice). Correct it, or remove it.",
    ),
    "cut.jsonl": (
        b'{"text": "a"}\n{"text": "b',
        ", line 2: this is no JSON object (Unterminated string starting at at character 10). Correct it, or remove it.",
    ),
    "cut.json": (
        b'[{"text": "a"},\n{"text": "b"}\n',
        ", line 3: this is no JSON (the array has no end: the file is cut off). Correct the file.",
    ),
    "comma.json": (
        b'[{"text": "a"}\n{"text": "b"}]',
        ", line 2: this is no JSON (',' or ']' was expected). Correct the file.",
    ),
    "half.jsonl": (
        b'{"text": "a"}\n\n{"text": "\\ud83d"}\n',
        ", line 3: text has half of a surrogate pair (U+D83D), which is no character. Remove it.",
    ),
    "fields.csv": (
        b'text,n\n"a\nb",1\nc,d,2\n',
        ", line 4: the row has 3 fields and the first line 2. Quote each field that has the delimiter, a quote or a "
        "line break in it.",
    ),
    "quote.csv": (
        b'text,n\na,1\n"b,2\nc,3\n',
        ", line 3: this is no CSV (unexpected end of data). Check the quotes in it.",
    ),
    "columns.csv": (
        b"text,text\na,b\n",
        ": two columns are named 'text'. Give each column its own name in the first line.",
    ),
    "answer.jsonl": (
        b'{"prompt": "a", "completion": "b"}\n{"prompt": "1+1", "completion": 2}\n',
        ", line 2: the column completion holds 2; text, or turns with `role` and `content`, were expected. Write it "
        "as a string.",
    ),
    "turns.jsonl": (
        b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
        ", line 1: prompt and completion must both be text, or both lists of turns.",
    ),
    "role.jsonl": (
        b'{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [{"content": "a"}]}\n',
        ", line 2: the column messages must hold conversations, lists of turns with `role` and `content`; got "
        "[{'content': 'a'}].",
    ),
    "content.jsonl": (
        b'{"messages": [{"role": "user", "content": 3}]}\n',
        ", line 1: a turn in messages has the content 3; text was expected.",
    ),
    "digits.jsonl": (
        b'{"messages": [{"role": "user", "content": "a", "x": 0.123456789012345}]}\n',
        ", line 1: a number in {'role': 'user', 'content': 'a', 'x': 0.123456789012345} has too many digits to be "
        "kept. Write it as a string.",
    ),
}  # fmt: skip


def refused(ask: Callable[[], Any], folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        ask()
    return str(caught.value).replace(str(folder), "HERE")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_file_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    contents, message = WRONG[name]
    (tmp_path / name).write_bytes(contents)
    assert refused(lambda: load(tmp_path / name), tmp_path) == f"HERE/{name}{message}"
    streamed = refused(lambda: load(tmp_path / name, streaming=True, max_examples=9), tmp_path)
    assert streamed.partition(", line")[2] == f"HERE/{name}{message}".partition(", line")[2]


def test_null_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('null\n\n{"text": "a"}\n  \n{"text": null}\n{}\n')
    data = load(tmp_path / "x.jsonl")
    assert (list(data.train["text"]), data.sources[0].left_out) == (["a"], {"lack text": 3})
    (tmp_path / "x.json").write_text('\n[null, {"text": "a"},\n"b"]\n')
    assert trained(tmp_path / "x.json") == ["a", "b"]
    (tmp_path / "y.json").write_text('{\n "text": "a"\n}\n{"text":\n"b"}')
    assert trained(tmp_path / "y.json") == ["a", "b"]


def test_empty_fields_of_csv_are_missing(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,completion\nq,a\nq,\n,a\n\n")
    data = load(tmp_path / "x.csv")
    assert (len(data.train), data.sources[0].left_out) == (1, {"lack prompt or completion": 2})
    (tmp_path / "x.jsonl").write_text('{"prompt": "q", "completion": "a"}\n{"prompt": "q", "completion": ""}\n')
    assert load(tmp_path / "x.jsonl").sources[0].left_out == {"have an empty completion": 1}


# What the trainer can learn from


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_llama(tmp_path_factory.mktemp("limits") / "base", seed=0)


def limited(path: Path, base: Path, train: Row, **fields: Any) -> StageData:
    limits = trainer_limits(Train.model_validate(train), base, trust_remote_code=False)
    return load_stage_data(Dataset(path=str(path), **{"heldout": 0, **fields}), seed=0, limits=limits)


def examples_of(form: str, size: int) -> list[Row]:
    """Return examples whose prompts have more and more words."""
    draw = random.Random(0)
    words = TEXT.split()
    texts = [" ".join(draw.choices(words, k=n + 1)) for n in range(size)]
    user = [[{"role": "user", "content": text}] for text in texts]
    answer = [{"role": "assistant", "content": "a court"}]
    made: dict[str, Callable[[int], Row]] = {
        "prompt_completion": lambda i: {"prompt": texts[i], "completion": " a court"},
        "turns": lambda i: {"prompt": user[i], "completion": answer},
        "messages": lambda i: {"messages": [*user[i], *answer]},
        "preference": lambda i: {"prompt": texts[i], "chosen": " a court", "rejected": " a claim"},
        "preference_turns": lambda i: {
            "chosen": [*user[i], *answer],
            "rejected": [*user[i], {**answer[0], "content": "x"}],
        },
    }
    return [made[form](i) for i in range(size)]


@pytest.mark.parametrize("form", ["prompt_completion", "turns", "messages", "preference", "preference_turns"])
@pytest.mark.parametrize("fields", [{}, {"truncation_mode": "keep_end"}])
def test_examples_that_trl_drops_are_left_out_and_counted(form: str, fields: Row, base: Path, tmp_path: Path) -> None:
    """TRL drops no other example of those that are left, and would drop each of the others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_contmerge.training.settings import sft_settings, trl_classes

    path = write_jsonl(tmp_path / "x.jsonl", examples_of(form, 40))
    train = {"max_length": 32, **fields}
    data = limited(path, base, train)
    everything = load(path)
    trainer_type, config = trl_classes(data.form)
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings = sft_settings(Train.model_validate(train), data, tokenizer, numel=0)
    trainer = trainer_type(
        model=AutoModelForCausalLM.from_pretrained(base), processing_class=tokenizer, train_dataset=everything.train,
        args=config(**settings, output_dir=str(tmp_path / "out")),
    )  # fmt: skip
    assert len(trainer.train_dataset) == len(data.train)
    dropped = 40 - len(data.train)
    assert bool(dropped) == (not fields)
    reason = "have no token to learn from within `max_length` (32)"
    assert data.sources[0].left_out == ({reason: dropped} if dropped else {})


def test_held_out_examples_do_not_depend_on_the_length(base: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", examples_of("prompt_completion", 40))
    held = [limited(path, base, {"max_length": n}, heldout=5).heldout.to_list() for n in (24, 1024)]
    assert held[0] == held[1]
    few = limited(path, base, {"max_length": 24}, heldout=5, max_examples=6)
    assert len(few.train) == 6
    assert sum(few.sources[0].left_out.values()) + 6 + 5 == 40


def test_nothing_is_left_to_learn_from(base: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", examples_of("prompt_completion", 40)[20:])
    assert refused(lambda: limited(path, base, {"max_length": 4}), tmp_path) == (
        "HERE/x.jsonl: all 20 examples to train on have no token to learn from within `max_length` (4). Set a larger "
        "`max_length`."
    )


REFUSING = (
    "{% for m in messages %}{{ m.content + '\n' }}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{% endfor %}"
)
ONLY_USER = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("template", "turn", "message"),
    [
        (
            REFUSING,
            {"role": "tool", "content": "c"},
            "the chat template refuses the conversation (TemplateError: no tools)",
        ),
        (
            REFUSING,
            {"role": "assistant", "content": None, "tool_calls": [1]},
            "refuses the conversation (UndefinedError: ",
        ),
        (ONLY_USER, {"role": "human", "content": "c"}, "the chat template leaves out the turns of the role 'human'."),
    ],
)
def test_conversation_that_the_template_refuses(
    template: str, turn: Row, message: str, base: Path, tmp_path: Path
) -> None:
    folder = toy_llama(tmp_path / "base", seed=0)
    (folder / "chat_template.jinja").write_text(template)
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": TALK}, {"messages": [*TALK, turn]}])
    told = refused(lambda: limited(path, folder, {}), tmp_path)
    assert told.startswith("HERE/x.jsonl, line 2: ")
    assert message in told


def test_conversations_that_teach_nothing_are_counted(base: Path, tmp_path: Path) -> None:
    empty = [[], TALK[:1], [TALK[0], {"role": "assistant", "content": None}]]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": talk} for talk in [TALK, *empty, TALK]])
    data = limited(path, base, {})
    assert len(data.train) == 2
    assert data.sources[0].left_out == {
        "have no turn": 1, "have no assistant turn": 1, "have a turn without content": 1,
    }  # fmt: skip


def test_conversations_with_and_without_tools_mix(tmp_path: Path) -> None:
    """Turns of some rows have fields of their own."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "get", "arguments": {"x": 1}}]}
    write_jsonl(tmp_path / "plain.jsonl", [{"messages": [{**TALK[0], "content": f"{i}"}, TALK[1]]} for i in range(9)])
    write_jsonl(tmp_path / "calls.jsonl", [{"messages": [{**TALK[0], "content": f"c{i}"}, call]} for i in range(9)])
    for names in (("plain", "calls"), ("calls", "plain")):
        mix = [{"path": str(tmp_path / f"{name}.jsonl"), "share": 0.5} for name in names]
        data = load_stage_data(Dataset.model_validate({"mix": mix, "heldout": 2}), seed=0)
        talks = [row["messages"] for row in data.train.to_list()]
        assert len(talks) == 16
        assert all(talk[1] in (call, TALK[1]) for talk in talks)


def test_columns_of_rows_in_memory_may_be_called_anything() -> None:
    rows = datasets.Dataset.from_dict({"text": ["1", "2"], "place": ["a", "b"]})
    from hf_contmerge.training._forms import fit_rows
    from hf_contmerge.training._rows import Rows

    assert list(fit_rows(Rows("data", rows), Dataset(path="data")).rows["text"]) == ["1", "2"]


def test_examples_that_only_the_trainer_drops_are_recorded(base: Path, tmp_path: Path) -> None:
    """Replayed ones of a stage with a larger `max_length`, say."""
    data = load(write_jsonl(tmp_path / "x.jsonl", examples_of("prompt_completion", 30)))
    train = Train.model_validate({"max_steps": 1, "max_length": 24, "save_strategy": "no"})
    (tmp_path / "expert").mkdir()
    record = train_expert(
        TrainJob(start=base, base=base, data=data, train=train),
        tmp_path / "expert",
        checkpoints=tmp_path / "checkpoints",
    )
    assert 0 < record["dropped"] < 30


# Files that unpack to more than anybody's disk

BOMBS: dict[str, Callable[[Path, bytes], object]] = {
    "bomb.jsonl.gz": lambda path, data: path.write_bytes(gzip.compress(data)),
    "bomb.jsonl.bz2": lambda path, data: path.write_bytes(bz2.compress(data)),
    "bomb.jsonl.xz": lambda path, data: path.write_bytes(lzma.compress(data)),
    "zipped.jsonl": lambda path, data: zipped(path, data),  # `datasets` looks at the first bytes
}


def zipped(path: Path, data: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.jsonl", data)


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_unpacks_to_a_thousand_times_its_bytes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_packed, "ALLOWED", 2**20)
    BOMBS[name](tmp_path / name, b'{"text": "' + b"x" * 2**22 + b'"}\n')
    with pytest.raises(DataError, match=rf"{name} has 0.0 MiB and unpacks to more than 1.0 MiB, as no text does"):
        load_rows(DataSource(path=str(tmp_path / name)))


@pytest.mark.parametrize("name", [name for name in BOMBS if name.startswith("bomb")])
def test_a_packed_file_of_texts_is_read_unless_it_is_damaged(name: str, tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "the quick brown fox %d"}\n' % i for i in range(200))
    BOMBS[name](tmp_path / name, lines)
    assert len(load_rows(DataSource(path=str(tmp_path / name)))) == 200
    cut = tmp_path / f"cut-{name}"
    cut.write_bytes((tmp_path / name).read_bytes()[:-30])
    with pytest.raises(DataError, match=r"damaged|cannot be read"):
        load_rows(DataSource(path=str(cut)))


def test_parquet_is_decoded_a_part_at_a_time(tmp_path: Path) -> None:
    """A long value and a million references to it."""
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 20_000), ["x" * 100])
    parquet.write_table(pyarrow.table({"text": long}), tmp_path / "references.parquet")
    data = load_rows(DataSource(path=str(tmp_path / "references.parquet"))).data
    assert len(data) == 20_000
    assert max(len(chunk) for chunk in data.data.column("text").chunks) <= 1000
