"""Columns next to conversations: tool definitions and template arguments reach training and held-out text."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset as Rows
from toys.models import toy_llama, write_jsonl
from transformers import AutoTokenizer

from hf_contmerge.errors import DataError
from hf_contmerge.run.recipe.parts import Dataset, Task
from hf_contmerge.run.recipe.schema import Train
from hf_contmerge.scoring.files import heldout_documents
from hf_contmerge.train_strategies.replay import in_form_of
from hf_contmerge.training._trainer import trainer_class
from hf_contmerge.training.data import StageData, load_stage_data, task_rows
from hf_contmerge.training.settings import config_of, make_strategies, sft_settings, trl_classes

TEMPLATE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% if style is defined %}STYLE {{ style }}\n{% endif %}"
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"place": {"type": "string"}}}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
"""Other keys than WEATHER's: as one column of structures, each would get the other's."""


def talk(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"ask {number}"}, {"role": "assistant", "content": "yes"}]


def load(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> StageData:
    file = write_jsonl(folder / "extras.jsonl", rows)
    return load_stage_data(Dataset(path=str(file), **{"heldout": 2, **fields}), seed=0)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = toy_llama(tmp_path / "base", seed=0)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def trained_texts(base: Path, data: StageData, out: Path) -> list[str]:
    """Return the texts that TRL's trainer makes of the examples."""
    from transformers import AutoModelForCausalLM

    tokenizer, train = AutoTokenizer.from_pretrained(base), Train()
    settings = {**sft_settings(train, data, tokenizer, numel=0), "output_dir": str(out)}
    trainer = trainer_class(trl_classes(data.form)[0], make_strategies(train))(
        model=AutoModelForCausalLM.from_pretrained(base), args=config_of(data.form, settings, "train"),
        train_dataset=data.train, processing_class=tokenizer,
    )  # fmt: skip
    return [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]


def expected(number: int, *tools: Any) -> str:
    head = f"TOOLS {json.dumps(list(tools))}\n" if tools else ""
    return f"{head}user: ask {number}\nassistant: yes\n"


@pytest.mark.parametrize("as_text", [False, True], ids=["structures", "json"])
@pytest.mark.parametrize("form", ["messages", "prompt_completion"])
def test_tools_reach_training_and_held_out_text(as_text: bool, form: str, base: Path, tmp_path: Path) -> None:
    """Each row has its own; one has none."""
    tools = [[WEATHER], [CLOCK], [WEATHER, CLOCK], None, [CLOCK]]
    columns = [
        {"messages": talk(i)} if form == "messages" else {"prompt": talk(i)[:1], "completion": talk(i)[1:]}
        for i in range(5)
    ]
    rows = [
        {**example, "tools": json.dumps(t) if as_text and t else t} for example, t in zip(columns, tools, strict=True)
    ]
    data = load(tmp_path, rows)
    held = heldout_documents(data, chars=1000, load_tokenizer=lambda: AutoTokenizer.from_pretrained(base))
    everything = held + trained_texts(base, data, tmp_path / "out")
    assert sorted(everything) == sorted(expected(i, *(t or ())) for i, t in enumerate(tools))


def test_tools_of_pairs(base: Path, tmp_path: Path) -> None:
    rows = [
        {"chosen": talk(i), "rejected": [*talk(i)[:1], {"role": "assistant", "content": "no"}], "tools": [CLOCK]}
        for i in range(4)
    ]
    data = load(tmp_path, rows)
    assert data.form == "preference"
    held = heldout_documents(data, chars=1000, load_tokenizer=lambda: AutoTokenizer.from_pretrained(base))
    assert all(text.startswith(f"TOOLS {json.dumps([CLOCK])}\nuser: ask") for text in held)
    assert json.loads(data.train[0]["tools"]) == [CLOCK]


def test_arguments_of_the_template(base: Path, tmp_path: Path) -> None:
    rows = [{"messages": talk(i), "chat_template_kwargs": {"style": f"s{i}"}} for i in range(5)]
    data = load(tmp_path, rows)
    held = heldout_documents(data, chars=1000, load_tokenizer=lambda: AutoTokenizer.from_pretrained(base))
    everything = held + trained_texts(base, data, tmp_path / "out")
    assert sorted(everything) == [f"STYLE s{i}\n{expected(i)}" for i in range(5)]


WRONG: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no json": ([{"tools": "[{"}], "line 1: the column tools is no JSON"),
    "no list": ([{"tools": json.dumps({"a": 1})}], "line 1: the column tools must hold a list of tool definitions"),
    "no definitions": ([{"tools": ["clock"]}], "line 1: the column tools must hold a list of tool definitions"),
    "arguments of some": (
        [{"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": None}],
        "line 2: the column chat_template_kwargs must hold a mapping with the same keys in every row",
    ),
    "other arguments": (
        [{"chat_template_kwargs": {"a": 1}}, {"chat_template_kwargs": {"b": 1}}],
        "the column chat_template_kwargs must hold a mapping with the same keys in every row",
    ),
    "arguments as text": (
        [{"chat_template_kwargs": "a=1"}],
        "line 1: the column chat_template_kwargs must hold a mapp",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_columns_that_are_refused(name: str, tmp_path: Path) -> None:
    extras, words = WRONG[name]
    rows = [{"messages": talk(i), **extras[min(i, len(extras) - 1)]} for i in range(4)]
    with pytest.raises(DataError) as caught:
        load(tmp_path, rows)
    assert words in str(caught.value)


def test_columns_without_a_use_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": f"the fox {i}", "tools": [CLOCK], "id": i, "url": "x"} for i in range(6)]
    with caplog.at_level(logging.INFO, logger="hf_contmerge"):
        data = load(tmp_path, rows)
        load(tmp_path, [{"q": f"why {i}", "a": "so", "n": i} for i in range(6)], text="{q} {a}")
    assert data.train.column_names == ["text"]
    file = tmp_path / "extras.jsonl"
    assert caplog.messages == [
        f"{file}: these columns are not used: tools, id, url",
        f"{file}: these columns are not used: n",
    ]


def test_columns_of_a_task_without_a_use_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": "why", "options": ["a", "b"], "label": 1, "answer": "b", "tools": [CLOCK], "id": 7}]
    file = write_jsonl(tmp_path / "asked_extras.jsonl", rows)
    asked = {"name": "t", "dataset": {"path": str(file)}, "question": "{q}"}
    chosen = {**asked, "kind": "multiple_choice", "choices": "options", "answer": "label"}
    with caplog.at_level(logging.INFO, logger="hf_contmerge"):
        task_rows(Task.model_validate(chosen))
        task_rows(Task.model_validate({**asked, "kind": "exact_match", "answer": "answer"}))
    assert caplog.messages == [
        f"{file}: these columns are not used: answer, tools, id",
        f"{file}: these columns are not used: options, label, tools, id",
    ]


def test_a_mix_of_conversations_with_tools_and_without(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    plain = write_jsonl(tmp_path / "plain" / "without_extras.jsonl", [{"messages": talk(i)} for i in range(4)])
    tools = write_jsonl(tmp_path / "with_extras.jsonl", [{"messages": talk(9), "tools": [CLOCK]} for _ in range(4)])
    for paths in ((plain, tools), (tools, plain)):
        mix: Any = [{"path": str(path), "share": 0.5} for path in paths]
        data = load_stage_data(Dataset(mix=mix, heldout=0), seed=0)
        texts = trained_texts(base, data, tmp_path / "out")
        assert sorted(texts) == sorted([*(expected(i) for i in range(4)), *[expected(9, CLOCK)] * 4])


def test_replay_keeps_tools() -> None:
    plain, tools = {"messages": talk(0)}, {"messages": talk(1), "tools": json.dumps([CLOCK])}
    for fresh, old in ((plain, tools), (tools, plain)):
        found = in_form_of(Rows.from_list([fresh]), Rows.from_list([old]), "memory")
        assert found[0] == {"tools": None, **old}
    with pytest.raises(DataError, match="replay cannot mix the examples of memory"):
        in_form_of(Rows.from_list([plain]), Rows.from_list([{**plain, "chat_template_kwargs": {"a": 1}}]), "memory")
