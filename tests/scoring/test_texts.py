"""Texts are scored after the beginning that training shows, once: by hand in float64, for each kind of tokenizer."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from toys.models import BOS, CHATML, EOS, SPECIAL, TEXT
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_contmerge.errors import ModelError
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.run.scores import TaskScore
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring.files import write_answer_task, write_choice_task, write_perplexity_task
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.score import score_loaded, score_model

LINES = TEXT.strip().splitlines()
QUESTION = "A court may refuse the fox"
DOCUMENTS = (LINES[0], "one", "\n".join(LINES[1:4]), "naïve — 漢字.\n", "[1, 2]", "{{text}}", "7")
BEGIN = 3
"""<|im_start|>, as part of a beginning of two tokens."""
KINDS: dict[str, tuple[str, list[int]]] = {
    "none": ("$A", [BOS]),
    "BOS": ("<|bos|> $A", [BOS]),
    "BOS and EOS": ("<|bos|> $A <|eos|>", [BOS]),
    "EOS": ("$A <|eos|>", [BOS]),
    "EOS in front": ("<|eos|> $A", [EOS]),
    "two tokens": ("<|im_start|> <|bos|> $A", [BEGIN, BOS]),
    "no BOS": ("$A", [EOS]),
}
"""Kind of tokenizer -> its template; the tokens before a scored text."""

Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return a function that writes a model with a kind of tokenizer."""
    home = tmp_path_factory.mktemp("begun")

    def folder(kind: str) -> Path:
        if (home / kind).is_dir():
            return home / kind
        tokenizer = AutoTokenizer.from_pretrained(base_folder)
        special = [(word, i) for i, word in enumerate(SPECIAL)]
        template = KINDS[kind][0]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
        if kind == "no BOS":
            tokenizer.bos_token = None
        shutil.copytree(base_folder, home / kind)
        tokenizer.save_pretrained(home / kind)
        return home / kind

    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks_begun")
    rows = [{"query": f"A court may refuse the {s}", "choices": list("abc"), "gold": 0} for s in ("fox", "claim")]
    write_perplexity_task(folder, "texts", DOCUMENTS)
    write_choice_task(folder, "choice", rows)
    write_answer_task(
        folder, "written", [{"query": r["query"], "gold": "x"} for r in rows], max_new_tokens=2, stop=["."]
    )
    return folder


def score(folder: Path, tasks: Path, *names: str, **evaluate: Any) -> dict[str, TaskScore]:
    how = Evaluate.model_validate({"dtype": "float32", "batch_size": 3, "cache": False, **evaluate})
    return score_model(folder, [Task(name=n) for n in names], task_folder=tasks, evaluate=how, ranks=OneRank())[1]


@torch.no_grad()
def log_likelihood(folder: Path, tokens: Sequence[int], begin: int, *, window: int = 512) -> float:
    """Return the sum over tokens[begin:], each read after as many tokens of its window."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    row, found = torch.tensor(tokens), []
    for start in range(0, len(row) - 1, window):
        end = min(start + window, len(row) - 1)
        logits = model(row[None, max(0, end - window) : end]).logits[0].log_softmax(-1)[start - end :]
        found.append(logits.gather(1, row[start + 1 : end + 1, None])[:, 0])
    return torch.cat(found)[begin - 1 :].sum().item()


def plain(folder: Path, text: str) -> list[int]:
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def trained_tokens(folder: Path, rows: Sequence[dict[str, Any]], out: Path) -> list[list[int]]:
    """Return the tokens of examples as TRL trains on them."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        SFTConfig(str(out), max_length=None, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True),
        train_dataset=Dataset.from_list(list(rows)), processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    assert isinstance(trainer.train_dataset, Dataset)
    return [list(ids) for ids in trainer.train_dataset["input_ids"]]


@pytest.mark.parametrize("kind", KINDS)
def test_document_as_in_training(kind: str, folder: Folder, tasks: Path, tmp_path: Path) -> None:
    """A first token that nothing precedes in training is predicted from BOS or EOS."""
    begin = KINDS[kind][1]
    shown = trained_tokens(folder(kind), [{"text": text} for text in DOCUMENTS], tmp_path)
    scores = score(folder(kind), tasks, "texts")["texts"]
    for text, gain, tokens in zip(DOCUMENTS, scores.gains, shown, strict=True):
        ids = plain(folder(kind), text)
        begun = tokens if tokens[: len(begin)] == begin else begin + tokens
        assert begun[: len(begin) + len(ids) + 1] == [*begin, *ids, EOS]  # EOS ends it, and is not of the text
        assert gain == pytest.approx(log_likelihood(folder(kind), [*begin, *ids], len(begin)), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_rolling_windows(kind: str, batch_size: Any, folder: Folder, tasks: Path) -> None:
    """The beginning stands in a document's first window, once."""
    begin = KINDS[kind][1]
    gains = score(folder(kind), tasks, "texts", max_length=16, batch_size=batch_size)["texts"].gains
    for text, gain in zip(DOCUMENTS, gains, strict=True):
        tokens = [*begin, *plain(folder(kind), text)]
        assert gain == pytest.approx(log_likelihood(folder(kind), tokens, len(begin), window=16), rel=1e-5)


def test_windows_are_blocks_of_packed_training(folder: Folder, tmp_path: Path) -> None:
    """Blocks begin inside a document without a BOS, as later windows do."""
    from trl.data_utils import pack_dataset

    (tokens,) = trained_tokens(folder("BOS"), [{"text": DOCUMENTS[2]}], tmp_path)
    blocks = pack_dataset(Dataset.from_list([{"input_ids": tokens}]), 16, "wrapped")["input_ids"]
    assert [list(block).count(BOS) for block in blocks] == [1] + [0] * (len(blocks) - 1)
    assert len(blocks) > 2


@pytest.mark.parametrize("kind", ["BOS", "BOS and EOS", "none"])
def test_conversation_with_a_bos_in_its_template(kind: str, folder: Folder, tmp_path: Path) -> None:
    """The template writes BOS, and the tokenizer would add another one."""
    shutil.copytree(folder(kind), tmp_path / "chat")
    (tmp_path / "chat/chat_template.jinja").write_text("<|bos|>" + CHATML)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    messages = [{"role": "user", "content": "a hen?"}, {"role": "assistant", "content": "It lays eggs."}]
    write_perplexity_task(tmp_path / "tasks", "talk", [tokenizer.apply_chat_template(messages, tokenize=False)])
    (tokens,) = trained_tokens(tmp_path / "chat", [{"messages": messages}], tmp_path / "out")
    assert (tokens[0], tokens.count(BOS)) == (BOS, 1)
    gains = score(tmp_path / "chat", tmp_path / "tasks", "talk")["talk"].gains
    assert gains == pytest.approx((log_likelihood(tmp_path / "chat", tokens, 1),), rel=1e-5)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_read_by_a_model(kind: str, chat: bool, folder: Folder, tasks: Path) -> None:
    """Questions and prompts begin as texts in training do, and do not end with EOS."""
    front = KINDS[kind][0].partition("$A")[0].split()
    tokenizer, read = AutoTokenizer.from_pretrained(folder(kind)), list[list[int]]()
    tokenizer.chat_template = "".join(front) + CHATML
    model = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32)

    def watch(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        read.extend(row.tolist() for row in args[0] if len(row) > 1)  # a single one continues a generated text

    model.get_input_embeddings().register_forward_pre_hook(watch)
    messages = [{"role": "user", "content": QUESTION}]
    turn = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    prompt = turn if chat else "".join(front) + QUESTION
    for name in ("choice", "written"):
        read.clear()
        request = ScoreRequest([Task(name=name)], tasks, Evaluate(batch_size=1, chat_template=chat))
        score_loaded(model, tokenizer, request, ranks=OneRank())
        assert tokenizer.encode(prompt, add_special_tokens=False) in read
        assert all(row[: len(front)] == tokenizer.convert_tokens_to_ids(front) for row in read)
        assert all(EOS not in row[len(front) :] for row in read)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", ["", " ", "A court may refuse", "A court may "])
def test_continuation(kind: str, context: str, folder: Folder) -> None:
    from lm_eval.api.instance import Instance

    from hf_contmerge.scoring._lm import SharedLM

    model = AutoModelForCausalLM.from_pretrained(folder(kind), dtype=torch.float32).eval()
    lm = SharedLM(model, AutoTokenizer.from_pretrained(folder(kind)), OneRank(), batch_size=1)
    ((gain, _),) = lm.loglikelihood([Instance("loglikelihood", {}, (context, " the claim"), 0)])
    template, begin = KINDS[kind]
    before, whole = (plain(folder(kind), text) for text in (context.rstrip(), f"{context} the claim"))
    if before and template.startswith("$A"):  # a first token that is not scored needs nothing before it
        begin = []
    by_hand = log_likelihood(folder(kind), [*begin, *whole], len(begin) + len(before))
    assert gain == pytest.approx(by_hand, rel=1e-5)


def test_difference_from_lm_eval(folder: Folder, tasks: Path) -> None:
    """lm-eval doubles the BOS and counts it; `add_bos_token=False` gives our number."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ours = score(folder("BOS"), tasks, "texts")["texts"].gains
    make: Any = HFLM

    def theirs(**options: Any) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(folder("BOS"), dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder("BOS"))
        lm = make(pretrained=model, tokenizer=tokenizer, batch_size=4, softmax_dtype="float32", **options)
        return lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0) for text in DOCUMENTS])

    assert theirs(add_bos_token=False) == pytest.approx(list(ours), rel=1e-5)
    doubled = [[BOS, BOS, *plain(folder("BOS"), text)] for text in DOCUMENTS]
    assert theirs() == pytest.approx([log_likelihood(folder("BOS"), ids, 1) for ids in doubled], rel=1e-5)


def test_tokenizer_without_bos_and_eos(folder: Folder, tasks: Path, tmp_path: Path) -> None:
    """Its questions have a context; the first token of a text has none."""
    shutil.copytree(folder("none"), tmp_path / "bare")
    path = tmp_path / "bare/tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in settings.items() if k not in ("bos_token", "eos_token")}))
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tmp_path / "bare")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (None, None)
    assert score(tmp_path / "bare", tasks, "choice")["choice"].answers
    with pytest.raises(ModelError, match="has no BOS and no EOS token; the first token of a text is predicted from"):
        score(tmp_path / "bare", tasks, "texts")


def test_empty_document(folder: Folder, tmp_path: Path) -> None:
    write_perplexity_task(tmp_path, "empty", ["", "one", "<|bos|>"])
    gains = score(folder("BOS"), tmp_path, "empty")["empty"].gains
    assert (gains[0], gains[2]) == (0, 0)
    assert gains[1] < 0
