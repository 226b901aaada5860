"""Scores against the stock `lm_eval` command and plain transformers; groups, few-shot, limits, broken models."""

import json
import math
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys.models import TEXT, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.errors import ContmergeError, DataError, ModelError, RecipeError, ResourceError
from hf_contmerge.merging.state import MergeState
from hf_contmerge.run.recipe.parts import Dataset, Evaluate, Task
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring._strangers import _indexed
from hf_contmerge.scoring.files import (
    heldout_documents,
    write_answer_task,
    write_choice_task,
    write_perplexity_task,
    write_task,
)
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.score import score_loaded, score_model
from hf_contmerge.scoring.setup import check_template
from hf_contmerge.scoring.tasks import check_tasks, load_task, part_indices, task_manager
from hf_contmerge.training.data import load_stage_data

DOCUMENTS = (*TEXT.strip().splitlines(), "Ein Wort: naïve — 漢字.\nAnd a second line.", "one")
SUBJECTS = ("fox", "dog", "law", "hen", "claim", "court", "pulse", "nurse", "list")
QUESTIONS = [  # one token a choice, or a random model would always take the shortest
    {"query": f"A court may refuse the {s}", "choices": list("abcd")[: 3 + i % 2], "gold": i % 3}
    for i, s in enumerate(SUBJECTS)
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks: two of our own, and some as a user may write them."""
    folder = tmp_path_factory.mktemp("tasks")
    write_perplexity_task(folder, "texts", DOCUMENTS)
    write_perplexity_task(folder, "more", ["a court may refuse the claim", "the nurse measures the pulse"])
    write_choice_task(folder, "choice", QUESTIONS)
    choice = yaml.safe_load((folder / "choice.yaml").read_text())
    theirs: list[dict[str, Any]] = [
        {"group": "both", "task": ["texts", "more"]},
        {"group": "nested", "task": ["both", "tagged"]},
        {**yaml.safe_load((folder / "more.yaml").read_text()), "task": "tagged", "tag": "some_tag"},
        {"group": "mixed", "task": ["texts", "choice"]},
        {
            **choice, "task": "shots", "output_type": "loglikelihood", "doc_to_choice": None,
            "doc_to_target": " {{choices[gold]}}", "target_delimiter": "",
            "fewshot_config": {"sampler": "first_n", "samples": QUESTIONS[:2]},
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
        {**choice, "task": "norms", "metric_list": [{"metric": "mcc"}]},
        {
            **choice, "task": "generated", "output_type": "generate_until", "doc_to_choice": None,
            "doc_to_target": "{{choices[gold]}}", "generation_kwargs": {"until": ["."], "max_gen_toks": 3},
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "filter_list": [
                {"name": "strict", "filter": [{"function": "regex", "regex_pattern": "(nothing)"},
                                              {"function": "take_first"}]},
                {"name": "loose", "filter": [{"function": "take_first"}]},
            ],
        },
    ]  # fmt: skip
    for task in theirs:
        (folder / f"{task.get('group') or task['task']}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
    return folder


@pytest.fixture(scope="module")
def score(base_folder: Path, tasks: Path) -> Callable[..., dict[str, TaskScore]]:
    """Return a function that measures the base model, in float32 unless told otherwise."""

    def score(*names: str | Task, part: Any = "all", **evaluate: Any) -> dict[str, TaskScore]:
        wanted = [n if isinstance(n, Task) else Task(name=n) for n in names]
        how = Evaluate.model_validate({"dtype": "float32", "batch_size": 4, **evaluate})
        ranks = OneRank()
        return score_model(base_folder, wanted, task_folder=tasks, evaluate=how, ranks=ranks, part=part)[1]

    return score


@pytest.fixture(scope="module")
def scores(score: Callable[..., dict[str, TaskScore]]) -> dict[str, TaskScore]:
    return score("texts", "choice")


# By hand, with plain transformers


@torch.no_grad()
def log_likelihoods(folder: Path, tokens: Sequence[int], *, window: int = 512) -> torch.Tensor:
    """Return the log-probability of each token after a BOS, read in windows that do not overlap but for the last."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = torch.tensor([model.config.bos_token_id, *tokens])
    found = []
    for start in range(0, len(tokens), window):
        end = min(start + window, len(tokens))
        context = whole[max(0, end - window) : end]
        logits = model(context[None]).logits[0].log_softmax(-1)[-(end - start) :]
        found.append(logits.gather(1, whole[start + 1 : end + 1, None])[:, 0])
    return torch.cat(found)


def tokens_of(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def of_continuation(folder: Path, prompt: str, continuation: str) -> float:
    """Return the log-likelihood of a continuation after a prompt and a blank; no BOS stands before them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    begin = len(tokens_of(folder, prompt))
    ids = torch.tensor(tokens_of(folder, f"{prompt} {continuation}"))
    logits = model(ids[None]).logits[0].log_softmax(-1)
    return logits[begin - 1 : -1].gather(1, ids[begin:, None]).sum().item()


def likeliest(folder: Path, question: Mapping[str, Any]) -> str:
    return max(question["choices"], key=lambda choice: of_continuation(folder, question["query"], choice))


def right(folder: Path, question: Mapping[str, Any]) -> float:
    """Return 1 if the likeliest choice is the right one, else 0."""
    return float(likeliest(folder, question) == question["choices"][question["gold"]])


@pytest.mark.parametrize("i", range(len(DOCUMENTS)))
def test_gain_of_a_document_is_its_log_likelihood(i: int, base_folder: Path, scores: Mapping[str, TaskScore]) -> None:
    by_hand = log_likelihoods(base_folder, tokens_of(base_folder, DOCUMENTS[i])).sum().item()
    assert scores["texts"].gains[i] == pytest.approx(by_hand, rel=1e-5)
    assert scores["texts"].weights[i] == len(DOCUMENTS[i].split())


def test_gain_of_a_question_is_whether_the_likeliest_choice_is_right(
    base_folder: Path, scores: Mapping[str, TaskScore]
) -> None:
    by_hand = [right(base_folder, q) for q in QUESTIONS]
    assert set(by_hand) == {0.0, 1.0}
    assert list(scores["choice"].gains) == by_hand
    assert scores["choice"].weights == (1.0,) * len(QUESTIONS)


def test_what_a_score_says(scores: Mapping[str, TaskScore]) -> None:
    texts, choice = scores["texts"], scores["choice"]
    assert (texts.block, texts.metric) == ("perplexity", "word_perplexity")
    assert (choice.block, choice.metric) == ("accuracy", "acc")
    assert texts.value == pytest.approx(math.exp(-sum(texts.gains) / sum(texts.weights)))
    assert texts.utility == pytest.approx(-math.log(texts.value))
    assert choice.value == choice.utility == pytest.approx(sum(choice.gains) / len(QUESTIONS))
    for task in (texts, choice):
        assert task.stderr
        assert task.stderr == task.sample.stderr()
        assert TaskScore.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert texts.details["metrics"].keys() == {"word_perplexity", "byte_perplexity", "bits_per_byte"}
    assert texts.details["documents_sha256"] != choice.details["documents_sha256"]


def test_max_length_cuts_long_documents_into_windows(base_folder: Path, score: Callable[..., Any]) -> None:
    tokens = tokens_of(base_folder, DOCUMENTS[0])
    by_hand = log_likelihoods(base_folder, tokens, window=16).sum().item()
    found = score("texts", max_length=16, limit=1)["texts"]
    assert found.gains == (pytest.approx(by_hand, rel=1e-5),)
    assert found.stderr is None
    assert by_hand != pytest.approx(log_likelihoods(base_folder, tokens).sum().item(), rel=1e-4)


def test_limit_takes_the_first_documents(score: Callable[..., Any], scores: Mapping[str, TaskScore]) -> None:
    few = score("texts", "choice", limit=3)
    assert few["texts"].gains == pytest.approx(scores["texts"].gains[:3], rel=1e-5)
    assert few["choice"].gains == scores["choice"].gains[:3]


@pytest.mark.parametrize("shots", [None, 0, 1, 2])
def test_num_fewshot(shots: int | None, base_folder: Path, score: Callable[..., Any]) -> None:
    """The shots are the first questions with their answers, each followed by an empty line."""
    found = score(Task(name="shots", num_fewshot=shots))["shots"]
    assert (found.block, found.metric) == ("perplexity", "perplexity")
    answers = [(q["query"], q["choices"][q["gold"]]) for q in QUESTIONS]
    before = "".join(f"{query} {answer}\n\n" for query, answer in answers[: shots or 0])
    by_hand = [of_continuation(base_folder, before + query, answer) for query, answer in answers]
    assert found.gains == pytest.approx(by_hand, rel=1e-5)
    if before:
        without = [of_continuation(base_folder, query, answer) for query, answer in answers]
        assert found.gains != pytest.approx(without, rel=1e-4)


def test_num_fewshot_reaches_our_own_tasks(score: Callable[..., Any], scores: Mapping[str, TaskScore]) -> None:
    found = score(Task(name="choice", num_fewshot=2))["choice"]
    assert found.details["documents_sha256"] == scores["choice"].details["documents_sha256"]
    assert len(found.gains) == len(QUESTIONS)


# The stock command


def test_stock_command_measures_the_same(
    base_folder: Path, tasks: Path, scores: Mapping[str, TaskScore], tmp_path: Path
) -> None:
    command = [
        Path(sys.executable).with_name("lm_eval"), "--model", "hf",
        "--model_args", f"pretrained={base_folder},dtype=float32", "--include_path", tasks, "--tasks", "texts,choice",
        "--device", "cpu", "--batch_size", "4", "--output_path", tmp_path,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(next(tmp_path.rglob("results_*.json")).read_text())["results"]
    assert scores["texts"].value == pytest.approx(results["texts"]["word_perplexity,none"], rel=1e-5)
    assert scores["choice"].value == pytest.approx(results["choice"]["acc,none"], rel=1e-5)
    assert scores["choice"].stderr == pytest.approx(results["choice"]["acc_stderr,none"], rel=1e-5)
    for name, metric in (("texts", "bits_per_byte"), ("texts", "byte_perplexity")):
        assert scores[name].details["metrics"][metric] == pytest.approx(results[name][f"{metric},none"], rel=1e-5)


# Tasks that are several, or measure several things


def test_group_is_scored_over_all_its_documents(score: Callable[..., Any]) -> None:
    found = score("texts", "more", "both", "nested", "some_tag")
    texts, more = found["texts"], found["more"]
    assert found["both"].gains == pytest.approx(texts.gains + more.gains, rel=1e-5)
    assert found["both"].weights == texts.weights + more.weights
    assert found["nested"].gains == pytest.approx(texts.gains + more.gains + more.gains, rel=1e-5)
    assert found["some_tag"].gains == pytest.approx(more.gains, rel=1e-5)


def test_group_of_different_metrics(score: Callable[..., Any]) -> None:
    assert refused(DataError, lambda: score("mixed")) == (
        "The task mixed reports none of acc, exact_match, f1, acc_norm, prompt_level_strict_acc, word_perplexity, "
        "perplexity, byte_perplexity for every document. Use another task."
    )


def test_metric_that_no_document_has_alone(score: Callable[..., Any]) -> None:
    """Matthews' correlation is one number for all documents together: gains of documents would be nonsense."""
    assert refused(DataError, lambda: score("norms")).startswith("The task norms reports none of acc,")


def test_first_of_several_filters_counts(score: Callable[..., Any]) -> None:
    found = score("generated")["generated"]
    assert found.metric == "exact_match"
    assert len(found.gains) == len(QUESTIONS)


# Which documents, and what is kept of them


def test_what_is_kept_of_a_document(base_folder: Path, scores: Mapping[str, TaskScore]) -> None:
    texts, choice = scores["texts"], scores["choice"]
    assert texts.texts == tuple(d.strip()[:300] for d in DOCUMENTS)
    assert texts.answers == ()
    assert len(set(texts.documents)) == len(DOCUMENTS)
    assert choice.texts == tuple(q["query"] for q in QUESTIONS)
    assert choice.answers == tuple(likeliest(base_folder, q) for q in QUESTIONS)


def test_parts_share_out_the_documents(score: Callable[..., Any], scores: Mapping[str, TaskScore]) -> None:
    found = {part: score("texts", "choice", part=part) for part in ("test", "validation")}
    for name, whole in scores.items():
        gains = dict(zip(whole.documents, whole.gains, strict=True))
        parts = [found[part][name] for part in ("test", "validation")]
        assert sorted(d for p in parts for d in p.documents) == sorted(whole.documents)
        for part in parts:
            assert list(part.gains) == pytest.approx([gains[d] for d in part.documents], rel=1e-5)
            assert list(part.documents) == [d for d in whole.documents if d in part.documents]
            assert len(part.documents) >= 2
    few = score("choice", part="test", limit=6)["choice"]
    assert set(few.documents) <= set(found["test"]["choice"].documents)  # on the same side as without the limit


def test_one_document_has_no_parts(score: Callable[..., Any]) -> None:
    assert refused(DataError, lambda: score("texts", part="test", limit=1)).startswith("One document cannot be split")


def test_documents_below_a_share_are_for_validation(tmp_path: Path) -> None:
    write_perplexity_task(tmp_path, "many", [f"document {i}" for i in range(400)])
    leaf = load_task(task_manager(["many"], [tmp_path]), Task(name="many")).leaves["many"]
    counts = [len(part_indices(leaf, "validation", Evaluate(validation=share))) for share in (0.0001, 0.25, 0.5, 0.999)]
    assert counts[0] == 2  # of one alone no noise is known
    assert 75 <= counts[1] <= 125
    assert 170 <= counts[2] <= 230
    assert 390 <= counts[3] <= 398


def test_questions_with_answers_of_one_token_are_read_once(base_folder: Path, tasks: Path) -> None:
    read: list[int] = []
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: read.append(len(args[0])))
    found = loaded(model, base_folder, tasks)
    assert sum(read) == len(found["choice"].gains) == len(QUESTIONS)


def test_a_model_in_training_is_left_as_it_was(base_folder: Path, tasks: Path, scores: Mapping[str, TaskScore]) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).train()
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    assert loaded(model, base_folder, tasks)["choice"].gains == scores["choice"].gains
    assert model.training
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def loaded(model: Any, folder: Path, tasks: Path) -> dict[str, TaskScore]:
    request = ScoreRequest([Task(name="choice")], tasks, Evaluate(batch_size=4))
    return score_loaded(model, AutoTokenizer.from_pretrained(folder), request, ranks=OneRank())


def test_chat_template(base_folder: Path, score: Callable[..., Any], scores: Mapping[str, TaskScore]) -> None:
    found = score("choice", "texts", chat_template=True)
    turn = "<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
    question = QUESTIONS[0]
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    prompt = tokens_of(base_folder, turn.format(**question))
    answers = [tokens_of(base_folder, choice)[0] for choice in question["choices"]]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1, answers]
    assert found["choice"].answers[0] == question["choices"][int(logits.argmax())]
    assert found["texts"].gains == pytest.approx(scores["texts"].gains, rel=1e-5)  # a text is no prompt


def test_chat_template_that_is_not_there(base_folder: Path, tasks: Path, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    message = refused(ModelError, lambda: check_template(tmp_path / "plain"))
    assert message.startswith(f"The tokenizer of {tmp_path / 'plain'} has no chat template; `evaluate.chat_temp")
    how, ranks = Evaluate(chat_template=True), OneRank()
    refused(
        ModelError,
        lambda: score_model(tmp_path / "plain", [Task(name="choice")], task_folder=tasks, evaluate=how, ranks=ranks),
    )


def test_layers_are_laid_where_there_is_room(score: Callable[..., Any], scores: Mapping[str, TaskScore]) -> None:
    """Without a GPU, that is all in memory."""
    found = score("texts", parallel="layers")["texts"]
    assert (found.gains, found.weights) == (scores["texts"].gains, scores["texts"].weights)


@pytest.mark.parametrize("way", [{"parallel": "tensor"}, {"backend": "vllm"}])
def test_ways_that_this_job_does_not_have(way: dict[str, str], base_folder: Path, tasks: Path) -> None:
    ((name, value),) = way.items()
    how, ranks = Evaluate.model_validate(way), OneRank()
    nothing = tasks / "no model is looked for here"
    message = refused(ResourceError, lambda: score_model(nothing, [], task_folder=tasks, evaluate=how, ranks=ranks))
    assert message.startswith(f"`evaluate.{name}: {value}` ")
    assert ("this job has one rank" if name == "parallel" else "is not installed") in message


@pytest.mark.slow
def test_batch_size_auto_is_what_memory_holds(base_folder: Path) -> None:
    """As on a GPU, played here: above a number of rows, this model's memory is full."""
    from hf_contmerge.scoring._lm import SharedLM

    room, read = 20, list[int]()

    def refuse(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        if len(args[0]) > room:
            raise RuntimeError("CUDA out of memory.")
        read.append(len(args[0]))

    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    requests = [(None, [1], [5 + i, *range(10, 20 + i % 7)]) for i in range(64)]
    wanted = SharedLM(model, tokenizer, OneRank(), batch_size=4)._loglikelihood_tokens(requests)
    played = SharedLM(model, tokenizer, OneRank(), batch_size="auto")
    played.batch_size_per_gpu = "auto"
    model.register_forward_pre_hook(refuse)
    found = played._loglikelihood_tokens(requests)
    assert room / 2 < max(read) <= room
    assert len(read) == 1 + math.ceil(64 / max(read))  # the one that fitted, then the work
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    assert [likelihood for likelihood, _ in found] == pytest.approx([likelihood for likelihood, _ in wanted], rel=1e-5)


# Which weights were scored


def test_bfloat16_scores_are_near_and_summed_in_float32(
    score: Callable[..., Any], scores: Mapping[str, TaskScore]
) -> None:
    found = score("texts", dtype="bfloat16")["texts"]
    assert found.gains == pytest.approx(scores["texts"].gains, rel=1e-2)
    assert any(gain != torch.tensor(gain).bfloat16().item() for gain in found.gains)


def test_a_float32_merge_scored_in_16_bits_is_the_one_stored_in_16_bits(
    base_folder: Path, tasks: Path, tmp_path: Path
) -> None:
    """transformers would round it to nearest, which drops the update: the scores would be the base's."""
    base, expert = Path(shutil.copytree(base_folder, tmp_path / "base")), tmp_path / "expert"
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    shutil.copytree(base, expert)
    start = load_file(base / "model.safetensors")
    moved = {n: t.float() * (1 + 2.0**-10) for n, t in start.items()}  # a quarter of the last bit
    save_file(moved, expert / "model.safetensors", metadata={"format": "pt"})
    state = MergeState.create(tmp_path / "state", base=base, rule="average").add(expert)
    folders = [base, *(state.export(tmp_path / dtype, dtype=dtype) for dtype in ("float32", "bfloat16"))]
    how = Evaluate(dtype="bfloat16", cache=False)
    found = [score_model(f, [Task(name="texts")], task_folder=tasks, evaluate=how, ranks=OneRank()) for f in folders]
    assert {key.dtype for key, _ in found} == {"bfloat16"}
    before, wide, half = (scores["texts"].gains for _, scores in found)
    assert wide == half
    assert wide != before


@pytest.mark.parametrize("task", ["texts", "choice"])
@pytest.mark.parametrize("tensor", ["model.norm.weight", "model.embed_tokens.weight"])
def test_model_of_nan(task: str, tensor: str, base_folder: Path, tasks: Path, tmp_path: Path) -> None:
    """Even where an argmax among them would give an accuracy."""
    shutil.copytree(base_folder, tmp_path / "nan")
    weights = load_file(base_folder / "model.safetensors")
    save_file(
        {**weights, tensor: weights[tensor] * math.nan}, tmp_path / "nan/model.safetensors", metadata={"format": "pt"}
    )
    how, ranks = Evaluate(dtype="float32"), OneRank()
    message = refused(
        DataError,
        lambda: score_model(tmp_path / "nan", [Task(name=task)], task_folder=tasks, evaluate=how, ranks=ranks),
    )
    assert message == f"The task {task} gave nan or infinity on this model: its weights are damaged or diverged."


# Tasks made from datasets, and tasks that are not there


def test_values_that_look_like_python_stay_text(tmp_path: Path) -> None:
    """lm-eval evaluates what its templates make of numbers and lists."""
    choices = ["[1]", "7"]
    write_choice_task(tmp_path, "c", [{"query": "7", "choices": choices, "gold": 1}])
    write_answer_task(tmp_path, "a", [{"query": "7", "gold": "[1, 2]"}], max_new_tokens=1, stop=[])
    manager = task_manager(["c", "a"], [tmp_path])
    choice, answer = (load_task(manager, Task(name=name)).leaves[name] for name in ("c", "a"))
    doc = choice.eval_docs[0]
    assert (choice.doc_to_text(doc), choice.doc_to_choice(doc), choice.doc_to_target(doc)) == ("7", choices, 1)
    assert (answer.doc_to_text(answer.eval_docs[0]), answer.doc_to_target(answer.eval_docs[0])) == ("7", "[1, 2]")


def test_write_task(tmp_path: Path, score: Callable[..., Any], base_folder: Path) -> None:
    texts = write_jsonl(tmp_path / "t.jsonl", [{"body": "the quick brown fox"}] * 3)
    asked = write_jsonl(tmp_path / "c.jsonl", [{"ask": "which?", "options": ["a", "b"], "right": 1}] * 3)
    fields: list[dict[str, Any]] = [
        {"name": "t", "kind": "perplexity", "dataset": {"path": str(texts), "text": "body", "heldout_chars": 9}},
        {"name": "c", "kind": "multiple_choice", "dataset": str(asked), "question": "ask", "choices": "options",
         "answer": "right"},
    ]  # fmt: skip
    made = [Task.model_validate(f) for f in fields]
    for task in made:
        write_task(tmp_path / "tasks", task)
    check_tasks(made, [tmp_path / "tasks"])
    how, ranks = Evaluate(dtype="float32"), OneRank()
    found = score_model(base_folder, made, task_folder=tmp_path / "tasks", evaluate=how, ranks=ranks)[1]
    by_hand = log_likelihoods(base_folder, tokens_of(base_folder, "the quick")).sum().item()
    assert found["t"].gains == (pytest.approx(by_hand, rel=1e-5),) * 3
    assert found["t"].weights == (2.0,) * 3
    assert set(found["c"].gains) == {right(base_folder, {"query": "which?", "choices": ["a", "b"], "gold": 1})}


def test_exact_match_is_what_the_model_writes(base_folder: Path, tmp_path: Path) -> None:
    prompts = ["The nurse and the hen", "A court may refuse the claim", "red, green and blue"]
    written = [greedy(base_folder, prompt, 3) for prompt in prompts]
    rows = [{"ask": p, "says": w if i else "other"} for i, (p, w) in enumerate(zip(prompts, written, strict=True))]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    task = Task.model_validate({"name": "x", "kind": "exact_match", "dataset": str(path), "question": "ask",
                                "answer": "says", "max_new_tokens": 3})  # fmt: skip
    write_task(tmp_path / "tasks", task)
    how, ranks = Evaluate(dtype="float32"), OneRank()
    found = score_model(base_folder, [task], task_folder=tmp_path / "tasks", evaluate=how, ranks=ranks)[1]["x"]
    assert found.metric == "exact_match"
    assert found.answers == tuple(written)
    assert found.gains == (0.0, 1.0, 1.0)


def greedy(folder: Path, prompt: str, count: int) -> str:
    """Return what a model writes, token by token; it stops at no line's end, so the caller's prompts must not."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokens_of(folder, prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokenizer.decode(tokens[-count:], skip_special_tokens=True).partition("\n")[0].strip()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question": "{ask}?", "choices": ["a", "b"]}, "Unknown column 'gold' in "),
        ({"question": "{aks}?", "choices": ["a", "b"], "answer": "right"}, "Unknown column 'aks' in "),
        ({"question": "ask", "answer": "right"}, "Unknown column 'choices' in "),
        ({"question": "ask", "choices": ["a", "b"], "answer": "ask"}, "ask must be the right choice or its index; "),
        ({"question": "{ask", "choices": ["a"], "answer": "right"}, "`question` of "),
        ({"kind": "exact_match", "question": "ask", "answer": "said"}, "Unknown column 'said' in "),
    ],
)
def test_columns_of_a_task_that_are_missing(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", [{"ask": "which", "right": 1}] * 3)
    task = Task.model_validate({"name": "c", "kind": "multiple_choice", "dataset": str(path), **fields})
    assert message in refused(DataError, lambda: write_task(tmp_path / "tasks", task))


def test_choices_that_all_rows_share(tmp_path: Path) -> None:
    """As classes are given: a number in a column, words for all of them, and the question as a format."""
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": f"news {i}", "label": i % 3} for i in range(30)])
    fields = {"question": "{text}\nTopic:", "choices": ["World", "Sports", "Business"], "answer": "label"}
    data = {"path": str(path), "max_examples": 12}
    task = Task.model_validate({"name": "c", "kind": "multiple_choice", "dataset": data, **fields})
    write_task(tmp_path / "tasks", task)
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "c.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert {r["gold"] for r in rows} == {0, 1, 2}  # drawn from all of it
    assert all(int(r["query"].removeprefix("news ").partition("\n")[0]) % 3 == r["gold"] for r in rows)
    assert rows[0]["choices"] == ["World", "Sports", "Business"]


def test_heldout_documents_of_conversations(base_folder: Path, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "what lays eggs"}, {"role": "assistant", "content": "the hen"}]
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [*turns, {"role": "user", "content": c}]} for c in "abc"])
    data = load_stage_data(Dataset(path=str(path), heldout=1), seed=0)
    load = partial(AutoTokenizer.from_pretrained, base_folder)
    whole = heldout_documents(data, chars=1000, load_tokenizer=load)
    assert whole[0].startswith("<|im_start|>user\nwhat lays eggs<|im_end|>\n<|im_start|>assistant\nthe hen<|im_end|>\n")
    assert heldout_documents(data, chars=20, load_tokenizer=load) == [whole[0][:20]]


def refused(kind: type[ContmergeError], ask: Callable[[], Any]) -> str:
    with pytest.raises(ContmergeError) as caught:
        ask()
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.mark.slow
def test_unknown_task(tasks: Path) -> None:
    message = refused(RecipeError, lambda: check_tasks([Task(name="texts"), Task(name="hellaswog")], [tasks]))
    assert message.startswith("Unknown task 'hellaswog'. Did you mean 'hellaswag' or 'hellaswag_")
    assert len(message) < 400


def test_task_whose_data_is_on_the_hub(tasks: Path) -> None:
    """conftest.py has set HF_HUB_OFFLINE."""
    wanted = [Task(name="texts"), Task(name="hellaswag"), Task(name="piqa", suite="general")]
    assert refused(ResourceError, lambda: check_tasks(wanted, [tasks])) == (
        "The datasets of 2 tasks are missing, and the Hub cannot be reached: hellaswag, piqa (of the suite general). "
        "Check the network and HF_HUB_OFFLINE, or remove these tasks."
    )
    read = _indexed.cache_info().misses
    assert read > 10_000
    assert refused(RecipeError, lambda: check_tasks([Task(name="hellaswagg")], [tasks]))
    assert _indexed.cache_info().misses == read  # a process reads lm-eval's own task files once: it takes seconds


def test_task_with_too_few_documents(tmp_path: Path) -> None:
    write_perplexity_task(tmp_path, "single", ["a"])
    check_tasks([Task(name="single")], [tmp_path])
    message = refused(DataError, lambda: check_tasks([Task(name="single")], [tmp_path], split=True))
    assert message.startswith(
        "The task single has 1 document to measure. A guard or an `auto` parameter needs at least"
    )
    write_perplexity_task(tmp_path, "many", ["a", "b"])
    check_tasks([Task(name="many")], [tmp_path], split=True)
    assert refused(DataError, lambda: check_tasks([Task(name="many")], [tmp_path], split=True, limit=1)).startswith(
        "The task many has 1 document to measure."
    )


@pytest.mark.parametrize("contents", [None, '{"text": \n'])
def test_task_whose_data_is_missing_or_broken(contents: str | None, tmp_path: Path) -> None:
    write_perplexity_task(tmp_path, "lost", ["a"])
    (tmp_path / "lost.parquet").unlink()
    if contents:
        (tmp_path / "lost.parquet").write_text(contents)
    message = refused(DataError, lambda: check_tasks([Task(name="lost")], [tmp_path]))
    assert message.startswith("Cannot read the dataset of the task lost: ")
