"""Training examples in the prompt: which ones, and that they are read and not scored, by hand in float64."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toys.models import BOS, TEXT, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.run.recipe.parts import Task
from hf_contmerge.run.recipe.schema import Recipe
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring._bm25 import Bm25
from hf_contmerge.scoring.files import heldout_documents, write_perplexity_task, write_task
from hf_contmerge.scoring.in_context import InContext
from hf_contmerge.scoring.score import score_model
from hf_contmerge.training.data import StageData, load_stage_data
from hf_contmerge.training.limits import trainer_limits

WORDS = TEXT.split()
LINES = [" ".join(WORDS[i : i + 12]) for i in range(0, 90, 5)]
ASKED = [{"prompt": f"{WORDS[i]} {WORDS[i + 1]} =", "completion": f" {WORDS[i + 2]}"} for i in range(0, 60, 3)]


def test_bm25_by_its_formula() -> None:
    texts = ["the fox and the hen", "a hen lays eggs", "The FOX!", ""]
    counts = [Counter(t.lower().replace("!", "").split()) for t in texts]
    mean = sum(map(Counter.total, counts)) / len(texts)
    expected = []
    for words in counts:
        score = 0.0
        for word in ("fox", "the", "the"):
            n, f = sum(word in c for c in counts), words[word]
            idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
            score += idf * f * 2.2 / (f + 1.2 * (1 - 0.75 + 0.75 * words.total() / mean))
        expected.append(score)
    assert Bm25(texts).scores("the fox, the") == pytest.approx(np.array(expected))
    assert Bm25(texts).ranked("unheard of").tolist() == [0, 1, 2, 3], "equal scores keep their order"


def test_scripts_without_spaces_have_words() -> None:
    assert Bm25(["支持 对象", "反对吗", "x"]).ranked("我反对")[0] == 1


def setting(home: Path, base: Path, rows: list[dict[str, Any]], **more: Any) -> tuple[Recipe, dict[str, StageData]]:
    dataset = {"path": str(write_jsonl(home / "shown_rows.jsonl", rows)), "heldout": 3}
    fields = {
        "name": "r", "base_model": str(base), "merge": ["average"], "baselines": ["in_context"],
        "stages": [{"name": "s", "dataset": dataset, **more.pop("stage", {})}],
        "evaluate": {"dtype": "float32", "batch_size": 3, "cache": False, "shots": 2, **more},
    }  # fmt: skip
    recipe = parse_recipe(fields)
    spec = recipe.stages[0].dataset
    assert spec
    limits = trainer_limits(recipe.train, base, trust_remote_code=False)
    data = load_stage_data(spec, seed=0, limits=limits)
    documents = heldout_documents(data, chars=4000, load_tokenizer=limits.load_tokenizer)
    write_perplexity_task(home / "tasks", "s_heldout", documents)
    for task in recipe.stages[0].tasks:
        write_task(home / "tasks", task)
    return recipe, {"s": data}


def scored(home: Path, base: Path, recipe: Recipe, data: dict[str, StageData]) -> dict[str, TaskScore]:
    tasks = [Task(name=name) for name in recipe.stages[0].task_names()]
    return score_model(
        base, tasks, task_folder=home / "tasks", evaluate=recipe.evaluate, ranks=OneRank(),
        shown=InContext(recipe, data, base),
    )[1]  # fmt: skip


@torch.no_grad()
def log_likelihood(base: Path, context: list[int], tokens: list[int]) -> float:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    row = torch.tensor([*context, *tokens])
    logits = model(row[None, :-1]).logits[0].log_softmax(-1)[len(context) - 1 :]
    return logits.gather(1, torch.tensor(tokens)[:, None]).sum().item()


def nearest(data: StageData, question: str, count: int, *, field: str = "text") -> list[str]:
    texts = [str(text) for text in data.train[field]]
    return [texts[i] for i in Bm25(texts).ranked(question)[:count]][::-1]


def test_a_text_is_read_behind_its_examples(base_folder: Path, tmp_path: Path) -> None:
    recipe, data = setting(tmp_path, base_folder, [{"text": line} for line in LINES])
    score = scored(tmp_path, base_folder, recipe, data)["s_heldout"]
    encode = AutoTokenizer.from_pretrained(base_folder).encode
    for document, gain in zip(data["s"].heldout["text"], score.gains, strict=True):
        front = "".join(f"{text}\n\n" for text in nearest(data["s"], document, 2))
        context = [BOS, *encode(front, add_special_tokens=False)]
        alone = encode(document, add_special_tokens=False)
        assert gain == pytest.approx(log_likelihood(base_folder, context, alone), rel=1e-5)
    assert score.details["shown"] == {"shots": 2, "examples": len(data["s"].train), "cut": 0}


@pytest.mark.parametrize("length", [3, 8, 24])
def test_long_texts_are_read_in_windows_each_behind_examples(length: int, base_folder: Path, tmp_path: Path) -> None:
    recipe, data = setting(tmp_path, base_folder, [{"text": line} for line in LINES], max_length=length)
    score = scored(tmp_path, base_folder, recipe, data)["s_heldout"]
    encode = AutoTokenizer.from_pretrained(base_folder).encode
    for document, gain in zip(data["s"].heldout["text"], score.gains, strict=True):
        front = encode("".join(f"{t}\n\n" for t in nearest(data["s"], document, 2)), add_special_tokens=False)
        tokens, start, expected = encode(document, add_special_tokens=False), 0, 0.0
        front = front[len(front) - max((length - 1) // 2, length - len(tokens)) :]
        while start < len(tokens):  # a position for each token but the last, which is only predicted
            context = [BOS, *front, *tokens[max(0, start - 1) : start]]
            end = start + length + 1 - len(context)
            expected += log_likelihood(base_folder, context, tokens[start:end])
            start = end
        assert gain == pytest.approx(expected, rel=1e-5)
    assert score.details["shown"]["cut"] == 3


def test_questions_get_examples_and_never_themselves(base_folder: Path, tmp_path: Path) -> None:
    texts = [{"text": f"{row['prompt']}{row['completion']}"} for row in ASKED]
    asked = [{"query": row["prompt"], "choices": [row["completion"].strip(), "z"], "gold": 0} for row in ASKED[:4]]
    path = str(write_jsonl(tmp_path / "asked_rows.jsonl", asked))
    quiz = {"name": "quiz", "kind": "multiple_choice", "dataset": path}
    written = {"name": "written", "kind": "exact_match", "dataset": path, "max_new_tokens": 2}
    recipe, data = setting(tmp_path, base_folder, texts, stage={"tasks": [quiz, written]})
    found = scored(tmp_path, base_folder, recipe, data)
    assert found["quiz"].details["shown"] == found["written"].details["shown"]
    shown = InContext(recipe, data, base_folder)
    shown.begin({"quiz": "quiz"})
    for number, row in enumerate(asked):
        request = type("Request", (), {"task_name": "quiz", "doc_id": number, "doc": row, "args": ("?",)})
        before = shown.before(request)
        assert row["query"] not in before
        assert before.count("\n\n") == 2
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    for number, (row, answer) in enumerate(zip(asked, found["quiz"].answers, strict=True)):
        request = type("Request", (), {"task_name": "quiz", "doc_id": number, "doc": row, "args": ("?",)})
        prompt = shown.before(request) + row["query"]
        sums = []
        for choice in row["choices"]:
            whole = tokenizer.encode(f"{prompt} {choice}")
            start = len(tokenizer.encode(prompt))
            whole = whole if whole[0] == BOS else [BOS, *whole]
            start = start if tokenizer.encode(prompt)[0] == BOS else start + 1
            with torch.no_grad():
                logits = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)[start - 1 :]
            sums.append(logits.gather(1, torch.tensor(whole[start:])[:, None]).sum().item())
        assert answer == row["choices"][int(np.argmax(sums))]


def test_prompts_alone_choose_the_examples_of_answers(base_folder: Path, tmp_path: Path) -> None:
    """The answer of a held-out example is not looked at."""
    recipe, data = setting(tmp_path, base_folder, ASKED)
    score = scored(tmp_path, base_folder, recipe, data)["s_heldout"]
    rows = list(data["s"].train)
    texts = [f"{row['prompt']}{row['completion']}" for row in rows]  # pyright: ignore[reportArgumentType, reportCallIssue]
    encode = AutoTokenizer.from_pretrained(base_folder).encode
    for row, gain in zip(data["s"].heldout, score.gains, strict=True):
        prompt, answer = row["prompt"], row["completion"]  # pyright: ignore[reportArgumentType, reportCallIssue]
        front = [texts[i] for i in Bm25(texts).ranked(prompt)[:2]][::-1]
        context = [BOS, *encode("".join(f"{t}\n\n" for t in front), add_special_tokens=False)]
        alone = encode(f"{prompt}{answer}", add_special_tokens=False)
        assert gain == pytest.approx(log_likelihood(base_folder, context, alone), rel=1e-5)


def test_conversations_are_shown_by_their_template(base_folder: Path, tmp_path: Path) -> None:
    talks = [[{"role": "user", "content": line}, {"role": "assistant", "content": "fox"}] for line in LINES]
    recipe, data = setting(tmp_path, base_folder, [{"messages": talk} for talk in talks])
    shown = InContext(recipe, data, base_folder)
    shown.begin({"s_heldout": "s_heldout"})
    (document, *_), (talk, *_) = (data["s"].heldout["messages"] for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    text = tokenizer.apply_chat_template(document, tokenize=False)
    request = type("Request", (), {"task_name": "s_heldout", "doc_id": 0, "doc": {"text": text}, "args": (text,)})
    before = shown.before(request)
    asked = [talk[0]["content"] for talk in data["s"].train["messages"]]
    best = Bm25([f"user {line} assistant fox" for line in asked]).ranked(talk[0]["content"])
    assert all(asked[i] in before for i in best[:2])
    assert before.count("<|im_start|>") == 4


def test_keys_follow_the_examples(base_folder: Path, tmp_path: Path) -> None:
    recipe, data = setting(tmp_path, base_folder, [{"text": line} for line in LINES])
    (tmp_path / "other").mkdir()
    more = parse_recipe({**recipe.model_dump(), "evaluate": {**recipe.evaluate.model_dump(), "shots": 3}})
    _, others = setting(tmp_path / "other", base_folder, [{"text": line.upper()} for line in LINES])
    shown = [InContext(recipe, data, base_folder), InContext(more, data, base_folder)]
    shown.append(InContext(recipe, others, base_folder))
    assert len({x.digest("s_heldout") for x in shown}) == 3
    assert InContext(recipe, data, base_folder).digest("s_heldout") == shown[0].digest("s_heldout")
