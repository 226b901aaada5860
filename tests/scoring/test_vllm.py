"""vLLM as what runs a scored model. Skipped where it is not installed; its build for processors will do."""

import importlib.util
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from toys.models import BOS, SPECIAL, TEXT, perturbed, toy_llama
from transformers import AutoTokenizer

from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.runtime.ranks import OneRank
from hf_contmerge.scoring.files import write_answer_task, write_choice_task, write_perplexity_task
from hf_contmerge.scoring.score import score_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def test_one_model_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a run measures them, in one process; vLLM must give its memory back in between."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as commands do
    words = TEXT.split()
    write_perplexity_task(tmp_path, "texts", [" ".join(words[i : i + 20 + i]) for i in range(6)])
    rows = [{"query": f"A court may refuse the {s}", "choices": list("abc"), "gold": 0} for s in ("fox", "claim")]
    write_choice_task(tmp_path, "choice", rows)
    write_answer_task(
        tmp_path, "written", [{"query": r["query"], "gold": "end"} for r in rows], max_new_tokens=4, stop=["."]
    )
    first = toy_llama(tmp_path / "first", seed=0, hidden=256)  # vLLM has no heads as narrow as other tests'
    second = perturbed(first, tmp_path / "second", seed=1, size=0.05)
    begin_with_bos(second)
    for folder in (first, second):
        theirs, ours = (
            score_model(
                folder, [Task(name=n) for n in ("texts", "choice", "written")], task_folder=tmp_path,
                evaluate=Evaluate(dtype="float32", cache=False, backend=backend), ranks=OneRank(),
            )[1]
            for backend in ("vllm", "hf")
        )  # fmt: skip
        assert theirs.keys() == ours.keys()
        for name, score in ours.items():
            assert theirs[name].gains == pytest.approx(score.gains, rel=1e-4), name
            assert theirs[name].details["documents_sha256"] == score.details["documents_sha256"]
        pairs = zip(theirs["written"].answers, ours["written"].answers, strict=True)
        assert all(told == wanted or "\ufffd" in wanted for told, wanted in pairs)  # of half a letter vLLM says nothing


def begin_with_bos(folder: Path) -> None:
    """Make a model's tokenizer begin every text with BOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[(SPECIAL[BOS], BOS)])
    tokenizer.save_pretrained(folder)
