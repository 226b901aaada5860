"""`evaluate: {relevance: N}`: what a stage's expert does to the stages' texts, in record and report."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from toys.models import TEXT, toy_llama, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.loop.plan.checks import prepare
from hf_contmerge.loop.run import run_recipe
from hf_contmerge.run.folder import Run
from hf_contmerge.run.recipe.text import parse_recipe
from hf_contmerge.runtime.ranks import find_ranks

DOCUMENTS, STEP = 4, 0.25
WORDS = TEXT.split()
MERGE = [{"rule": "average", "start_from": "base"}, {"rule": "magmax", "start_from": "previous"},
         {"rule": "ema", "start_from": "merged"}]  # fmt: skip


def fields(home: Path, **more: Any) -> dict[str, Any]:
    stages = [{"name": n, "dataset": {"path": str(home / f"{n}.jsonl"), "heldout": 2}} for n in "ab"]
    train = {"max_steps": 3, "per_device_train_batch_size": 2, "max_length": 32, "learning_rate": 1e-2,
             "save_strategy": "no"}  # fmt: skip
    evaluate = {"relevance": DOCUMENTS}
    return {"name": "r", "base_model": str(home / "base"), "stages": stages, "train": train, "merge": MERGE,
            "evaluate": evaluate, **more}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home, draw = tmp_path_factory.mktemp("relevance-of-experts"), random.Random(0)
    toy_llama(home / "base", seed=0)
    for i, name in enumerate("ab"):
        rows = [{"text": " ".join(draw.choices(WORDS[8 * i : 8 * i + 8], k=12))} for _ in range(10)]
        write_jsonl(home / f"{name}.jsonl", rows)
    return home


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_recipe(parse_recipe(fields(home)), tmp_path_factory.mktemp("relevance-run") / "r")


def by_hand(run: Run, kind: str, before: Path, start: Path, stage: str) -> float:
    """Return the gain per token of a quarter of the expert's change, from weights as transformers loads them."""
    expert, before_, start_ = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (run.expert(2, kind).model, before, start)
    )
    model = AutoModelForCausalLM.from_pretrained(before, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(before)
    texts = prepare(run, find_ranks()).data[stage].train.select(range(DOCUMENTS))["text"]

    def likelihoods(state: dict[str, torch.Tensor]) -> tuple[float, int]:
        model.load_state_dict(state)
        total, tokens = 0.0, 0
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            with torch.no_grad():
                total -= float(model(ids, labels=ids).loss) * (ids.numel() - 1)
            tokens += ids.numel() - 1
        return total, tokens

    moved = {name: before_[name] + STEP * (expert[name] - start_[name]) for name in expert}
    (new, tokens), (old, _) = likelihoods(moved), likelihoods(before_)
    return (new - old) / tokens


@pytest.mark.parametrize("number", range(3))
def test_the_effect_is_that_of_the_experts_own_change(run: Run, number: int):
    entry = run.recipe.merge[number]
    first, kind = run.merged(1, entry), ("base", "previous", "merged-ema")[number]
    start = {"base": Path(run.base_model), "previous": run.expert(1, "previous").model}.get(kind, first.model)
    found = run.merged(2, entry).record("merge")["relevance"]
    assert (found["step"], found["documents"], [*found["texts"]]) == (STEP, DOCUMENTS, ["a", "b"])
    for stage, effect in found["texts"].items():
        assert effect["real"] == pytest.approx(by_hand(run, kind, first.model, start, stage), abs=2e-5)
    assert found["texts"]["b"]["relevance"] > found["texts"]["a"]["relevance"]
    assert "relevance" not in first.record("merge")  # nothing was there to hurt


def test_the_report_shows_it(run: Run):
    page = (run.folder / "report/index.html").read_text()
    assert "Whom each expert helps" in page
    assert page.count("predicted at 0.25") == len(MERGE)


def test_it_needs_a_second_stage_and_a_text(home: Path):
    for stages in (fields(home)["stages"][:1], [{"name": n, "expert": f"o/{n}"} for n in "ab"]):
        with pytest.raises((ValidationError, ValueError), match=r"evaluate\.relevance looks at"):
            parse_recipe(fields(home, stages=stages))
