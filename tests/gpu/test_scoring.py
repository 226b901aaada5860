"""Scores on CUDA against those on the CPU, and what `contmerge plan` finds out about a card."""

from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from toys.models import TEXT, toy_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_contmerge.loop.plan._machine import measure_speeds, this_machine
from hf_contmerge.run.recipe.parts import Evaluate, Task
from hf_contmerge.scoring.files import write_answer_task, write_choice_task, write_perplexity_task
from hf_contmerge.scoring.keys import ScoreRequest
from hf_contmerge.scoring.score import score_loaded, score_model

NAMES = ("lines", "topics", "written")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `base`, and tasks of three kinds, `tasks`."""
    folder = tmp_path_factory.mktemp("gpu-scoring")
    toy_llama(folder / "base", seed=0)
    words = [word.strip(".,:?") for word in TEXT.split()]
    questions = [{"query": f"The {w} and the", "choices": [w, "law", "hen"], "gold": 0} for w in dict.fromkeys(words)]
    write_perplexity_task(folder / "tasks", "lines", TEXT.strip().splitlines())
    write_choice_task(folder / "tasks", "topics", questions[:24])
    rows = [{"query": f"Question: what comes after {n}? Answer:", "gold": str(n + 1)} for n in range(8)]
    write_answer_task(folder / "tasks", "written", rows, max_new_tokens=4, stop=["\n", "."])
    return folder


@pytest.mark.parametrize("batch_size", [4, "auto"])
def test_scores_are_those_of_the_cpu(batch_size: int | str, home: Path) -> None:
    how, tasks = Evaluate(dtype="float32", batch_size=batch_size), [Task(name=name) for name in NAMES]
    _, gpu = score_model(home / "base", tasks, task_folder=home / "tasks", evaluate=how, ranks=PartialState())
    model, tokenizer = (c.from_pretrained(home / "base") for c in (AutoModelForCausalLM, AutoTokenizer))
    cpu = score_loaded(model, tokenizer, ScoreRequest(tasks, home / "tasks", how), ranks=PartialState())
    for name in NAMES:
        assert gpu[name].value == pytest.approx(cpu[name].value, rel=1e-5)
        assert gpu[name].gains == pytest.approx(cpu[name].gains, rel=1e-4, abs=1e-4)


def test_random_states_of_the_card_are_restored(home: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(home / "base").cuda().train()
    tokenizer = AutoTokenizer.from_pretrained(home / "base")
    before = torch.cuda.get_rng_state()
    request = ScoreRequest([Task(name="lines")], home / "tasks", Evaluate())
    score_loaded(model, tokenizer, request, ranks=PartialState())
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert model.training


def test_the_plan_knows_the_card(tmp_path: Path) -> None:
    machine, speeds = this_machine(tmp_path), measure_speeds(tmp_path)
    assert len(machine.gpus) == torch.cuda.device_count()
    assert machine.gpus[0] > 0
    assert speeds.flops[torch.bfloat16] > speeds.flops[torch.float32] > 1e12
    assert speeds.moved > 1e11
